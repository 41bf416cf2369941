"""The steps of a GPU: launched, not awaited.

The device keeps token ids, block tables and sampling parameters of each seat, so the host only sends what
changed. Sampled ids stay on the device too, where the next step reads them, so a step can be launched
while the one before it runs. The host only waits in `wait()`.

A whole step is one CUDA graph (`runner.graphs`): its launches depend only on the padded numbers of rows
and tokens. Work that only some requests need runs after it: edits of logits, logprobs. A request with
rules that only the host can apply is never planned before its last token is known
(`needs_token_before_next`), so the host has all its tokens, and makes its mask while the forward pass
runs. A step whose hidden states are read does not use a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.attention.base import AttentionMetadata, KVCache
from quire.kernels.triton.batch import DeviceBatch, append_tokens, build_step, copy_blocks
from quire.kernels.triton.compiles import SERVING, report_compiles
from quire.kernels.triton.packing import BatchShape, Section, StepPacker
from quire.kernels.triton.sampling import DeviceTokens
from quire.messages import AdmittedRequest, TokenLogprobs
from quire.models.decoder import DecoderModel
from quire.runner.backend import StepInput, StepSamples
from quire.runner.device import Device, Download
from quire.runner.gpu_sampling import FetchedLogprobs, GPUSampling
from quire.runner.graphs import Computed, Graphs, StepShape
from quire.runner.prompt_work import Score
from quire.runner.seats import Seats

_NONE = np.zeros(0, dtype=np.int64)
_ARRAYS = ("seats", "counts", "seq_lens", "num_blocks", "sampling", "positions")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _on_device(
    method: Callable[Concatenate[GPUBackend, Arguments], Result],
) -> Callable[Concatenate[GPUBackend, Arguments], Result]:
    """Run the method with the backend's device as the current one."""

    @wraps(method)
    def inside(backend: GPUBackend, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with backend.active(), torch.inference_mode():
            return method(backend, *args, **kwargs)

    return inside


class GPUBackend:
    """A `StepBackend`."""

    def __init__(
        self,
        model: DecoderModel,
        device: Device,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_size: int,
        eager: bool = False,
        logprobs_mode: str = "raw_logprobs",
    ) -> None:
        """max_model_len: the cache may be opened with a smaller one. eager: no CUDA graphs."""
        self._model = model
        self._device = device
        shape = BatchShape(
            max_seqs=max_num_seqs,
            max_tokens=max_num_batched_tokens,
            max_blocks=-(-max_model_len // block_size),
            num_groups=len(model.spec.kv.groups),
        )
        self._packer = StepPacker(shape, np.zeros(shape.packed_size, dtype=np.int32))
        self._batch = DeviceBatch.create(
            shape,
            max_model_len=max_model_len,
            block_size=block_size,
            device=device.torch_device,
        )
        self._sampling = GPUSampling(
            max_num_seqs, model.spec.vocab_size, device, logprobs_mode=logprobs_mode
        )
        self._blocks_sent = np.zeros(max_num_seqs, dtype=np.int64)
        """The number of each seat's blocks that were sent to the device."""
        self.graphs = Graphs(
            device,
            self._compute,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_weights=model.spec.num_parameters(),
            eager=eager,
        )

    def active(self) -> AbstractContextManager[object]:
        return self._device.active()

    def open_cache(self, kv_cache: KVCache, seats: Seats) -> None:
        self._seats = seats
        self._kv_cache = kv_cache
        if seats.step.adapters is not None:
            tokens = self._packer.shape.max_tokens
            self._slots = torch.full(
                (tokens,), -1, dtype=torch.int32, device=kv_cache.storage.device
            )
        self._blocks = kv_cache.storage.view(len(kv_cache.parts), 2, *kv_cache.parts[0].k.shape)
        if self._device.compiles:
            self.compile_all()

    @property
    def score(self) -> Score:
        return self._sampling.score

    # --- requests -------------------------------------------------------------------------------------

    @_on_device
    def admit(self, seat: int, request: AdmittedRequest) -> None:
        self._blocks_sent[seat] = 0
        self._sampling.admit(seat, request)

    def release(self, seat: int) -> None:
        self._sampling.release(seat)

    @_on_device
    def append(self, seat: int, token_ids: Sequence[int]) -> None:
        """The tokens are sent with the next step; here only the penalties' counts are updated."""
        seats = self._seats
        known = seats.token_ids[seat, : seats.num_brought[seat]]
        self._sampling.recount(seat, known, int(seats.num_prompt_tokens[seat]))

    @_on_device
    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        ids = torch.empty(2, len(pairs), dtype=torch.int64, device=self._blocks.device)
        self._device.upload(ids, torch.tensor(pairs).T.contiguous())
        copy_blocks(self._blocks, ids[0], ids[1])

    # --- a step ---------------------------------------------------------------------------------------

    @_on_device
    def launch(self, step: StepInput) -> LaunchedGPUStep:
        before = SERVING.set(True)
        try:
            return self._launch(step)
        finally:
            SERVING.reset(before)

    def _launch(self, step: StepInput) -> LaunchedGPUStep:
        rows, count = step.rows.rows[: step.rows.num_rows], len(step.positions)
        counts = rows[:, 2]
        self._send(step, rows)
        if step.rows.has_adapters:
            self._send_slots(rows)
        self._sampling.upload()
        wants = self._sampling.wants(step.sample_seats, step.positions)
        inside = not (wants.outside_graph or step.read_rows)
        shape = StepShape(
            rows=len(rows),
            tokens=int(counts.sum()),
            samples=count,
            most_tokens=int(counts.max()),
            level=wants.level if inside else None,
            adapted=step.rows.has_adapters,
            least_tokens=int(counts.min()),
        )
        hidden: list[Tensor] = []
        if step.read_rows:
            every = self._forward(shape)
            ends = np.cumsum(counts)
            hidden = [every[ends[row] - counts[row] : ends[row]] for row in step.read_rows]
            states = self._sampled_rows(shape, every)
        else:
            computed = self.graphs.compute(shape)
            if inside:
                return self._fetch(computed.tokens, count)
            states = computed.hidden
        if not count:
            return self._fetch(None, 0, hidden=hidden)
        logits = edited = self._model.logits(states)
        masks = self._sampling.send(step.masks(), padded=len(logits))
        seats, positions = self._sample_sections(len(logits))
        if wants.edit:
            edited = self._sampling.edit(logits, seats, positions, masks)
        tokens = self._sampling.sample(edited, seats, positions, wants.level)
        append_tokens(self._batch, tokens.token_ids)
        logprobs = self._sampling.logprobs(wants.logprobs, logits, edited, seats, tokens.token_ids)
        return self._fetch(tokens, count, logprobs, hidden)

    def _send(self, step: StepInput, rows: NDArray[np.int64]) -> None:
        """Send what the device does not have: ids that it did not sample, new blocks, the rows that
        sample."""
        seats, starts, counts, _ = rows.T
        of = self._seats
        num_blocks, sent = of.num_blocks[seats], self._blocks_sent[seats]
        self._blocks_sent[seats] = num_blocks
        new_ids = [
            (row, of.token_ids[seats[row], starts[row] : starts[row] + counts[row]])
            for row in np.flatnonzero(starts < of.num_brought[seats]).tolist()
        ]
        new_blocks = [
            (row, of.block_ids[:, seats[row], sent[row] : num_blocks[row]].reshape(-1))
            for row in np.flatnonzero(sent < num_blocks).tolist()
        ]
        size = self._packer.pack(
            seats=seats,
            counts=counts,
            seq_lens=starts + counts,
            num_blocks=num_blocks,
            sampling=step.sample_rows,
            positions=step.positions,
            new_ids=new_ids,
            new_blocks=new_blocks,
        )
        self._upload(size)

    def _send_slots(self, rows: NDArray[np.int64]) -> None:
        """Send the adapter of each token, -1 for padding."""
        adapters = self._seats.step.adapters
        assert adapters is not None
        slots = np.full(len(self._slots), -1, dtype=np.int32)
        of_tokens = np.repeat(adapters[rows[:, 0]], rows[:, 2])
        slots[: len(of_tokens)] = of_tokens
        self._device.upload(self._slots, torch.from_numpy(slots))

    def _upload(self, size: int) -> None:
        packed = torch.from_numpy(self._packer.buffer[:size])
        self._device.upload(self._batch.packed[:size], packed)

    @_on_device
    def prepare(self) -> bool:
        shape = self.graphs.next()
        if shape is None:
            return False
        self._send_padding()
        return self.graphs.prepare(shape)

    def _send_padding(self) -> None:
        """The input of a step without rows."""
        none: dict[str, NDArray[np.int64]] = dict.fromkeys(_ARRAYS, _NONE)
        self._upload(self._packer.pack(**none, new_ids=[], new_blocks=[]))

    @_on_device
    def compile_all(self) -> None:
        """Launch every kernel in every variant that a step can need, over padding, while there is no request.
        Later a compilation would stop all requests for a second."""
        self._send_padding()
        most = self._packer.shape
        for adapted in (False, True)[: 1 + (self._seats.step.adapters is not None)]:
            # As many rows and tokens as there may be: quantized products choose their kernels by them.
            self._compute(
                StepShape(
                    most.max_seqs, most.max_tokens, most.max_seqs, most.max_tokens, None, adapted
                )
            )
            hidden = self._compute(StepShape(1, 1, 1, 1, None, adapted)).hidden
        self._model.logits(hidden.expand(most.max_seqs, -1).contiguous())
        seats, positions = self._sample_sections(1)
        self._sampling.compile_all(self._model.logits(hidden), seats, positions)
        append_tokens(self._batch, seats.long())
        nothing = torch.full((2, 1), -1, dtype=torch.int64, device=self._blocks.device)
        copy_blocks(self._blocks, nothing[0], nothing[1])
        report_compiles()

    # --- on the device --------------------------------------------------------------------------------

    def _compute(self, shape: StepShape) -> Computed:
        hidden = self._sampled_rows(shape, self._forward(shape))
        tokens = None
        if shape.level is not None and shape.samples:
            seats, positions = self._sample_sections(shape.samples)
            logits = self._model.logits(hidden)
            tokens = self._sampling.sample(logits, seats, positions, shape.level)
            append_tokens(self._batch, tokens.token_ids)
        return Computed(hidden, tokens)

    def _forward(self, shape: StepShape) -> Tensor:
        """[tokens, hidden_size]"""
        rows, tokens, batch = shape.rows, shape.tokens, self._batch
        build_step(batch, num_rows=rows, num_tokens=tokens)
        metadata = [
            AttentionMetadata(
                positions=batch.positions[:tokens],
                slot_mapping=slots[:tokens],
                query_start_loc=batch.section(Section.QUERY_START_LOC)[: rows + 1],
                seq_lens=batch.section(Section.SEQ_LENS)[:rows],
                block_table=blocks[:rows],
                max_query_len=shape.most_tokens,
                min_query_len=shape.least_tokens,
            )
            for slots, blocks in zip(batch.slot_mapping, batch.block_table, strict=True)
        ]
        adapters = None
        if shape.adapted:
            of = self._seats.step.adapter_set
            assert of is not None
            adapters = of.rows(self._slots[:tokens])
        return self._model.compute(
            batch.input_ids[:tokens], metadata, self._kv_cache, adapters=adapters
        )

    def _sampled_rows(self, shape: StepShape, hidden: Tensor) -> Tensor:
        """[samples, hidden_size]: the sampled rows of the hidden states."""
        if shape.samples == shape.tokens and shape.most_tokens == 1:
            return hidden
        return hidden.index_select(0, self._batch.section(Section.LOGIT_ROWS)[: shape.samples])

    def _sample_sections(self, count: int) -> tuple[Tensor, Tensor]:
        """Seats and positions of the samples."""
        batch = self._batch
        return (
            batch.section(Section.SAMPLE_SEATS)[:count],
            batch.section(Section.SAMPLE_POSITIONS)[:count],
        )

    # --- results --------------------------------------------------------------------------------------

    def _fetch(
        self,
        tokens: DeviceTokens | None,
        count: int,
        logprobs: FetchedLogprobs | None = None,
        hidden: Sequence[Tensor] = (),
    ) -> LaunchedGPUStep:
        """Start to copy the results to the host, while the next steps run. All tensors that are copied
        are therefore new ones, and none belongs to a CUDA graph: its next launch would overwrite it."""
        back = []
        if tokens is not None and count:
            # The token plus 1, or 0 if the logits contain NaN: one new tensor to copy instead of two.
            back.append(tokens.token_ids[:count] + tokens.valid[:count])
        if logprobs is not None:
            back += logprobs.tensors
        return LaunchedGPUStep(self._device.download(back), count, logprobs, hidden)


@dataclass(frozen=True, slots=True)
class LaunchedGPUStep:
    """A `LaunchedSamples`."""

    download: Download
    count: int
    logprobs: FetchedLogprobs | None
    hidden: Sequence[Tensor]

    def wait(self) -> StepSamples:
        back = self.download.wait()
        if not self.count:
            return StepSamples.none(self.hidden)
        one_more = back[0].numpy()
        token_ids, valid = one_more - 1, one_more > 0
        logprobs: Mapping[int, TokenLogprobs] = {}
        if self.logprobs is not None:
            logprobs = self.logprobs.entries(back[1:], token_ids, valid)
        return StepSamples(token_ids, valid, logprobs, self.hidden)
