"""Weight formats: from the `quant_method` of a config to its module, which is imported when it is needed.
A new format is one file with `read_config(config) -> LinearMethod`, and one line here. Torch-free."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from quire.errors import ConfigError, UnsupportedModelError
from quire.quantization.base import LinearMethod
from quire.quantization.unquantized import UNQUANTIZED

METHODS: dict[str, str] = {
    "auto-round": "quire.quantization.auto_round",
    "awq": "quire.quantization.awq",
    "compressed-tensors": "quire.quantization.compressed_tensors",
    "fbgemm_fp8": "quire.quantization.fp8",
    "fp8": "quire.quantization.fp8",
    "gguf": "quire.quantization.gguf",
    "gptq": "quire.quantization.gptq",
    "modelopt": "quire.quantization.modelopt",
}
"""quant_method in the config -> module."""

_FORMATS = "use a checkpoint in GPTQ, AWQ, FP8 or compressed-tensors, or the unquantized checkpoint"
_ONLINE = "use the unquantized checkpoint with --quantization int4 or int8"
REFUSED: Mapping[str, str] = {
    "bitsandbytes": _ONLINE,
    "hqq": _ONLINE,
    "eetq": _ONLINE,
    "quanto": _ONLINE,
    "torchao": _FORMATS,
    "quark": _FORMATS,
    "aqlm": _FORMATS,
    "vptq": _FORMATS,
    "higgs": _FORMATS,
    "spqr": _FORMATS,
    "bitnet": _FORMATS,
    "marlin": _FORMATS,
    "mlx": _FORMATS,
    "mxfp4": "its experts are not supported; use a dense model",
}
"""quant_method of formats that are known and not supported -> what to do."""

NAMES: Mapping[str, str] = {
    **{name: name for name in METHODS},
    "auto_awq": "awq",
    "auto_gptq": "gptq",
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "inc": "auto-round",
    "modelopt_fp4": "modelopt",
    "modelopt_fp8": "modelopt",
    "modelopt_mixed": "modelopt",
}
"""--quantization of a quantized checkpoint -> its quant_method. vLLM's names."""

ONLINE: Mapping[str, str] = {
    "int8": "int8",
    "int4": "int4",
    "fp8_per_channel": "fp8_per_channel",
    "int8_per_channel_weight_only": "int8",
}
"""--quantization of an unquantized checkpoint, which is quantized while it is loaded."""

NOT_ONLINE: Mapping[str, str] = {
    "fp8": "fp8_per_channel",
    "fp8_per_tensor": "fp8_per_channel",
    "fp8_per_block": "fp8_per_channel",
    "mxfp8": "fp8_per_channel",
    "mxfp4": "int4",
    "online": "int8",
}
"""vLLM's names of what it does while it loads and Quire does not -> the nearest that it does."""


def method_name(config: Mapping[str, object]) -> str | None:
    """The `quant_method` of a `quantization_config`, or what its fields and tensors say that it is. None: not
    quantized."""
    name = _completed(config).get("quant_method")
    return None if name is None else str(name)


def read_method(config: Mapping[str, object]) -> LinearMethod:
    """The method of a `quantization_config`.

    Raises `UnsupportedModelError` if it is unknown or known not to work, and as the method's module does.
    """
    config = _completed(config)
    name = config.get("quant_method")
    if name is None:
        return UNQUANTIZED
    name = str(name)
    module = METHODS.get(name)
    if module is None:
        remedy = REFUSED.get(name, "use the model's unquantized checkpoint")
        raise UnsupportedModelError(
            f"config.json: quantization_config has quant_method {name!r}, but Quire reads only "
            f"{', '.join(sorted(METHODS))}; {remedy}"
        )
    method: LinearMethod = importlib.import_module(module).read_config(config)
    return method


def choose_method(
    wanted: str | None, config: Mapping[str, object], stored: LinearMethod
) -> LinearMethod:
    """What `--quantization` makes of a checkpoint. config: its `quantization_config`, or empty. stored: its
    method.

    Raises `ConfigError` for a name that does not exist, or that contradicts the checkpoint.
    """
    if wanted is None:
        return stored
    found = method_name(config)
    if wanted in REFUSED and wanted not in NOT_ONLINE:
        raise ConfigError(f"quantization {wanted!r} is not supported; {REFUSED[wanted]}.")
    if wanted not in NAMES and wanted not in ONLINE and wanted not in NOT_ONLINE:
        known = ", ".join(sorted({*NAMES, *ONLINE}))
        raise ConfigError(f"quantization must be one of {known}, got {wanted!r}.")
    if found is None:
        if wanted in ONLINE:
            online = importlib.import_module("quire.quantization.online")
            method: LinearMethod = online.read_online(ONLINE[wanted])
            return method
        nearest = NOT_ONLINE.get(wanted)
        remedy = f"use --quantization {nearest}" if nearest else "leave --quantization out"
        raise ConfigError(
            f"quantization is {wanted!r}, but the checkpoint is not quantized; {remedy}."
        )
    if NAMES.get(wanted) != found:
        raise ConfigError(
            f"quantization is {wanted!r}, but the checkpoint is quantized as {found!r}; leave "
            "--quantization out, or use the model's unquantized checkpoint."
        )
    return stored


def _completed(config: Mapping[str, object]) -> Mapping[str, object]:
    """With its `quant_method`, if other fields or, where there are none, the tensors show it."""
    name = config.get("quant_method")
    if name is None and any(name.endswith(".biases") for name in config.get("tensors") or ()):  # type: ignore[attr-defined]
        name = "mlx"
    if name is None:
        name = next((name for field, name in _FIELDS.items() if config.get(field)), None)
    if name is None:
        return {**config, **_seen(config.get("tensors"))}
    return {**config, "quant_method": _SAME.get(str(name), name)}


_SAME = {"sparseml": "compressed-tensors", "intel/auto-round": "auto-round"}
_FIELDS = {
    "config_groups": "compressed-tensors",
    "quant_algo": "modelopt",
    "w_bit": "awq",
    "bits": "gptq",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
}
"""Fields of configs that name no quant_method."""


def _seen(tensors: object) -> Mapping[str, object]:
    """What names and shapes in the files' headers say, in the fields of a config."""
    shapes = {
        name: shape for name, (_, shape) in (tensors if isinstance(tensors, dict) else {}).items()
    }
    for name, shape in shapes.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            raise UnsupportedModelError(
                f"the checkpoint has tensor {name}, but config.json has no quantization_config, which says "
                "how its numbers are packed; download config.json again"
            )
        if suffix == "weight_scale_inv":
            return {"quant_method": "fp8", "weight_block_size": [128, 128]}
        if suffix == "weight_scale":
            return {"quant_method": "fp8"}
        zeros, scales = (shapes.get(f"{module}.{each}", ()) for each in ("qzeros", "scales"))
        if (
            suffix != "qweight"
            or len(zeros) != 2
            or len(scales) != 2
            or 0 in scales
            or len(shape) != 2
        ):
            continue
        if shape[1] != scales[1]:
            group = shape[0] // scales[0]
            return {"quant_method": "awq", "bits": 4, "group_size": group if scales[0] > 1 else -1}
        bits = zeros[1] * 32 // scales[1]
        inputs = shape[0] * 32 // max(bits, 1)
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": inputs // scales[0] if scales[0] > 1 else -1,
            "sym": False,
            "desc_act": f"{module}.g_idx" in shapes,
        }
    return {}
