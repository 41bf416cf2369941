"""LoRA adapters on disk (Hu et al. 2021), as PEFT writes them: everything that can be checked without torch
and without reading a tensor.

The tensors say what an adapter is: which matrices it changes, and the rank of each. From
adapter_config.json come only the scales and what changes the meaning of the tensors. No pattern in it is
ever run as a regular expression.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from quire.dtypes import FLOATS
from quire.errors import CheckpointError, UnsupportedModelError
from quire.kernels.codes import PANEL
from quire.quantization.base import LinearPart, LinearShape
from quire.weights.names import EMBEDDING, TOWERS, list_names
from quire.weights.open_files import OpenFiles, unreadable
from quire.weights.safetensors_header import HeaderError, read_header
from quire.weights.source import TensorInfo

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
MOST_CONFIG_BYTES = 1 << 20
MOST_HEADER_BYTES = 16 << 20
HASHED_BYTES = 1 << 20
"""Read at once for the hash."""
HEAD = "lm_head"


class Digest(Protocol):
    """Of hashlib."""

    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class AdaptedModel(Protocol):
    """What is used of a `ModelSpec`."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def has_head(self) -> bool: ...
    def linears(self) -> Iterator[LinearShape]: ...


@dataclass(frozen=True, slots=True)
class AdaptedMatrix:
    """y = g * (W x + scale * B (A x)) + bias, for one matrix W [outputs, inputs]. Of an embedding, x is a
    token as a vector with a single one."""

    site: int
    """The product, as `sites` numbers them, and the first of its outputs."""
    first: int
    name: str
    """Of W in our models: "model.layers.0.self_attn.q_proj"."""
    inputs: int
    outputs: int
    rank: int
    scale: float
    """alpha / rank, or alpha / sqrt(rank)."""
    a: TensorInfo
    """[rank, inputs]"""
    b: TensorInfo
    """[outputs, rank]"""
    magnitude: TensorInfo | None = None
    """[outputs]: DoRA's m (Liu et al. 2024), g = m / ||W + scale * B A||; None: g = 1."""
    base: TensorInfo | None = None
    """W, which PEFT saves with an adapter of an embedding or a head. Loading compares it with the model's."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter that fits the model. Its tensors have not been read: they may still hold NaN."""

    content_hash: str
    """32 hexadecimal digits: of config and tensors."""
    matrices: tuple[AdaptedMatrix, ...]
    """In the model's order; at least one."""
    base_model: str | None
    """`base_model_name_or_path`: what the author called the base model. Often wrong, so only for lists."""

    @property
    def max_rank(self) -> int:
        return max(matrix.rank for matrix in self.matrices)

    def num_bytes(self, dtype_bytes: int) -> int:
        """Memory it takes when loaded: an upper bound, exact to a panel. dtype_bytes: of the model's
        dtype."""
        return sum(
            matrix_bytes(m.inputs, m.outputs, m.rank, dtype_bytes, m.magnitude is not None)
            for m in self.matrices
        )

    def key(self, name: str) -> str:
        """The adapter's name in `Placement.adapter`: NAME@HASH."""
        return f"{name}@{self.content_hash}"


NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga"),
    **dict.fromkeys(
        ("fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "megatron_config"),
        (False, None),
    ),
    **dict.fromkeys(
        ("modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices"),
        (None, [], {}),
    ),
    **dict.fromkeys(
        ("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config"), (None,)
    ),
    **dict.fromkeys(("monteclora_config", "loftq_config"), (None, {})),
}
"""Fields of a config -> the values with which an adapter is what its tensors say. Others would change the
result and are refused."""
REMEDIES = {
    "modules_to_save": "train without it, or merge the adapter into the base model",
    "init_lora_weights": "it changes the base weights: save the adapter again with PEFT's "
    "path_initial_model_for_weight_conversion",
    "peft_type": "only LORA is served",
    "bias": "train with bias='none', or merge the adapter into the base model",
}
READ = frozenset({"alpha_pattern", "lora_alpha", "use_dora", "use_rslora", "ensure_weight_tying"})
MEANINGLESS = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode "
    "layers_pattern layers_to_transform lora_dropout lora_ga_config megatron_core peft_version "
    "qalora_group_size r rank_pattern revision runtime_config target_modules task_type".split()
)
"""Fields that say how an adapter was trained or which matrices it has: its tensors show that."""
KINDS = re.compile(
    r"(.+)\.(?:(lora_A)\.weight|(lora_B)\.weight|(lora_embedding_A)|(lora_embedding_B)"
    r"|(lora_magnitude_vector)(?:\.weight)?|(base_layer)\.weight)"
)
PEFT_PREFIX = "base_model.model."
MODULE = re.compile(r"(?:^|\.)(layers\.\d+\..+|embed_tokens|lm_head)$")
LITERAL = re.compile(r"\^?(?:[\w.-]|\\\.)+")


