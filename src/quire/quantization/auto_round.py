"""AutoRound (Cheng et al. 2024), which packs as GPTQ or AWQ do and describes it in its own words."""

from __future__ import annotations

import re
from collections.abc import Mapping

from quire.quantization import awq, gptq
from quire.quantization.base import LinearMethod
from quire.quantization.fields import Fields

GPTQ = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
}
"""packing_format -> GPTQ's."""
AWQ = ("auto_round:auto_awq", "auto_round:awq")


def read_config(config: Mapping[str, object]) -> LinearMethod:
    """Raises `UnsupportedModelError` for other packings."""
    fields = Fields(config)
    packing = fields.choice((*GPTQ, *AWQ), "packing_format", default="auto_round:auto_gptq")
    names = ("packing_format", "extra_config")
    rest = {name: value for name, value in config.items() if name not in names}
    if packing in AWQ:
        return awq.read_config({**rest, "zero_point": not fields.get(bool, "sym", default=True)})
    dynamic: dict[str, object] = {}
    for name, own in fields.get(dict, "extra_config", default={}).items():
        known = {key: value for key, value in own.items() if key in ("bits", "group_size", "sym")}
        kept = known.get("bits", 0) < 16
        dynamic[("+:" if kept else "-:") + re.escape(name) + "$"] = known if kept else {}
    return gptq.read_config({**rest, "checkpoint_format": GPTQ[packing], "dynamic": dynamic})
