"""The sampling parameters of each seat, kept on the device, and the sampling of a step there.

Rules that depend on the tokens so far (`RequestRules`) stay on the host, which sends a mask while the
device computes the logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.sampling import SAMPLE_ROW, sample_row
from quire.kernels.triton import logits as edits
from quire.kernels.triton.logprobs import MAX_LOGPROBS, logprobs
from quire.kernels.triton.sampling import (
    SAMPLER_LEVELS,
    DeviceTokens,
    SamplerLevel,
    SampleWorkspace,
    processed,
    sample,
)
from quire.kernels.triton.seats import SEAT_WORDS, as_words
from quire.messages import AdmittedRequest, TokenLogprobs
from quire.runner.device import Device
from quire.runner.prompt_work import score
from quire.sampling.logprobs import LogprobsMode, top_logprobs
from quire.structured.masks import Mask

_LISTED = 16
"""Lists of seats are wide by a multiple of this: a kernel is compiled again for widths of another kind."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The logprobs that a request wants for each token."""

    count: int
    """As `Decoding.logprobs`: -1 is all. 0 if only `also` are wanted."""
    also: Sequence[int]


@dataclass(frozen=True, slots=True)
class SamplingWants:
    """Properties of a step's samples by which the host chooses the kernels to launch."""

    level: SamplerLevel
    edit: bool
    """Whether any logits change before a token is sampled."""
    logprobs: Mapping[int, Logprobs]
    """By index of the sample, for those that ask."""

    @property
    def outside_graph(self) -> bool:
        """Whether sampling needs the logits themselves, and so is not part of a CUDA graph."""
        return self.edit or bool(self.logprobs)


@dataclass(frozen=True, slots=True)
class RowMasks:
    """Masks on the device, as arguments of `edit_logits`."""

    bits: Tensor
    rows: Tensor


@dataclass(slots=True)
class FetchedLogprobs:
    """Logprobs that are being copied to the host: the kernel's results, or whole rows of logits."""

    mode: LogprobsMode
    tensors: list[Tensor] = field(default_factory=list)
    """On the device."""
    found: dict[int, tuple[int, Logprobs]] = field(default_factory=dict)
    """By index of the sample: its index in the first five tensors, those of `DeviceLogprobs`."""
    whole: dict[int, tuple[int, Logprobs]] = field(default_factory=dict)
    """By index of the sample: the index of the tensor with its logits."""

    def entries(
        self, back: Sequence[Tensor], token_ids: NDArray[np.int64], valid: NDArray[np.bool_]
    ) -> dict[int, TokenLogprobs]:
        """back: `tensors`, copied to the host. token_ids, valid: of all samples."""
        entries = {}
        for index, (at, wanted) in self.found.items():
            if not valid[index]:
                continue
            logprob, rank, ids, values, asked = (tensor[at] for tensor in back[:5])
            entries[index] = TokenLogprobs(
                token_id=int(token_ids[index]),
                logprob=float(logprob),
                rank=int(rank),
                top_ids=ids[: wanted.count].tolist(),
                top_logprobs=values[: wanted.count].tolist(),
                asked_logprobs=asked[: len(wanted.also)].tolist(),
            )
        for index, (at, wanted) in self.whole.items():
            if valid[index]:
                every, token = self.mode.reported(back[at].float()), int(token_ids[index])
                [entries[index]] = top_logprobs(every[None], [token], wanted.count, wanted.also)
        return entries