def check_adapter(directory: Path, model: AdaptedModel, *, max_rank: int) -> AdapterInfo:
    """Reads the config, the header of the tensors, and all bytes once, for the hash.

    Raises:
        CheckpointError: a file is missing, truncated, too large or not what it should be; a tensor is not one
            of the model's, lacks its other half, or has a wrong shape or dtype.
        UnsupportedModelError: the adapter uses something that is not served, by its name in the config; or a
            rank is above `max_rank`.
    """
    with AdapterFile(directory, model, max_rank=max_rank) as file:
        digest = file.digest()
        buffer = memoryview(bytearray(min(HASHED_BYTES, file.num_bytes)))
        for begin in range(0, file.num_bytes, HASHED_BYTES):
            part = buffer[: min(HASHED_BYTES, file.num_bytes - begin)]
            file.read_bytes(begin, part)
            digest.update(part)
        file.check_unchanged()
    return file.info(digest)


class AdapterFile(OpenFiles):
    """The open file of tensors. Config and header have been checked: errors as in `check_adapter`."""

    def __init__(self, directory: Path, model: AdaptedModel, *, max_rank: int) -> None:
        super().__init__()
        self._raw = _read_config(directory / CONFIG_FILE)
        config = _Config(self._raw)
        self._base = config.fields.get("base_model_name_or_path")
        path = directory / TENSOR_FILE
        if not path.is_file():
            for pickled in ("adapter_model.bin", "adapter_model.pt"):
                if (directory / pickled).exists():
                    raise CheckpointError(
                        f"the adapter has only {pickled}, a pickle, which can run code when loaded: "
                        "save it again with save_pretrained(..., safe_serialization=True)"
                    )
            raise CheckpointError(
                f"the adapter has no {TENSOR_FILE}; give the directory that PEFT's "
                "save_pretrained wrote"
            )
        try:
            handle, status = self.add_file(path)
            entries = read_header(handle, status.num_bytes, MOST_HEADER_BYTES)
            self.num_bytes = status.num_bytes
            for name, entry in entries.items():
                self.tensors[name] = TensorInfo(
                    name, TENSOR_FILE, entry.shape, entry.dtype, entry.begin, entry.num_bytes
                )
            self.matrices = _matrices(self.tensors, config, model, max_rank)
        except OSError as error:
            self.close()
            raise unreadable(Path(TENSOR_FILE), error) from None
        except HeaderError as error:
            self.close()
            raise CheckpointError(
                f"{TENSOR_FILE} is not a complete safetensors file ({error}); copy it again"
            ) from None
        except BaseException:
            self.close()
            raise

    def read_bytes(self, begin: int, into: memoryview) -> None:
        """Of the whole file."""
        self.read(TensorInfo("", TENSOR_FILE, (), "", 0, self.num_bytes), begin, into)

    def digest(self) -> Digest:
        """To be updated with the bytes of the whole file, then for `info`."""
        return hashlib.sha256(hashlib.sha256(self._raw).digest())

    def info(self, digest: Digest) -> AdapterInfo:
        base = self._base if isinstance(self._base, str) and self._base else None
        return AdapterInfo(digest.hexdigest()[:32], self.matrices, base)


