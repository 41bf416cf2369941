"""Carries out plans on an accelerator: launches a step and returns at once.

Everything a step needs that the host does not send is already there: token ids, block tables, how a seat is
sampled. The sampled ids stay on the device too, where the next step finds them, so that a plan can be
launched while the one before it runs (`max_in_flight` 2). The host only waits in `result()`.

A step is padded to one of a few shapes, which are recorded (as CUDA graphs): one launch instead of some
three hundred. That is for steps in which every row computes one token and samples (decoding), and
for short mixed ones, where launching takes longer than computing. A whole step is one recording: what
attention's launches depend on is its padded numbers of rows and tokens, nothing else. Shapes are recorded
when the engine is idle (`prepare`), or when one comes for the third time. The rest is launched kernel
by kernel.

What only some requests want runs behind the recording: edits of logits, logprobs. A request with rules that
the host alone can follow (`RequestRules`) is never planned before its last token is known
(`needs_token_before_next`), so its seat has all its tokens on the host, and its mask is made while the
forward pass runs. A step that has to tell of prompts (`PromptWork`) is not recorded; what it tells is
computed when the result is fetched, behind the step launched meanwhile.

Padding is without effect: its tokens have slot -1, so no keys are written; its rows have no tokens; what is
sampled for it has seat -1 and goes nowhere. So recordings can be tried out on no rows at all.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quire.attention.base import AttentionMetadata, KVCache
from quire.kernels.triton.backend import TritonKernels
from quire.kernels.triton.batch import DeviceBatch, append_tokens, build_step, copy_blocks
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
from quire.runner.device import CannotRecordError, Device, Download
from quire.runner.device_sampling import HARDNESS, DeviceSampling, Hardest, RowMasks, SeatSampling
from quire.runner.prompt_work import PromptWork
from quire.sampling.sampler import NAN_ERROR, GrammarSource, top_logprobs

logger = logging.getLogger(__name__)

_USES_BEFORE_RECORDING = 2
MOST_GRAPH_ROWS = 256
GRAPH_TOKENS = (64, 128, 256, 512)
"""Tokens that mixed steps are padded to. Fewer than 64 take no less time: their products are bound by
reading the weights."""
LAUNCH_BOUND = 1 << 40
"""Weights times tokens up to which launching a step kernel by kernel takes about as long as computing it
(2 to 3 ms, at 800 TFLOP/s): the longest mixed steps worth recording. 512 tokens of a model of 0.6B, 128 of
8B, none of 70B."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of rows that decoding steps are padded to."""
    return _up_to([1, 2, 4, *range(8, 64, 8), *range(64, 257, 16)], max_num_seqs)


def mixed_rows(max_num_seqs: int) -> list[int]:
    """Numbers of rows that mixed steps are padded to. Few, for an empty row costs little."""
    return _up_to([4, 16, 64, MOST_GRAPH_ROWS], max_num_seqs)


def mixed_tokens(num_weights: int, max_num_batched_tokens: int) -> list[int]:
    """Numbers of tokens that mixed steps are padded to."""
    sizes = [size for size in GRAPH_TOKENS if size * num_weights <= LAUNCH_BOUND]
    return _up_to(sizes, max_num_batched_tokens) if sizes else []


def _up_to(sizes: list[int], most: int) -> list[int]:
    """The sizes below `most`, and that if any is left out."""
    most = min(most, sizes[-1])
    return [size for size in sizes if size < most] + [most]


def _least(sizes: list[int], number: int) -> int | None:
    """The least of the sizes that holds so many."""
    index = bisect_left(sizes, number)
    return sizes[index] if index < len(sizes) else None


@dataclass(slots=True)
class _Seat:
    index: int
    token_ids: list[int]
    """Those it was admitted with; later ones are on the device, and here only if it has rules."""
    num_prompt_tokens: int
    max_model_len: int
    sampling: SeatSampling
    prompt: PromptWork | None
    num_blocks: int
    unsent_blocks: list[int] = field(default_factory=list)
    has_forced: bool = False
    """Whether the device has not counted its last tokens, since it did not sample them."""

    def learn(self, token: int) -> list[int]:
        """A token was sampled, by the rules. Returns it, and those that can only follow it."""
        rules = self.sampling.rules
        assert rules is not None
        rules.learn(token)
        forced = rules.forced(self.max_model_len - 1 - len(self.token_ids))
        self.has_forced = self.has_forced or bool(forced)
        self.token_ids += [token, *forced]
        return [token, *forced]