def _asked_width(wanted: Iterable[Logprobs]) -> int:
    """Of a tensor with all these lists of ids, of the kind for which the kernel is compiled."""
    return -(-max(1, *(len(of.also) for of in wanted)) // _LISTED) * _LISTED


class GPUSampling:
    """The seats' records, histories and lists on the device, and the host's summary of them."""

    def __init__(
        self, max_num_seqs: int, vocab_size: int, device: Device, *, logprobs_mode: str
    ) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._mode = LogprobsMode.of(logprobs_mode)
        self._rows = np.zeros(max_num_seqs, dtype=SAMPLE_ROW)
        self._table = torch.zeros(
            max_num_seqs, SEAT_WORDS, dtype=torch.int32, device=device.torch_device
        )
        self._stale = False
        self._workspace = SampleWorkspace.create(max_num_seqs, vocab_size, device.torch_device)
        # All of these exist from the start, because a kernel is compiled again for an argument that is None.
        at = device.torch_device
        self._history = torch.zeros(max_num_seqs, vocab_size, dtype=torch.int16, device=at)
        self._banned = torch.zeros(max_num_seqs, _LISTED, dtype=torch.int32, device=at)
        self._biased = torch.zeros_like(self._banned)
        self._biases = torch.zeros(max_num_seqs, _LISTED, dtype=torch.float32, device=at)
        self._unmasked = RowMasks(
            torch.zeros(1, -(-vocab_size // 32), dtype=torch.int32, device=at),
            torch.full((max_num_seqs,), -1, dtype=torch.int32, device=at),
        )
        self._levels = np.zeros(max_num_seqs, dtype=np.int64)
        """Index in `SAMPLER_LEVELS`."""
        self._penalizes = np.zeros(max_num_seqs, dtype=np.bool_)
        self._edits_until = np.zeros(max_num_seqs, dtype=np.int64)
        """Logits are edited before a token is sampled at an index below this."""
        self._logprobs: dict[int, Logprobs] = {}

    def admit(self, index: int, request: AdmittedRequest) -> None:
        decoding, bias = request.decoding, request.decoding.logit_bias
        banned_until = decoding.banned_until(request.num_prompt_tokens)
        self._rows[index] = sample_row(decoding, request.num_prompt_tokens)
        self._stale = True
        self._levels[index] = 0 if decoding.is_greedy else 2 if decoding.filters else 1
        self._penalizes[index] = decoding.has_penalties
        self._edits_until[index] = np.iinfo(np.int64).max if decoding.edits_logits else banned_until
        if decoding.logprobs is not None:
            self._logprobs[index] = Logprobs(decoding.logprobs, decoding.logprob_token_ids)
        self.recount(index, request.token_ids, request.num_prompt_tokens)
        if banned_until:
            self._banned = self._listed(self._banned, index, decoding.final_ids)
        if bias:
            self._biased = self._listed(self._biased, index, list(bias))
            self._biases = self._listed(self._biases, index, list(bias.values()))

    def release(self, index: int) -> None:
        self._logprobs.pop(index, None)

    def recount(
        self, index: int, token_ids: Sequence[int] | NDArray[np.int64], num_prompt_tokens: int
    ) -> None:
        """Replace the token counts for the seat's penalties, if it has any."""
        if not self._penalizes[index]:
            return
        row = edits.history_row(token_ids, num_prompt_tokens, self._vocab_size)
        self._device.upload(self._history[index], torch.from_numpy(row))

    def _listed(self, table: Tensor, index: int, values: Sequence[float]) -> Tensor:
        """The table of the seats' lists, widened if necessary, with this seat's list in it."""
        width = table.shape[1]
        if len(values) > width:
            wider = -(-max(2 * width, len(values)) // _LISTED) * _LISTED
            table = F.pad(table, (0, wider - width))
        self._device.upload(table[index, : len(values)], torch.tensor(values, dtype=table.dtype))
        return table

    def upload(self) -> None:
        """Before a step: send the records if any changed since the last one."""
        if self._stale:
            self._device.upload(self._table, torch.from_numpy(as_words(self._rows)))
            self._stale = False

    def wants(self, seats: NDArray[np.int64], positions: NDArray[np.int64]) -> SamplingWants:
        asking = {}
        if self._logprobs:
            numbered = enumerate(seats.tolist())
            asking = {i: self._logprobs[seat] for i, seat in numbered if seat in self._logprobs}
        return SamplingWants(
            level=SAMPLER_LEVELS[self._levels[seats].max(initial=0)],
            edit=bool((positions < self._edits_until[seats]).any()),
            logprobs=asking,
        )

    def send(self, masks: Mapping[int, Mask], padded: int) -> RowMasks:
        """masks: by row of the logits. padded: the number of rows with padding."""
        if not masks:
            return self._unmasked
        rows = np.full(padded, -1, dtype=np.int32)
        rows[list(masks)] = np.arange(len(masks))
        return RowMasks(self._sent(np.stack(list(masks.values()))), self._sent(rows))

    def _sent(self, array: NDArray[np.int32] | NDArray[np.int64]) -> Tensor:
        source = torch.from_numpy(array)
        target = torch.empty(source.shape, dtype=source.dtype, device=self._device.torch_device)
        self._device.upload(target, source)
        return target

    def edit(self, logits: Tensor, seats: Tensor, positions: Tensor, masks: RowMasks) -> Tensor:
        """The edited logits, [R, V] float32. logits: [R, V], as the model gave them. seats: [R] int32;
        positions: [R] int64; on the device."""
        return edits.edit_logits(
            logits,
            self._table,
            seats,
            positions,
            out=torch.empty(logits.shape, dtype=torch.float32, device=logits.device),
            history=self._history,
            bitmask=masks.bits,
            bitmask_rows=masks.rows[: len(logits)],
            biased_ids=self._biased,
            biases=self._biases,
            banned_ids=self._banned,
        )

    def sample(
        self, logits: Tensor, seats: Tensor, positions: Tensor, level: SamplerLevel
    ) -> DeviceTokens:
        """logits: [R, V], edited if any row needs it. Counts the tokens of seats with penalties."""
        return sample(
            logits,
            self._table,
            seats,
            positions,
            self._workspace,
            level=level,
            history=self._history,
        )

    def compile_all(self, logits: Tensor, seats: Tensor, positions: Tensor) -> None:
        """Launch each kernel here in each variant that a request can need. logits: [1, V], as the model gives
        them, of a row of padding."""
        nobody = torch.zeros_like(seats)  # a seat that exists, with a record of zeros
        asking = {0: Logprobs(min(2, logits.shape[1]), (0,))}
        edited = self.edit(logits, seats, positions, self.send({}, padded=1))
        for each in (logits, edited):
            for level in SAMPLER_LEVELS:
                tokens = self.sample(each, seats, positions, level)
            self.logprobs(asking, logits, each, nobody, tokens.token_ids)
        self.score([(logits, [0])], 1, [0])

    def logprobs(
        self,
        asking: Mapping[int, Logprobs],
        logits: Tensor,
        edited: Tensor,
        seats: Tensor,
        token_ids: Tensor,
    ) -> FetchedLogprobs | None:
        """After `sample`. asking: by row. logits, edited: [R, V], before and after edits; `edited` is
        overwritten if it is another tensor. seats: as for `sample`. token_ids: [R], sampled."""
        if not asking:
            return None
        if self._mode.processed:
            rows = self._sent(np.array(list(asking), dtype=np.int32))
            out = edited
            if edited is logits:
                out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
            logits = processed(edited, rows, self._table, seats, self._workspace, out=out)
        fetched = FetchedLogprobs(self._mode)
        few = {i: of for i, of in asking.items() if 0 <= of.count <= MAX_LOGPROBS}
        if few:
            asked = np.zeros((len(few), _asked_width(few.values())), dtype=np.int64)
            for at, (index, of) in enumerate(few.items()):
                asked[at, : len(of.also)] = of.also
                fetched.found[index] = (at, of)
            top = logprobs(
                logits,
                self._sent(np.array(list(few), dtype=np.int32)),
                token_ids,
                min(max(of.count for of in few.values()), logits.shape[1]),
                self._sent(asked),
                normalized=self._mode.normalized,
            )
            fetched.tensors += (top.logprob, top.rank, top.top_ids, top.top_logprobs, top.asked)
        for index, of in asking.items():
            if index not in few:  # more than the kernel finds: the host computes them
                fetched.whole[index] = (len(fetched.tensors), of)
                fetched.tensors.append(logits[index])
        return fetched

    def score(
        self, parts: Iterable[tuple[Tensor, Sequence[int]]], count: int, also: Sequence[int]
    ) -> list[TokenLogprobs]:
        """As `quire.runner.prompt_work.score`. Nothing comes back before all parts are computed."""
        if not 0 <= count <= MAX_LOGPROBS:
            return score(parts, count, also)
        asked = np.zeros((1, _asked_width([Logprobs(count, also)])), dtype=np.int64)
        asked[0, : len(also)] = also
        ids, every = self._sent(asked), []
        tokens: list[int] = []
        for logits, targets in parts:
            rows = len(targets)
            top = logprobs(
                logits,
                torch.arange(rows, dtype=torch.int32, device=logits.device),
                self._sent(np.array(targets, dtype=np.int64)),
                min(count, logits.shape[1]),
                ids.expand(rows, -1).contiguous(),
            )
            every.append((top.logprob, top.rank, top.top_ids, top.top_logprobs, top.asked))
            tokens += targets
        back = self._device.download([torch.cat(each) for each in zip(*every, strict=True)]).wait()
        columns = [tokens, *(each.tolist() for each in back[:4]), back[4][:, : len(also)].tolist()]
        return [TokenLogprobs(*entry) for entry in zip(*columns, strict=True)]
