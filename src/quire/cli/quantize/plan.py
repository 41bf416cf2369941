"""What each tensor of a checkpoint becomes, and the config that says so, from headers alone. Torch-free.

The layout is that of compressed-tensors 0.20.1: `pack-quantized` for integers, `float-quantized` for FP8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quire.dtypes import FLOATS, element_bytes
from quire.errors import CheckpointError, ConfigError
from quire.kernels.codes import CodeFormat
from quire.models.spec import ModelSpec
from quire.weights.names import HEAD, list_names
from quire.weights.source import TensorInfo

SCHEMES = {"w8a16": 8, "w4a16": 4, "fp8": 8}
"""Name -> bits of a weight."""
GROUPS = (128, 64, 32)
"""Of w4a16: the first that divides the inputs of every layer."""
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Choice:
    """The user's."""

    scheme: str
    group_size: int | None = None
    """Inputs that share a scale; -1: all of them. None: what the scheme does by default."""
    asymmetric: bool = False
    ignore: Sequence[str] = ()
    """Expressions, searched for in the names of layers."""
    head: str = "keep"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the new checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * element_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor, read once."""

    source: TensorInfo
    form: CodeFormat | None
    """None: copied as it is."""
    stored: tuple[Stored, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    steps: tuple[Step, ...]
    config: dict[str, object]
    num_quantized: int
    num_matrices: int
    label: str

    @property
    def num_weights(self) -> int:
        """Each tensor once."""
        read = {step.source.name: math.prod(step.source.shape) for step in self.steps}
        return sum(read.values())

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for step in self.steps for stored in step.stored)


def make_plan(
    config: Mapping[str, object],
    spec: ModelSpec,
    tensors: Mapping[str, TensorInfo],
    choice: Choice,
) -> Plan:
    """config: of config.json. tensors: of the checkpoint.

    Raises `ConfigError` for a choice that does not fit the model, `CheckpointError` for a checkpoint that
    does not hold the model's matrices as floats.
    """
    inputs = {
        f"{part.name}.weight": linear.in_features
        for linear in spec.linears()
        for part in linear.parts
    }
    inputs.pop(EMBEDDING, None)  # a tied head
    if missing := [name for name in inputs if name not in tensors]:
        raise CheckpointError(
            f"the checkpoint lacks {list_names(missing)}; save it with transformers' "
            "AutoModelForCausalLM.save_pretrained, or download it again"
        )
    layers = {name: k for name, k in inputs.items() if name != HEAD}
    kept = _ignored(layers, choice.ignore)
    quantized = {name: k for name, k in layers.items() if name not in kept}
    for name in quantized:
        if tensors[name].dtype not in FLOATS:
            raise CheckpointError(
                f"tensor {name} has dtype {tensors[name].dtype}; only checkpoints of floats are quantized"
            )
    group = _group(quantized, choice)
    steps = []
    for name, info in sorted(tensors.items(), key=lambda item: item[1].position):
        if name == HEAD and spec.tie_word_embeddings:
            continue
        info = replace(info, name=name)
        if name in quantized:
            form = _form(choice, group, scale=info.dtype)
            steps.append(Step(info, form, _stored(name, form, info)))
        elif name == HEAD and choice.head == "w8":
            steps.append(_head_step(info, info))
        else:
            steps.append(Step(info, None, (Stored(name, info.dtype, info.shape),)))
            if name == EMBEDDING and spec.tie_word_embeddings and choice.head == "w8":
                steps.append(_head_step(info, replace(info, name=HEAD)))
    names = [name.removesuffix(".weight") for name in kept]
    written = {
        **config,
        "quantization_config": _quantization_config(choice, group, ignore=names),
    }
    if choice.head == "w8":
        written["tie_word_embeddings"] = False
    label = choice.scheme + (f" g{group}" if group > 0 else "") + choice.asymmetric * " asym"
    return Plan(
        tuple(steps),
        written,
        num_quantized=sum(step.form is not None for step in steps),
        num_matrices=len(layers) + 1,
        label=label,
    )


def _head_step(source: TensorInfo, named: TensorInfo) -> Step:
    form = CodeFormat(bits=8, scale=source.dtype, zero=128)  # type: ignore[arg-type]
    return Step(source, form, _stored(HEAD, form, named))


def _ignored(layers: Mapping[str, int], expressions: Sequence[str]) -> list[str]:
    found: dict[str, None] = {}
    for expression in expressions:
        try:
            matches = [
                name for name in layers if re.search(expression, name.removesuffix(".weight"))
            ]
        except re.error as error:
            raise ConfigError(
                f"--ignore {expression!r} is no regular expression: {error}"
            ) from None
        if not matches:
            example = next(iter(layers)).removesuffix(".weight")
            raise ConfigError(
                f"--ignore {expression!r} matches no layer; they are named like {example}"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def _group(quantized: Mapping[str, int], choice: Choice) -> int:
    """-1: one scale for all inputs."""
    if choice.scheme == "fp8":
        if choice.asymmetric or choice.group_size not in (None, -1):
            raise ConfigError(
                "fp8 is symmetric, with a scale for each output: remove --asym and --group-size"
            )
        return -1
    if choice.group_size is not None:
        for name, k in quantized.items():
            if choice.group_size > 0 and (choice.group_size % 8 or k % choice.group_size):
                raise ConfigError(
                    f"--group-size {choice.group_size} must be a multiple of 8 and divide the {k} inputs of "
                    f"{name}; use {_largest_group(quantized)}, or -1 for one scale per output"
                )
        return choice.group_size
    return _largest_group(quantized) if choice.scheme == "w4a16" else -1


def _largest_group(quantized: Mapping[str, int]) -> int:
    return next((g for g in GROUPS if all(k % g == 0 for k in quantized.values())), -1)


def _form(choice: Choice, group: int, *, scale: str) -> CodeFormat:
    bits = SCHEMES[choice.scheme]
    if choice.scheme == "fp8":
        return CodeFormat(bits=8, float8=True, scale=scale)  # type: ignore[arg-type]
    return CodeFormat(
        bits=bits,  # type: ignore[arg-type]
        group=max(group, 0),
        scale=scale,  # type: ignore[arg-type]
        offset="zero" if choice.asymmetric else "none",
        zero=0 if choice.asymmetric else 1 << (bits - 1),
    )


def _stored(name: str, form: CodeFormat, info: TensorInfo) -> tuple[Stored, ...]:
    rows, width = info.shape
    groups = form.num_groups(width)
    scale = Stored(f"{name}_scale", info.dtype, (rows, groups))
    if form.float8:
        return Stored(name, "float8_e4m3fn", (rows, width)), scale
    packed = Stored(f"{name}_packed", "int32", (rows, _words(width, form.bits)))
    shape = Stored(f"{name}_shape", "int64", (2,))
    if form.offset != "zero":
        return packed, scale, shape
    zero = Stored(f"{name}_zero_point", "int32", (_words(rows, form.bits), groups))
    return packed, scale, shape, zero


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _quantization_config(choice: Choice, group: int, *, ignore: list[str]) -> dict[str, object]:
    form = "float-quantized" if choice.scheme == "fp8" else "pack-quantized"
    weights = _arguments(
        SCHEMES[choice.scheme],
        "float" if choice.scheme == "fp8" else "int",
        "group" if group > 0 else "channel",
        symmetric=not choice.asymmetric,
        group_size=group if group > 0 else None,
    )
    inputs = _arguments(8, "float", "token", dynamic=True) if choice.scheme == "fp8" else None
    groups = {"group_0": _scheme(["Linear"], form, weights, inputs)}
    if choice.head == "w8":
        head = _arguments(8, "int", "channel")
        if head != weights:  # transformers takes the first group that names a layer
            groups = {
                "group_0": _scheme(["re:.*lm_head$"], "pack-quantized", head, None),
                "group_1": groups["group_0"],
            }
    mixed = form != "pack-quantized" and len(groups) > 1
    return {
        "config_groups": groups,
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": None,
        "format": "mixed-precision" if mixed else form,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": [*ignore, *([] if choice.head == "w8" else ["lm_head"])],
    }


def _arguments(
    bits: int,
    kind: str,
    strategy: str,
    *,
    symmetric: bool = True,
    group_size: int | None = None,
    dynamic: bool = False,
) -> dict[str, object]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "group_size": group_size,
        "strategy": strategy,
        "dynamic": dynamic,
    }


def _scheme(
    targets: list[str], form: str, weights: dict[str, object], inputs: dict[str, object] | None
) -> dict[str, object]:
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": form,
    }