@dataclass(frozen=True, slots=True)
class _PromptRow:
    """What a row wants of its prompt's hidden states."""

    row: PlannedRow
    work: PromptWork
    index: int
    """In the plan."""

    def read(self, hidden: Tensor, model: DecoderModel) -> SampledRow | None:
        """hidden: of the row's tokens."""
        found = self.work.read(self.row.start, self.row.num_tokens, hidden, model)
        if found is None:
            return None
        return SampledRow(
            request_id=self.row.request_id,
            token_ids=[],
            prompt_logprobs=found.logprobs,
            embedding=found.embedding,
        )


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
    logprobs: bool
    """Whether any row wants some."""
    prompts: list[_PromptRow]

    @property
    def samples_apart(self) -> bool:
        """Whether sampling wants the logits themselves, and so is no part of a recording."""
        return self.edit or self.logprobs


class _Shape(NamedTuple):
    """What the launches of a step depend on, and all of it."""

    rows: int
    tokens: int
    samples: int
    most_tokens: int
    """Of a row."""
    hardest: Hardest | None
    """None if it is sampled apart."""


@dataclass(frozen=True, slots=True)
class _Computed:
    """Of the rows that sample, padding included."""

    hidden: Tensor
    """[samples, hidden_size]"""
    tokens: DeviceTokens | None
    """None if there are none, or the caller samples."""


@dataclass(frozen=True, slots=True)
class _Ran:
    """What a step leaves on the device."""

    tokens: DeviceTokens | None
    """Of the rows that sample, padding included; None if there are none."""
    logits: Tensor | None = None
    """Of the same, if sampled apart."""
    hidden: Tensor | None = None
    """[tokens, hidden_size] of all, if prompts want any."""
    errors: Mapping[int, str] = field(default_factory=dict)
    """Of rows in which nothing may be sampled."""