def _read_config(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(
            f"the adapter has no {CONFIG_FILE}; give the directory that PEFT's save_pretrained wrote"
        ) from None
    except OSError as error:
        raise unreadable(Path(CONFIG_FILE), error) from None
    if len(raw) > MOST_CONFIG_BYTES:
        raise CheckpointError(f"{CONFIG_FILE} is larger than {MOST_CONFIG_BYTES} bytes")
    return raw


class _Config:
    """What adapter_config.json says about scales; the rest of it is neutral."""

    def __init__(self, raw: bytes) -> None:
        try:
            fields = json.loads(raw, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise CheckpointError(f"{CONFIG_FILE} is not valid JSON; copy it again") from None
        if not isinstance(fields, dict):
            raise CheckpointError(f"{CONFIG_FILE} must hold a JSON object")
        self.fields: dict[str, object] = fields
        if "peft_type" not in fields:
            raise CheckpointError(f"{CONFIG_FILE} has no peft_type: it is not an adapter of PEFT")
        for name, value in fields.items():
            if name in READ or name in MEANINGLESS:
                continue
            known = NEUTRAL.get(name, (None, False, [], {}))
            if not any(value == each and type(value) is type(each) for each in known):
                remedy = REMEDIES.get(name, "merge the adapter into the base model instead")
                raise UnsupportedModelError(
                    f"{CONFIG_FILE}: {name[:80]} is {_short(value)}, which is not served; {remedy}"
                )
        self.dora = self._flag("use_dora")
        self.tied = self._flag("ensure_weight_tying")
        self._rslora = self._flag("use_rslora")
        self._alpha = _number("lora_alpha", fields.get("lora_alpha", 8))
        patterns = fields.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(
                f"{CONFIG_FILE}: alpha_pattern is {_short(patterns)}, not an object"
            )
        self._patterns: list[tuple[str, float]] = []
        for key, value in patterns.items():
            if not LITERAL.fullmatch(key):
                raise UnsupportedModelError(
                    f"{CONFIG_FILE}: alpha_pattern has {_short(key)}, a regular expression; only names of "
                    "modules are served: write one entry for each module"
                )
            alpha = _number(f"alpha_pattern[{_short(key)}]", value)
            self._patterns.append((key.replace("\\.", "."), alpha))

    def _flag(self, name: str) -> bool:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{CONFIG_FILE}: {name} is {_short(value)}, not true or false")
        return bool(value)

    def scale(self, module: str, rank: int) -> float:
        """module: its name in the file. As in PEFT, the first pattern wins that is the name or ends it
        after a dot."""
        alpha = self._alpha
        for key, value in self._patterns:
            if module == key.removeprefix("^") or module.endswith(f".{key}"):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self._rslora else rank)


def _matrices(
    tensors: Mapping[str, TensorInfo], config: _Config, model: AdaptedModel, max_rank: int
) -> tuple[AdaptedMatrix, ...]:
    """Every tensor is of a matrix in the result, or the copy of an embedding that PEFT saves with it."""
    found: dict[str, dict[str, TensorInfo]] = {}
    modules: dict[str, str] = {}
    for name, info in tensors.items():
        match = KINDS.fullmatch(name)
        if match is None:
            raise UnsupportedModelError(
                f"{TENSOR_FILE} has {_short(name)}, which is not served: only lora_A, lora_B, "
                "lora_embedding_A, lora_embedding_B and lora_magnitude_vector are"
            )
        module = match[1].removeprefix(PEFT_PREFIX)
        inside = None if TOWERS.search(module) else MODULE.search(module)
        target = (
            module if inside is None else inside[1] if inside[1] == HEAD else f"model.{inside[1]}"
        )
        if modules.setdefault(target, module) != module:
            raise CheckpointError(
                f"{TENSOR_FILE} has {modules[target]} and {module}: which one is meant?"
            )
        found.setdefault(target, {})[match[match.lastindex or 0]] = info
    matrices = []
    for site, shape in enumerate(sites(model)):
        first = 0
        for part in shape.parts:
            group = found.pop(part.name, None) if part.name != HEAD or model.has_head else None
            if group is not None:
                matrix = _matrix(
                    part, shape.in_features, group, config, modules[part.name], max_rank
                )
                matrices.append(replace(matrix, site=site, first=first))
            first += part.out_features
    if found:
        names = sorted(info.name for group in found.values() for info in group.values())
        raise CheckpointError(
            f"{TENSOR_FILE} has {list_names(names)}, but the model has no such matrix: the adapter "
            "is for another model"
        )
    if not matrices:
        raise CheckpointError(f"{TENSOR_FILE} has no tensors of a LoRA adapter")
    if config.tied and any(matrix.name in (HEAD, EMBEDDING) for matrix in matrices):
        raise UnsupportedModelError(
            f"{CONFIG_FILE}: ensure_weight_tying with {HEAD} or embed_tokens is not served; "
            "merge the adapter into the base model instead"
        )
    return tuple(matrices)


def _matrix(
    part: LinearPart,
    inputs: int,
    group: dict[str, TensorInfo],
    config: _Config,
    module: str,
    max_rank: int,
) -> AdaptedMatrix:
    """site and first are set by the caller."""
    embeds, outputs = part.name == EMBEDDING, part.out_features
    base = group.pop("base_layer", None)
    if base is not None:
        whole = (inputs, outputs) if embeds else (outputs, inputs)
        if part.name not in (EMBEDDING, HEAD):
            raise CheckpointError(
                f"{TENSOR_FILE} has {base.name}: the base model's weights are not the adapter's"
            )
        _check_tensor(base, whole)
    names = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A", "lora_B")
    magnitude = group.pop("lora_magnitude_vector", None)
    if wrong := [info.name for kind, info in group.items() if kind not in names]:
        raise CheckpointError(
            f"{TENSOR_FILE} has {wrong[0]}, but {part.name} needs {' and '.join(names)}"
        )
    if missing := [kind for kind in names if kind not in group]:
        raise CheckpointError(
            f"{TENSOR_FILE} has no {missing[0]} for {module}; save the adapter again"
        )
    a, b = (group[kind] for kind in names)
    if len(a.shape) != 2 or a.shape[0] < 1:
        raise CheckpointError(
            f"{a.name} is {list(a.shape)}; need [rank, {inputs}], rank at least 1"
        )
    rank = a.shape[0]
    if rank > max_rank:
        raise UnsupportedModelError(
            f"{a.name} has rank {rank}, but the engine serves at most {max_rank}; set --max-lora-rank {rank}"
        )
    _check_tensor(a, (rank, inputs))
    _check_tensor(b, (outputs, rank))
    if magnitude is not None:
        if embeds:
            raise UnsupportedModelError(f"{magnitude.name}: DoRA of an embedding is not served")
        _check_tensor(magnitude, (outputs,))
    if config.dora != (magnitude is not None):
        raise CheckpointError(
            f"{CONFIG_FILE}: use_dora is {str(config.dora).lower()}, but {module} has "
            f"{'no' if magnitude is None else 'a'} lora_magnitude_vector"
        )
    return AdaptedMatrix(
        0, 0, part.name, inputs, outputs, rank, config.scale(module, rank), a, b, magnitude, base
    )


def _check_tensor(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.dtype not in FLOATS:
        raise CheckpointError(f"{info.name} is {info.dtype}; only {', '.join(FLOATS)} are read")
    if info.shape != shape:
        raise CheckpointError(
            f"{info.name} is {list(info.shape)}, but the model needs {list(shape)}"
        )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
        raise CheckpointError(f"{CONFIG_FILE}: {name} is {_short(value)}, not a finite number")
    return float(value)


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def sites(model: AdaptedModel) -> list[LinearShape]:
    """The products that an adapter may change, in the order in which a forward pass calls `Ops.linear`;
    then the head; then the embedding, as a product with the vocabulary as inputs. A site's number is its
    index."""
    layers = [shape for shape in model.linears() if shape.parts[0].name.startswith("model.layers.")]
    head = LinearShape(model.hidden_size, (LinearPart(HEAD, model.vocab_size),), bias=False)
    embedding = LinearShape(
        model.vocab_size, (LinearPart(EMBEDDING, model.hidden_size),), bias=False
    )
    return [*layers, head, embedding]


def matrix_bytes(inputs: int, outputs: int, rank: int, dtype_bytes: int, scaled: bool) -> int:
    """Bytes of A, B and g in memory. B's outputs are in panels, at most one more than needed."""
    columns = (-(-outputs // PANEL) + 1) * PANEL
    return rank * (inputs + columns) * dtype_bytes + (4 * columns if scaled else 0)


def largest_adapter_bytes(model: AdaptedModel, max_rank: int, dtype_bytes: int) -> int:
    """Memory of an adapter with `max_rank` for every matrix of the layers: for a ledger at start."""
    return sum(
        matrix_bytes(shape.in_features, len(part.outputs), max_rank, dtype_bytes, True)
        for shape in sites(model)[:-2]
        for part in shape.parts
    )
