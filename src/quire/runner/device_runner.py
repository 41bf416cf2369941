"""Carries out plans on an accelerator: launches a step and returns at once.

Everything a step needs that the host does not send is already there: token ids, block tables, how a seat is
sampled. The sampled ids stay on the device too, where the next step finds them, so that a plan can be
launched while the one before it runs (`max_in_flight` 2). The host only waits in `result()`.

Steps in which every row computes one token and samples (decoding) are padded to one of a few sizes
and, from the third of a size on, replayed from a recording (a CUDA graph): one launch instead of some
three hundred. Everything else is launched kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import AttentionMetadata, KVCache
from quire.kernels.triton.backend import TritonKernels
from quire.kernels.triton.batch import DeviceBatch, append_tokens, build_step, copy_blocks
from quire.kernels.triton.logprobs import MAX_LOGPROBS
from quire.kernels.triton.packing import BatchShape, Section, StepPacker
from quire.kernels.triton.sampling import DeviceTokens
from quire.messages import (
    AdmittedRequest,
    PlannedRow,
    SampledRow,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from quire.models.decoder import DecoderModel
from quire.runner.device import Device, Event
from quire.runner.device_sampling import HARDNESS, DeviceSampling, Hardest, SeatSampling
from quire.runner.model_runner import NAN_ERROR
from quire.sampling.sampler import top_logprobs

_USES_BEFORE_RECORDING = 2
MOST_GRAPH_ROWS = 256


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of rows that decoding steps are padded to."""
    most = min(max_num_seqs, MOST_GRAPH_ROWS)
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 257, 16)]
    return sorted({size for size in sizes if size < most} | {most})


@dataclass(slots=True)
class _Seat:
    index: int
    token_ids: list[int]
    """Those it was admitted with; later ones are on the device."""
    sampling: SeatSampling
    num_blocks: int
    unsent_blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Step:
    """What the host decided of a step."""

    num_rows: int
    num_tokens: int
    most_tokens: int
    """Of a row."""
    sampling: list[PlannedRow]
    seats: list[_Seat]
    """Of the rows that sample."""
    hardest: Hardest
    edit: bool
    most_logprobs: int | None
    """The largest number that any row wants; None if none wants any."""

    @property
    def decodes(self) -> bool:
        return self.most_tokens == 1 and len(self.sampling) == self.num_rows


