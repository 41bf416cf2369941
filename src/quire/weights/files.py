"""Finds the .safetensors files of a directory that belong to the model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePath

from quire.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
EXTRAS = re.compile(
    r"(consolidated|adapter|optimizer|scheduler|training|trainer|random|rng|ema|lora|vae|sampler)"
)
"""Prefixes of files that are not the model. Mistral ships the same weights a second time, under its own
names, as consolidated*.safetensors."""


def read_index(model_dir: Path) -> Mapping[str, str] | None:
    """Tensor name -> file name, or None where the checkpoint has no index (a single file wins over one)."""
    path = model_dir / INDEX_FILE
    if (model_dir / SINGLE_FILE).is_file() or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON; download it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map object; download it again")
    for name, file in weight_map.items():
        # A name, not a path: an index must not reach outside its own directory.
        if (
            not isinstance(file, str)
            or PurePath(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{path} places tensor {name} in {file!r}; a shard must be a .safetensors "
                "file beside the index"
            )
    return weight_map


def find_files(model_dir: Path) -> list[str]:
    """The names of the files that hold the model: one, or the shards, or all that are not known extras.

    Raises:
        CheckpointError: there is none, or a shard is missing; names the files that exist instead.
    """
    if (model_dir / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    names = sorted(path.name for path in model_dir.glob("*.safetensors"))
    model = [name for name in names if not EXTRAS.match(name)]
    shards = _shards(model_dir, model)
    if shards or model:
        return shards or model
    if any(name.startswith("adapter") for name in names):
        raise CheckpointError(
            f"{model_dir} holds an adapter ({names[0]}), not a model; serve its base model "
            f"with --enable-lora --lora-modules NAME={model_dir}, or merge them (merge_and_unload())"
        )
    if any(name.startswith("consolidated") for name in names):
        raise CheckpointError(
            f"{model_dir} has its weights only in Mistral's own naming ({names[0]}); download the "
            "model*.safetensors files too"
        )
    if any(model_dir.glob("*.bin")) or any(model_dir.glob("*.pt*")):
        raise CheckpointError(
            f"{model_dir} has only pickled weights (.bin or .pt), which can run code when "
            "loaded; convert them with "
            "transformers: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)"
        )
    raise CheckpointError(
        f"{model_dir} has no .safetensors file; point to a directory "
        "with weights, or use --load-format dummy"
    )


def _shards(model_dir: Path, names: list[str]) -> list[str]:
    """All shards of the model; empty if the files are not shards."""
    sets: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        if match := SHARD.fullmatch(name):
            key = match["stem"], match["count"]
            sets.setdefault(key, {})[int(match["number"])] = name
    if len(sets) > 1:
        sets = {key: shards for key, shards in sets.items() if key[0] == "model"} or sets
    if len(sets) > 1:
        raise CheckpointError(
            f"{model_dir} has several sets of shards ({', '.join(names[:4])}, ...); remove those that do not "
            f"belong, or add {INDEX_FILE}"
        )
    for (stem, count), shards in sets.items():
        for number in range(1, int(count) + 1):
            if number not in shards:
                raise CheckpointError(
                    f"{model_dir} has {len(shards)} of {count} shards; {stem}-{number:05}-of-{count}"
                    ".safetensors is missing: download it again"
                )
        return [shards[number] for number in sorted(shards)]
    return []
