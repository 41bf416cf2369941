"""The worker's table of LoRA adapters: loading them beside the steps, and finding them for a request.

An adapter is known by its key, NAME@HASH (`AdapterInfo.key`). A request that is admitted acquires its
adapter, which gives a slot: the index with which a step's arrays name it. On a GPU a slot is memory at a
fixed address, filled when a request needs it; on the CPU it is a pointer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from quire.errors import CheckpointError, QuireError, UnsupportedModelError
from quire.kernels.checks import KernelArgumentError
from quire.kernels.lora import Deltas, MatrixDelta, PackedAdapter, matrix_rows
from quire.models.decoder import DecoderModel
from quire.models.spec import ModelSpec
from quire.quantization.matrix import is_quantized
from quire.weights.adapter import HEAD, sites
from quire.weights.names import EMBEDDING
from quire.weights.peft import AdapterTensors, read_adapter

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 16
"""Of a base matrix. The kernels' threads stay with the steps: so few are looked up by one thread."""
CLOSE_SECONDS = 10.0
NICENESS = 10
"""Of the loading thread: beside steps that use every core, about a tenth of one."""


class LoadedAdapter(NamedTuple):
    """The end of one `load`."""

    key: str
    error: str | None
    """None: it is in the table. Else why it is not, for the request's client: names no path."""
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Entry:
    """An adapter that is loaded."""

    packed: PackedAdapter
    slot: int = -1
    """-1: none yet."""
    users: int = 0
    dropped: bool = False


@dataclass(slots=True)
class _Job:
    key: str
    path: Path
    result: PackedAdapter | str | None = None
    seconds: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)