class DeviceRunner:
    """A model, its KV cache and the requests admitted to it, on one device."""

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: KVCache,
        kernels: TritonKernels,
        device: Device,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eager: bool = False,
    ) -> None:
        """eager: never record."""
        self.model = model
        self.kv_cache = kv_cache
        self._device = device
        spec = model.spec
        sizes = [] if eager else graph_sizes(max_num_seqs)
        shape = BatchShape(
            max_seqs=max_num_seqs,
            max_tokens=max_num_batched_tokens,
            max_blocks=-(-max_model_len // kv_cache.block_size),
        )
        self._packer = StepPacker(shape, np.zeros(shape.packed_size, dtype=np.int32))
        self._batch = DeviceBatch.create(
            shape,
            max_model_len=max_model_len,
            block_size=kv_cache.block_size,
            device=device.torch_device,
        )
        self._sampling = DeviceSampling(max_num_seqs, spec.vocab_size, device)
        kernels.reserve(
            kv_cache.layers[0].k,
            q_heads=spec.num_heads,
            max_requests=max_num_seqs,
            max_len=max_model_len,
            windows={window or 0 for window in spec.sliding_windows},
        )
        self._blocks = kv_cache.storage.view(len(kv_cache.layers), 2, *kv_cache.layers[0].k.shape)
        self._seats: dict[int, _Seat] = {}
        self._free_seats = list(range(max_num_seqs - 1, -1, -1))
        self._sizes = sizes
        self._uses: dict[tuple[int, Hardest | None], int] = {}
        self._recorded: dict[
            tuple[int, Hardest | None], Callable[[], tuple[Tensor, DeviceTokens | None]]
        ] = {}

    # --- a plan ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Apply the plan: forget, admit, copy, compute, sample."""
        for request_id in plan.released:
            self._free_seats.append(self._seats.pop(request_id).index)
        for request in plan.admitted:
            self._admit(request)
        self._copy(plan.copies)
        if not plan.rows:
            return LaunchedStep(plan.step_id, [], None, None)
        step = self._send(plan.rows)
        logits, tokens = self._run(step)
        return self._fetch(plan, step, logits, tokens)

    def _admit(self, request: AdmittedRequest) -> None:
        index = self._free_seats.pop()
        self._seats[request.request_id] = _Seat(
            index=index,
            token_ids=request.token_ids,
            sampling=self._sampling.admit(index, request),
            num_blocks=len(request.block_ids),
            unsent_blocks=list(request.block_ids),
        )

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy-on-write, in order: a block just copied to may be copied from, in a later launch."""
        ready: list[tuple[int, int]] = []
        touched: set[int] = set()
        for source, destination in (*copies, (-1, -1)):
            if ready and (source < 0 or source in touched or destination in touched):
                pairs = torch.empty(2, len(ready), dtype=torch.int64, device=self._blocks.device)
                self._device.upload(pairs, torch.tensor(ready).T.contiguous())
                copy_blocks(self._blocks, pairs[0], pairs[1])
                ready, touched = [], set()
            ready.append((source, destination))
            touched.update((source, destination))

    def _send(self, rows: Sequence[PlannedRow]) -> _Step:
        """Pack the rows and copy them to the device."""
        seats = [self._seats[row.request_id] for row in rows]
        new_ids: list[tuple[int, list[int]]] = []
        new_blocks: list[tuple[int, list[int]]] = []
        for index, (row, seat) in enumerate(zip(rows, seats, strict=True)):
            if row.new_block_ids:
                seat.num_blocks += len(row.new_block_ids)
                seat.unsent_blocks += row.new_block_ids
            if seat.unsent_blocks:
                new_blocks.append((index, seat.unsent_blocks))
                seat.unsent_blocks = []
            if row.start < len(seat.token_ids):
                new_ids.append((index, seat.token_ids[row.start : row.start + row.num_tokens]))
        starts = np.array([row.start for row in rows])
        counts = np.array([row.num_tokens for row in rows])
        sampling = np.array([i for i, row in enumerate(rows) if row.samples], dtype=np.int64)
        size = self._packer.pack(
            seats=np.array([seat.index for seat in seats]),
            counts=counts,
            seq_lens=starts + counts,
            num_blocks=np.array([seat.num_blocks for seat in seats]),
            sampling=sampling,
            new_ids=new_ids,
            new_blocks=new_blocks,
        )
        packed = torch.from_numpy(self._packer.buffer[:size])
        self._device.upload(self._batch.packed[:size], packed)
        self._sampling.upload()
        picked = [(rows[i], seats[i]) for i in sampling.tolist()]
        wanted = [
            seat.sampling.num_logprobs
            for _, seat in picked
            if seat.sampling.num_logprobs is not None
        ]
        return _Step(
            num_rows=len(rows),
            num_tokens=int(counts.sum()),
            most_tokens=int(counts.max()),
            sampling=[row for row, _ in picked],
            seats=[seat for _, seat in picked],
            hardest=HARDNESS[max((seat.sampling.hardness for _, seat in picked), default=0)],
            edit=any(seat.sampling.edits(row.start + row.num_tokens) for row, seat in picked),
            most_logprobs=max(wanted, default=None),
        )

    # --- on the device --------------------------------------------------------------------------------

    def _run(self, step: _Step) -> tuple[Tensor, DeviceTokens | None]:
        """Logits of the rows that sample, and their tokens, padding included."""
        size = next((size for size in self._sizes if size >= step.num_rows), None)
        if not step.decodes or size is None:
            logits = self._forward(
                step.num_rows, step.num_tokens, len(step.sampling), step.most_tokens
            )
            return logits, self._sample(logits, step.hardest, edit=step.edit)
        key = (size, None if step.edit else step.hardest)
        logits, tokens = self._recording(key)()
        if tokens is None:
            tokens = self._sample(logits, step.hardest, edit=True)
        return logits, tokens

    def _recording(
        self, key: tuple[int, Hardest | None]
    ) -> Callable[[], tuple[Tensor, DeviceTokens | None]]:
        found = self._recorded.get(key)
        if found is None:
            found = partial(self._decode, *key)
            uses = self._uses[key] = self._uses.get(key, 0) + 1
            if uses > _USES_BEFORE_RECORDING:
                found = self._recorded[key] = self._device.record(found)
        return found

    def _decode(self, size: int, hardest: Hardest | None) -> tuple[Tensor, DeviceTokens | None]:
        """A decoding step of `size` rows; with None, the caller samples."""
        logits = self._forward(size, size, size, 1)
        return logits, None if hardest is None else self._sample(logits, hardest, edit=False)

    def _forward(self, rows: int, tokens: int, samples: int, most_tokens: int) -> Tensor:
        """[samples, vocab_size]"""
        batch = self._batch
        build_step(batch, num_rows=rows, num_tokens=tokens)
        positions = batch.positions[:tokens]
        metadata = AttentionMetadata(
            positions=positions,
            slot_mapping=batch.slot_mapping[:tokens],
            query_start_loc=batch.section(Section.QUERY_START_LOC)[: rows + 1],
            seq_lens=batch.section(Section.SEQ_LENS)[:rows],
            block_table=batch.block_table[:rows],
            max_query_len=most_tokens,
        )
        hidden = self.model.forward(batch.input_ids[:tokens], positions, metadata, self.kv_cache)
        if samples < tokens or most_tokens > 1:
            hidden = hidden.index_select(0, batch.section(Section.LOGIT_ROWS)[:samples])
        return self.model.logits(hidden)

    def _sample(self, logits: Tensor, hardest: Hardest, *, edit: bool) -> DeviceTokens | None:
        count = logits.shape[0]
        if count == 0:
            return None
        tokens = self._sampling.sample(
            logits,
            self._batch.section(Section.SAMPLE_SEATS)[:count],
            self._batch.section(Section.SAMPLE_POSITIONS)[:count].long(),
            hardest=hardest,
            edit=edit,
        )
        append_tokens(self._batch, tokens.token_ids)
        return tokens

    # --- back -----------------------------------------------------------------------------------------

    def _fetch(
        self, plan: StepPlan, step: _Step, logits: Tensor, tokens: DeviceTokens | None
    ) -> LaunchedStep:
        count, download = len(step.sampling), self._device.download
        if tokens is None or not count:
            return LaunchedStep(plan.step_id, [], None, self._device.event())
        fetched = _Fetched(
            token_ids=download(tokens.token_ids[:count]), valid=download(tokens.valid[:count])
        )
        if step.most_logprobs is not None:
            asking = [
                i for i, seat in enumerate(step.seats) if seat.sampling.num_logprobs is not None
            ]
            wanted = [step.seats[i].sampling.num_logprobs or 0 for i in asking]
            few = [i for i, k in zip(asking, wanted, strict=True) if 0 <= k <= MAX_LOGPROBS]
            if few:
                top = self._sampling.logprobs(
                    logits, few, tokens.token_ids, min(max(wanted), logits.shape[1])
                )
                fetched.logprobs = (
                    download(top.logprob),
                    download(top.rank),
                    download(top.top_ids),
                    download(top.top_logprobs),
                )
            for i, k in zip(asking, wanted, strict=True):
                fetched.asked[i] = k
                if i in few:
                    fetched.place[i] = few.index(i)
                else:  # more than the kernel keeps: the host sorts
                    fetched.logits[i] = download(logits[i])
        requests = [row.request_id for row in step.sampling]
        return LaunchedStep(plan.step_id, requests, fetched, self._device.event())


@dataclass(slots=True)
class _Fetched:
    """On the host, good once the step's event has happened."""

    token_ids: Tensor
    valid: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    """As `DeviceLogprobs`."""
    asked: dict[int, int] = field(default_factory=dict)
    """By row, how many top ones."""
    place: dict[int, int] = field(default_factory=dict)
    """By row, its place in `logprobs`."""
    logits: dict[int, Tensor] = field(default_factory=dict)

    def entry(self, row: int, token: int) -> TokenLogprobs | None:
        if row in self.place and self.logprobs is not None:
            at, k = self.place[row], self.asked[row]
            logprob, rank, ids, values = (tensor[at] for tensor in self.logprobs)
            return TokenLogprobs(
                token_id=token,
                logprob=float(logprob),
                rank=int(rank),
                top_ids=ids[:k].tolist(),
                top_logprobs=values[:k].tolist(),
            )
        if row in self.logits:
            return top_logprobs(
                torch.log_softmax(self.logits[row].float(), dim=-1), token, self.asked[row]
            )
        return None


class LaunchedStep:
    """A `StepFuture`."""

    def __init__(
        self, step_id: int, requests: list[int], fetched: _Fetched | None, event: Event | None
    ) -> None:
        self._step_id = step_id
        self._requests = requests
        self._fetched = fetched
        self._event = event

    def result(self) -> StepResult:
        if self._event is not None:
            self._event.wait()
        result = StepResult(step_id=self._step_id)
        fetched = self._fetched
        if fetched is None:
            return result
        tokens = fetched.token_ids.tolist()
        for index, (request_id, token, valid) in enumerate(
            zip(self._requests, tokens, fetched.valid.tolist(), strict=True)
        ):
            row = SampledRow(request_id=request_id, token_ids=[token])
            if not valid:
                row.token_ids, row.error = [], NAN_ERROR
            elif (entry := fetched.entry(index, token)) is not None:
                row.logprobs = [entry]
            result.sampled.append(row)
        return result
