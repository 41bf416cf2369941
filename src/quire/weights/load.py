"""Loads a checkpoint into the tensors' targets: everything is checked first, then read and packed by several
threads.

The whole checkpoint is compared with what the model wants (names, shapes, dtypes) from the files' headers, in
milliseconds, before any data is read: a wrong shard is reported at once and not after minutes of loading.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch

from quire.dtypes import FLOATS
from quire.errors import CheckpointError
from quire.layers.parameter import WeightTarget
from quire.weights.names import list_names, map_names
from quire.weights.pieces import load_pieces, wanted_bytes
from quire.weights.progress import LoadProgress
from quire.weights.source import Checkpoint, TensorInfo

logger = logging.getLogger(__name__)

DUMMY_STD = 0.02
TIED_SAMPLE_BYTES = 1 << 20


def load_weights(
    targets: Iterable[WeightTarget],
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    tied: Mapping[str, str] = MappingProxyType({}),
    selected: Mapping[str, TensorInfo] | None = None,
) -> None:
    """Stream every wanted tensor to its targets, in pieces of rows, with as many threads as PyTorch has.

    Names are the model's; `map_names` finds them in the file. `tied` maps a wanted name to another under
    which the file may hold the same matrix (the output head of a tied model): it is read if the first is
    absent, and unused otherwise. selected: those of the checkpoint's tensors that count, maybe renamed; None
    for all. If `dtype`, the model's, is not that of most floats in the files, the
    targets convert; then one thread loads, because PyTorch converts with all of its own threads.

    Raises:
        CheckpointError: naming the tensor that is missing, unexpected, or of the wrong shape or dtype, or the
            file that cannot be read or was written to while it was read.
    """
    wanted = _by_name(targets)
    tensors = map_names(selected or checkpoint.tensors, {*wanted, *tied.values()})
    for name, other in tied.items():
        _tie(checkpoint, tensors, name, other)
    _drop_zero_biases(checkpoint, tensors, wanted)
    _check(wanted, tensors)
    needed = [(tensors[name], targets) for name, targets in wanted.items()]
    sizes = [wanted_bytes(*each) for each in needed]
    total = sum(sizes)
    others = set(FLOATS) - {str(dtype).removeprefix("torch.")}
    converted = sum(
        size for size, (info, _) in zip(sizes, needed, strict=True) if info.dtype in others
    )
    with LoadProgress(total) as progress:
        load_pieces(
            needed,
            checkpoint,
            threads=torch.get_num_threads() if 2 * converted <= total else 1,
            progress=progress.add,
        )
    checkpoint.check_unchanged()


def load_random_weights(targets: Iterable[WeightTarget], *, dtype: torch.dtype, seed: int) -> None:
    """Random weights at the model's shape, for measuring without a checkpoint.

    Each tensor's values depend only on the seed and its name, not on the model's other tensors.
    """
    for same in _by_name(targets).values():
        tensor = _random(same[0], dtype=dtype, seed=seed)
        for target in same:
            target.give(0, tensor)


def _random(target: WeightTarget, *, dtype: torch.dtype, seed: int) -> torch.Tensor:
    if target.kind == "norm":
        return torch.ones(target.shape, dtype=dtype)
    if target.kind == "bias":
        return torch.zeros(target.shape, dtype=dtype)
    digest = hashlib.sha256(f"{seed}:{target.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    stored = dtype if target.dtypes == FLOATS else getattr(torch, target.dtypes[0], None)
    if stored is None:  # bytes of a format's own, which may hold scales: random ones might be NaN
        return torch.zeros(target.shape, dtype=torch.uint8)
    if not stored.is_floating_point:
        # A byte may be an exponent: half of them are too large.
        largest = 127 if stored is torch.uint8 else torch.iinfo(stored).max
        return torch.randint(largest, target.shape, dtype=stored, generator=generator)
    values = torch.empty(target.shape, dtype=dtype).normal_(0.0, DUMMY_STD, generator=generator)
    return values.to(stored)


def _by_name(targets: Iterable[WeightTarget]) -> Mapping[str, list[WeightTarget]]:
    """The targets of each tensor, in the model's order."""
    wanted: dict[str, list[WeightTarget]] = {}
    for target in targets:
        wanted.setdefault(target.name, []).append(target)
    return wanted


def _tie(checkpoint: Checkpoint, tensors: dict[str, TensorInfo], name: str, other: str) -> None:
    """Keep one of two names of the same matrix. If their values differ, the first is used, as in vLLM and
    transformers 4; transformers 5 would not tie them."""
    first, second = tensors.get(name), tensors.get(other)
    if second is None:
        return
    if first is None:
        tensors[name] = second
    elif (first.dtype, first.shape) == (second.dtype, second.shape):
        size = min(first.num_bytes, TIED_SAMPLE_BYTES)
        samples = bytearray(size), bytearray(size)
        for info, sample in zip((first, second), samples, strict=True):
            checkpoint.read(info, 0, memoryview(sample))
        if samples[0] != samples[1]:
            logger.warning(
                "config.json ties the embeddings, but %s and %s differ in the checkpoint; %s is not used. "
                "If it should be, set --hf-overrides '{\"tie_word_embeddings\": false}'",
                first.name, second.name, second.name,
            )  # fmt: skip
    del tensors[other]


def _drop_zero_biases(
    checkpoint: Checkpoint, tensors: dict[str, TensorInfo], wanted: Mapping[str, object]
) -> None:
    """Some tools (AutoGPTQ) write a bias for every matrix."""
    modules = {name.rpartition(".")[0] for name in wanted}
    for name, info in list(tensors.items()):
        module, _, suffix = name.rpartition(".")
        if suffix == "bias" and name not in wanted and module in modules:
            data = bytearray(info.num_bytes)
            checkpoint.read(info, 0, memoryview(data))
            if not any(data):
                del tensors[name]


def _check(wanted: Mapping[str, list[WeightTarget]], tensors: Mapping[str, TensorInfo]) -> None:
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {list_names(missing)}; it is incomplete or not for this config.json: "
            + _remedy(missing, tensors)
        )
    for name, info in tensors.items():
        if name not in wanted:
            continue
        target = wanted[name][0]
        if info.shape != target.shape:
            raise CheckpointError(
                f"tensor {info.name} in {info.file} has shape {list(info.shape)}, but config.json makes it "
                f"{list(target.shape)}; the weights and the config are of different models"
            )
        if info.dtype not in target.dtypes:
            raise CheckpointError(
                f"tensor {info.name} in {info.file} has dtype {info.dtype}, but config.json makes it "
                f"{' or '.join(target.dtypes)}; use an unquantized checkpoint, or one that is quantized "
                "as its config says"
            )
    unexpected = [name for name in tensors if name not in wanted]
    if unexpected:
        raise CheckpointError(
            f"the checkpoint has {list_names(unexpected)}, which this architecture does not use; "
            "it holds another kind of model (an adapter, a quantized or extended one)"
        )


def _remedy(missing: Sequence[str], tensors: Mapping[str, TensorInfo]) -> str:
    if list(missing) == ["lm_head.weight"]:
        return (
            "download it again, or, if its output layer is the embedding, set "
            "--hf-overrides '{\"tie_word_embeddings\": true}'"
        )
    others = [info.name for info in tensors.values()]
    if len(missing) > len(others) or not others:
        return "download it again"
    return f"download it again (what it holds is named like {others[0]})"