class DeviceRunner:
    """A model, its KV cache and the requests admitted to it, on one device."""

    def __init__(
        self,
        model: DecoderModel,
        kernels: TritonKernels,
        device: Device,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_size: int,
        eager: bool = False,
        grammars: GrammarSource | None = None,
    ) -> None:
        """max_model_len: the cache may be opened for less. eager: never record."""
        self.model = model
        self._kernels = kernels
        self._device = device
        self._max_num_seqs = max_num_seqs
        shape = BatchShape(
            max_seqs=max_num_seqs,
            max_tokens=max_num_batched_tokens,
            max_blocks=-(-max_model_len // block_size),
        )
        self._packer = StepPacker(shape, np.zeros(shape.packed_size, dtype=np.int32))
        self._batch = DeviceBatch.create(
            shape,
            max_model_len=max_model_len,
            block_size=block_size,
            device=device.torch_device,
        )
        self._sampling = DeviceSampling(max_num_seqs, model.spec.vocab_size, device, grammars)
        self._seats: dict[int, _Seat] = {}
        self._free_seats = list(range(max_num_seqs - 1, -1, -1))
        self._may_record = not eager
        self._decode_rows = graph_sizes(max_num_seqs)
        self._mixed_rows = mixed_rows(max_num_seqs)
        self._mixed_tokens = mixed_tokens(model.spec.num_parameters(), max_num_batched_tokens)
        self._uses: dict[_Shape, int] = {}
        self._recorded: dict[_Shape, Callable[[], _Computed]] = {}

    def open_cache(self, kv_cache: KVCache, max_model_len: int) -> None:
        """Again, before the first plan, when its size has been measured."""
        spec = self.model.spec
        self._max_model_len = max_model_len
        self.kv_cache = kv_cache
        self._blocks = kv_cache.storage.view(len(kv_cache.layers), 2, *kv_cache.layers[0].k.shape)
        self._kernels.reserve(
            kv_cache.layers[0].k,
            q_heads=spec.heads.num_heads,
            max_requests=self._max_num_seqs,
            max_len=max_model_len,
            windows={window or 0 for window in spec.windows},
        )

    # --- a plan ---------------------------------------------------------------------------------------

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Apply the plan: forget, admit, copy, compute, sample."""
        with self._device.active():
            return self._launch(plan)

    @torch.inference_mode()
    def _launch(self, plan: StepPlan) -> LaunchedStep:
        for request_id in plan.released:
            self._free_seats.append(self._seats.pop(request_id).index)
        for request in plan.admitted:
            self._admit(request)
        self._copy(plan.copies)
        if not plan.rows:
            return LaunchedStep(plan.step_id, self._device)
        step = self._send(plan.rows)
        return self._fetch(plan, step, self._run(step))

    def _admit(self, request: AdmittedRequest) -> None:
        index = self._free_seats.pop()
        self._seats[request.request_id] = _Seat(
            index=index,
            token_ids=request.token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            max_model_len=self._max_model_len,
            sampling=self._sampling.admit(index, request),
            prompt=PromptWork.of(request),
            num_blocks=len(request.block_ids[0]),
            unsent_blocks=list(request.block_ids[0]),
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
        prompts: list[_PromptRow] = []
        for index, (row, seat) in enumerate(zip(rows, seats, strict=True)):
            if row.new_block_ids:
                seat.num_blocks += len(row.new_block_ids[0])
                seat.unsent_blocks += row.new_block_ids[0]
            if seat.unsent_blocks:
                new_blocks.append((index, seat.unsent_blocks))
                seat.unsent_blocks = []
            if row.start < len(seat.token_ids):
                new_ids.append((index, seat.token_ids[row.start : row.start + row.num_tokens]))
                if seat.has_forced and seat.sampling.penalizes:
                    self._sampling.remember(seat.index, seat.token_ids, seat.num_prompt_tokens)
                seat.has_forced = False
            if seat.prompt is not None:
                if seat.prompt.wanted(row.start, row.num_tokens):
                    prompts.append(_PromptRow(row, seat.prompt, index))
                if seat.prompt.is_done(row.start + row.num_tokens):
                    seat.prompt = None
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
        self._upload(size)
        self._sampling.upload()
        picked = [(rows[i], seats[i]) for i in sampling.tolist()]
        return _Step(
            num_rows=len(rows),
            num_tokens=int(counts.sum()),
            most_tokens=int(counts.max()),
            sampling=[row for row, _ in picked],
            seats=[seat for _, seat in picked],
            hardest=HARDNESS[max((seat.sampling.hardness for _, seat in picked), default=0)],
            edit=any(seat.sampling.edits(row.start + row.num_tokens) for row, seat in picked),
            logprobs=any(seat.sampling.num_logprobs is not None for _, seat in picked),
            prompts=prompts,
        )

    def _upload(self, size: int) -> None:
        packed = torch.from_numpy(self._packer.buffer[:size])
        self._device.upload(self._batch.packed[:size], packed)

    # --- recordings -----------------------------------------------------------------------------------

    def prepare(self) -> bool:
        """Record one more shape, if any is left that may come. Call when nothing is in flight."""
        with self._device.active():
            return self._prepare()

    @torch.inference_mode()
    def _prepare(self) -> bool:
        wanted = sorted(self._uses, key=self._uses.__getitem__, reverse=True)
        # "filter" does for all; downwards, since smaller recordings fit into the memory of larger ones.
        wanted += [_decoding(size, "filter") for size in reversed(self._decode_rows)]
        shape = next((shape for shape in wanted if shape not in self._recorded), None)
        if shape is None or not self._may_record:
            return False
        nothing = np.zeros(0, dtype=np.int64)
        self._upload(
            self._packer.pack(
                seats=nothing,
                counts=nothing,
                seq_lens=nothing,
                num_blocks=nothing,
                sampling=nothing,
                new_ids=[],
                new_blocks=[],
            )
        )
        self._compute(shape)  # compiles and loads what is missing
        self._record(shape)
        return self._may_record

    def _record(self, shape: _Shape) -> Callable[[], _Computed]:
        work = partial(self._compute, shape)
        try:
            self._recorded[shape] = self._device.record(work)
        except CannotRecordError as error:
            logger.warning("no more than %d steps are recorded: %s", len(self._recorded), error)
            self._may_record = False
        return self._recorded.get(shape, work)

    def _padded(self, step: _Step, hardest: Hardest | None) -> _Shape | None:
        """The shape of which the step may be recorded."""
        if step.most_tokens == 1 and len(step.sampling) == step.num_rows:
            size = _least(self._decode_rows, step.num_rows)
            return None if size is None else _decoding(size, hardest)
        rows = _least(self._mixed_rows, step.num_rows)
        tokens = _least(self._mixed_tokens, step.num_tokens)
        if rows is None or tokens is None:
            return None
        return _Shape(rows, tokens, samples=rows, most_tokens=tokens, hardest=hardest)

    def _work(self, shape: _Shape) -> Callable[[], _Computed]:
        """What computes a shape: its recording; one that samples harder, which gives the same tokens; or
        the launches one by one."""
        found = self._recorded.get(shape)
        if found is not None:
            return found
        uses = self._uses[shape] = self._uses.get(shape, 0) + 1
        if shape.hardest is not None:
            for harder in HARDNESS[HARDNESS.index(shape.hardest) + 1 :]:
                found = self._recorded.get(shape._replace(hardest=harder))
                if found is not None:
                    return found
        if self._may_record and uses > _USES_BEFORE_RECORDING:
            return self._record(shape)
        return partial(self._compute, shape)

    # --- on the device --------------------------------------------------------------------------------

    def _run(self, step: _Step) -> _Ran:
        hardest = None if step.samples_apart or step.prompts else step.hardest
        exact = _Shape(
            step.num_rows, step.num_tokens, len(step.sampling), step.most_tokens, hardest
        )
        every = None
        if step.prompts:
            every = self._forward(exact)
            hidden = self._sampled_rows(exact, every)
        else:
            shape = self._padded(step, hardest)
            computed = self._compute(exact) if shape is None else self._work(shape)()
            if not step.samples_apart:
                return _Ran(computed.tokens)
            hidden = computed.hidden
        if not step.sampling:
            return _Ran(None, hidden=every)
        logits = self.model.logits(hidden)
        sampling = [seat.sampling for seat in step.seats]
        masks, errors = self._sampling.masks(sampling, padded=len(hidden))
        tokens = self._sample(logits, step.hardest, edit=step.edit, masks=masks)
        return _Ran(tokens, logits, every, errors)

    def _compute(self, shape: _Shape) -> _Computed:
        hidden = self._sampled_rows(shape, self._forward(shape))
        tokens = None
        if shape.hardest is not None and shape.samples:
            tokens = self._sample(self.model.logits(hidden), shape.hardest, edit=False)
        return _Computed(hidden, tokens)

    def _forward(self, shape: _Shape) -> Tensor:
        """[tokens, hidden_size]"""
        rows, tokens, batch = shape.rows, shape.tokens, self._batch
        build_step(batch, num_rows=rows, num_tokens=tokens)
        positions = batch.positions[:tokens]
        metadata = AttentionMetadata(
            positions=positions,
            slot_mapping=batch.slot_mapping[0, :tokens],
            query_start_loc=batch.section(Section.QUERY_START_LOC)[: rows + 1],
            seq_lens=batch.section(Section.SEQ_LENS)[:rows],
            block_table=batch.block_table[0, :rows],
            max_query_len=shape.most_tokens,
        )
        return self.model.compute(batch.input_ids[:tokens], [metadata], self.kv_cache)

    def _sampled_rows(self, shape: _Shape, hidden: Tensor) -> Tensor:
        """[samples, hidden_size] of all the tokens' hidden states."""
        if shape.samples == shape.tokens and shape.most_tokens == 1:
            return hidden
        return hidden.index_select(0, self._batch.section(Section.LOGIT_ROWS)[: shape.samples])

    def _sample(
        self, logits: Tensor, hardest: Hardest, *, edit: bool, masks: RowMasks | None = None
    ) -> DeviceTokens:
        count = logits.shape[0]
        tokens = self._sampling.sample(
            logits,
            self._batch.section(Section.SAMPLE_SEATS)[:count],
            self._batch.section(Section.SAMPLE_POSITIONS)[:count],
            hardest=hardest,
            edit=edit,
            masks=masks,
        )
        append_tokens(self._batch, tokens.token_ids)
        return tokens

    # --- back -----------------------------------------------------------------------------------------

    def _fetch(self, plan: StepPlan, step: _Step, ran: _Ran) -> LaunchedStep:
        """Start the results on their way to the host, beside the steps launched next. Hence all that is
        downloaded is made here or by `_run`, none by a recording: the next one would overwrite it.
        """
        count, back = len(step.sampling), []
        logprobs: dict[int, _LogprobPlace] = {}
        if ran.tokens is not None and count:
            # A token plus 1, or 0 where the logits held NaN: one new tensor to copy, not two.
            back.append(ran.tokens.token_ids[:count] + ran.tokens.valid[:count])
            if ran.logits is not None and step.logprobs:
                more, logprobs = self._logprobs(step, ran.logits, ran.tokens.token_ids)
                back += more
        ruled = enumerate(step.seats) if step.edit else ()
        counts = [row.num_tokens for row in plan.rows]
        hidden = () if ran.hidden is None else ran.hidden.split(counts)
        return LaunchedStep(
            step_id=plan.step_id,
            device=self._device,
            download=self._device.download(back),
            requests=[row.request_id for row in step.sampling],
            ruled={row: seat for row, seat in ruled if seat.sampling.rules is not None},
            logprobs=logprobs,
            errors=ran.errors,
            prompts=[partial(of.read, hidden[of.index], self.model) for of in step.prompts],
        )

    def _logprobs(
        self, step: _Step, logits: Tensor, token_ids: Tensor
    ) -> tuple[list[Tensor], dict[int, _LogprobPlace]]:
        """What is to come back with the tokens, and where a row's logprobs are in it."""
        back: list[Tensor] = []
        places: dict[int, _LogprobPlace] = {}
        asking = {
            row: seat.sampling
            for row, seat in enumerate(step.seats)
            if seat.sampling.num_logprobs is not None
        }
        few = {row: of for row, of in asking.items() if of.has_few_logprobs}
        if few:
            top = self._sampling.logprobs(logits, few, token_ids)
            back += (top.logprob, top.rank, top.top_ids, top.top_logprobs, top.asked)
            places = {row: _LogprobPlace(of, index=i) for i, (row, of) in enumerate(few.items())}
        for row, of in asking.items():
            if not of.has_few_logprobs:  # more than the kernel keeps: the host sorts
                places[row] = _LogprobPlace(of, logits=1 + len(back))
                back.append(logits[row])
        return back, places


def _decoding(size: int, hardest: Hardest | None) -> _Shape:
    return _Shape(size, size, samples=size, most_tokens=1, hardest=hardest)


@dataclass(frozen=True, slots=True)
class _LogprobPlace:
    """Where a row's logprobs are among the tensors that come back with a step."""

    wanted: SeatSampling
    index: int = 0
    """In the five tensors of `DeviceLogprobs`, which follow the tokens,"""
    logits: int | None = None
    """unless all its logits come back: which tensor they are."""

    def entry(self, back: Sequence[Tensor], token: int) -> TokenLogprobs:
        count, asked_ids = self.wanted.num_logprobs or 0, self.wanted.asked_ids
        if self.logits is not None:
            every = torch.log_softmax(back[self.logits].float(), dim=-1)
            return top_logprobs(every[None], [token], count, asked_ids)[0]
        logprob, rank, ids, values, asked = (tensor[self.index] for tensor in back[1:6])
        return TokenLogprobs(
            token_id=token,
            logprob=float(logprob),
            rank=int(rank),
            top_ids=ids[:count].tolist(),
            top_logprobs=values[:count].tolist(),
            asked_logprobs=asked[: len(asked_ids)].tolist(),
        )


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A `StepFuture`."""

    step_id: int
    device: Device
    download: Download | None = None
    requests: Sequence[int] = ()
    """Those that sampled; their tokens come back first."""
    ruled: Mapping[int, _Seat] = field(default_factory=dict)
    """By row, as the next two: the seats of those with rules, perhaps given up meanwhile."""
    logprobs: Mapping[int, _LogprobPlace] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)
    prompts: Sequence[Callable[[], SampledRow | None]] = ()

    def result(self) -> StepResult:
        back = () if self.download is None else self.download.wait()
        with self.device.active():
            told = {row.request_id: row for read in self.prompts if (row := read()) is not None}
        tokens = back[0].tolist() if self.requests else ()
        for index, (request_id, one_more) in enumerate(zip(self.requests, tokens, strict=True)):
            row = told.get(request_id)
            if row is None:
                row = told[request_id] = SampledRow(request_id=request_id, token_ids=[])
            if index in self.errors or not one_more:
                row.error = self.errors.get(index, NAN_ERROR)
                continue
            token = one_more - 1
            row.token_ids = self.ruled[index].learn(token) if index in self.ruled else [token]
            if index in self.logprobs:
                row.logprobs = [self.logprobs[index].entry(back, token)]
        return StepResult(step_id=self.step_id, sampled=list(told.values()))