class AdapterTable:
    """Used by one thread, the engine core's; loading is done in another, of low priority."""

    def __init__(self, model: DecoderModel, *, max_rank: int, slots: int) -> None:
        """slots: the most adapters that requests use at the same time (`max_loras`).

        Raises `UnsupportedModelError` if the model's products cannot have adapters on its device.
        """
        self._model = model
        self._max_rank = max_rank
        self._sites = own_sites(model.spec)
        self._rows = own_rows(model.spec)
        try:
            self._products = model.record().products
            self.packed = model.kernels.adapters(
                self._products,
                dtype=model.dtype,
                capacity=slots,
                max_rank=max_rank,
                parts=[[len(rows) for rows in site] for site in self._rows],
            )
        except KernelArgumentError as error:
            raise UnsupportedModelError(f"LoRA adapters are not served here: {error}") from None
        self._entries: dict[str, _Entry] = {}
        """The oldest use first."""
        self._slots: list[_Entry | None] = [None] * slots
        self._jobs: dict[str, _Job] = {}
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._news = threading.Event()

    @property
    def num_bytes(self) -> int:
        """Host memory of the adapters that are loaded."""
        return sum(entry.packed.num_bytes for entry in self._entries.values())

    def load(self, key: str, path: Path) -> None:
        """Begin to load, unless the key is loaded or loading. The directory is checked again: its content
        must be what the key's hash says."""
        if key in self._entries or key in self._jobs:
            return
        self._jobs[key] = job = _Job(key, path)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="adapters", daemon=True)
            self._thread.start()
        self._queue.put(job)

    def poll(self) -> Sequence[LoadedAdapter]:
        """What has ended since the last call, for better or worse. Does not wait."""
        if not self._jobs:
            return ()
        self._news.clear()
        ended = []
        for job in [job for job in self._jobs.values() if job.done.is_set()]:
            del self._jobs[job.key]
            if isinstance(job.result, str):
                ended.append(LoadedAdapter(job.key, job.result, seconds=job.seconds))
                continue
            assert job.result is not None
            self._entries[job.key] = _Entry(job.result)
            ended.append(LoadedAdapter(job.key, None, job.result.num_bytes, job.seconds))
        return ended

    def wait(self, seconds: float) -> None:
        """Wait until there is something to poll; at most `seconds`."""
        if self._jobs:
            self._news.wait(seconds)

    def close(self) -> None:
        """End the loading thread, after what it is loading. Else it would keep the model in memory, and abort
        the process if it is in torch when the interpreter exits."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def drop(self, key: str) -> None:
        """Free its memory: at once, or when the last request that uses it has released it. Unknown keys are
        ignored; one that is loading will not be polled."""
        self._jobs.pop(key, None)
        if (entry := self._entries.pop(key, None)) is not None:
            entry.dropped = True
            self._free(entry)

    def acquire(self, key: str | None) -> int:
        """The adapter's index for a request that is admitted (`StepRows.adapters`); -1 for None. It stays
        valid until the request's `release`. The key is loaded and not dropped, and a slot is free or its
        adapter is not in use: the engine holds requests back until then."""
        if key is None:
            return -1
        entry = self._entries.pop(key)
        self._entries[key] = entry  # the newest use is the last
        if entry.slot < 0:
            entry.slot = self._free_slot()
            self._slots[entry.slot] = entry
            self.packed.put(entry.slot, entry.packed)
        entry.users += 1
        return entry.slot

    def release(self, index: int) -> None:
        """The counterpart of `acquire`; -1 does nothing."""
        if index < 0:
            return
        entry = self._slots[index]
        assert entry is not None and entry.users > 0
        entry.users -= 1
        self._free(entry)

    def _free(self, entry: _Entry) -> None:
        if entry.dropped and entry.users == 0 and entry.slot >= 0:
            self.packed.clear(entry.slot)
            self._slots[entry.slot], entry.slot = None, -1

    def _free_slot(self) -> int:
        if None in self._slots:
            return self._slots.index(None)
        oldest = next(each for each in self._entries.values() if each.slot >= 0 and not each.users)
        slot, oldest.slot = oldest.slot, -1
        return slot

    # --- in the loading thread ------------------------------------------------------------------------

    def _work(self) -> None:
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while (job := self._queue.get()) is not None:
            started = time.monotonic()
            try:
                job.result = self._read(job.key, job.path)
            except QuireError as error:
                job.result = str(error)
            except Exception:
                logger.exception("loading an adapter failed")
                job.result = "it could not be loaded; the engine's log says why"
            job.seconds = time.monotonic() - started
            job.done.set()
            self._news.set()

    @torch.inference_mode()
    def _read(self, key: str, path: Path) -> PackedAdapter:
        model = self._model
        info, tensors = read_adapter(
            path, model.spec.whole, max_rank=self._max_rank, dtype=model.dtype
        )
        if info.content_hash != key.rpartition("@")[2]:
            raise CheckpointError(
                "the adapter's files have changed since it was registered; load it again"
            )
        deltas: dict[int, list[MatrixDelta]] = {}
        for each in tensors:
            if (site := self._sites.get(each.matrix.site)) is None:
                continue  # another stage's
            each = each._replace(matrix=replace(each.matrix, site=site))
            if each.base is not None:
                self._check_base(each)
            for own in self._own(each):
                deltas.setdefault(own.matrix.site, []).append(
                    MatrixDelta(own.matrix.first, own.a, own.b, own.matrix.scale, self._gains(own))
                )
        return self._pack(deltas)

    def _own(self, each: AdapterTensors) -> Iterator[AdapterTensors]:
        """What this rank computes of a matrix, where its product has it."""
        matrix, at = each.matrix, 0
        for rows in self._rows[matrix.site]:
            first = max(rows.start, matrix.first)
            count = min(rows.stop, matrix.first + matrix.outputs) - first
            if count > 0:
                cut = slice(first - matrix.first, first - matrix.first + count)
                yield each._replace(
                    matrix=replace(matrix, first=at + first - rows.start, outputs=count),
                    b=each.b[cut],
                    magnitude=None if each.magnitude is None else each.magnitude[cut],
                )
            at += len(rows)

    def _pack(self, deltas: Deltas) -> PackedAdapter:
        try:
            return self.packed.pack(deltas)
        except KernelArgumentError as error:
            raise UnsupportedModelError(str(error)) from None

    def _gains(self, each: AdapterTensors) -> Tensor | None:
        """m / ||W + s * B A|| of each output."""
        if each.magnitude is None:
            return None
        matrix, norms = each.matrix, torch.empty(each.matrix.outputs)
        device = self._model.kernels.device
        a = each.a.float()
        for first in range(0, matrix.outputs, ROWS_AT_ONCE):
            b = each.b[first : first + ROWS_AT_ONCE].float()
            weight = matrix_rows(self._products[matrix.site], matrix.first + first, len(b), device)
            rows = torch.addmm(weight.float().cpu(), b, a, alpha=matrix.scale)
            norms[first : first + len(b)] = torch.linalg.vector_norm(rows, dim=1)
        gains = each.magnitude / norms
        if not bool(torch.isfinite(gains).all()):
            raise CheckpointError(f"{matrix.name}: a row of the base weights and the delta is zero")
        return gains

    def _check_base(self, each: AdapterTensors) -> None:
        """The embedding or head that PEFT saves with an adapter is the model's own."""
        matrix, base, spec = each.matrix, each.base, self._model.spec
        assert base is not None
        device = self._model.kernels.device
        is_head = matrix.name != EMBEDDING
        name = HEAD if is_head and not spec.tie_word_embeddings else EMBEDDING
        if is_quantized(spec.quantization, name):
            return  # the file has what it was rounded from
        own = spec.share.columns(spec.vocab_size)
        base = base[own.start : own.stop]
        for first in range(0, len(own), ROWS_AT_ONCE):
            theirs = base[first : first + ROWS_AT_ONCE]
            if is_head:
                ours = matrix_rows(self._products[matrix.site], first, len(theirs), device)
            else:
                ids, embedded = (
                    torch.arange(first, first + len(theirs), device=device),
                    self._model.embedded,
                )
                ours = embedded[ids] if isinstance(embedded, Tensor) else embedded.rows(ids)
            if not torch.equal(theirs.to(ours.dtype), ours.cpu()):
                raise UnsupportedModelError(
                    f"{matrix.base.name if matrix.base else ''} differs from the model's: the adapter was "
                    "trained on another base, or changes the embedding; merge it into the base model instead"
                )


def own_sites(spec: ModelSpec) -> dict[int, int]:
    """By the number of a site in the whole model, its number in the rank's program: of the matrices with
    which the rank computes."""
    count, num_sites = len(sites(spec)) - 2, len(sites(spec.whole))
    before = replace(spec.whole, stage=range(spec.own_layers.start))
    first = len(sites(before)) - 2
    found = {first + site: site for site in range(count)}
    if spec.is_last:
        found[num_sites - 2] = count
    if spec.is_first:
        found[num_sites - 1] = count + spec.is_last
    return found


def own_rows(spec: ModelSpec) -> list[list[range]]:
    """Of each site's product the outputs that a rank has, counted in the whole product. An embedding's delta
    is added to whole rows, at every rank of the first stage. Only the last stage's program has a head."""
    found = []
    for shape in sites(spec):
        starts: dict[str, int] = {}
        total, rows = 0, []
        for part in shape.parts:
            start = starts.setdefault(part.name, total)
            total = max(total, start + part.out_features)
            rows.append(range(start + part.outputs.start, start + part.outputs.stop))
        found.append(rows)
    found[-2:-1] = [[spec.share.columns(spec.vocab_size)]] if spec.is_last else []
    return found
