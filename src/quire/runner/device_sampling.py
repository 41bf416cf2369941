"""How each seat is sampled, kept on the device; sampling a step there.

What depends on the tokens before (`RequestRules`) stays on the host, which makes a mask of it while the
device computes the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.kernels.sampling import SAMPLE_ROW, sample_row
from quire.kernels.triton import logits as edits
from quire.kernels.triton.logprobs import MAX_LOGPROBS, DeviceLogprobs, logprobs
from quire.kernels.triton.sampling import DeviceTokens, SampleWorkspace, sample
from quire.kernels.triton.seats import SEAT_WORDS, as_words
from quire.messages import AdmittedRequest
from quire.runner.device import Device
from quire.sampling.rules import RequestRules
from quire.sampling.sampler import NOTHING_ALLOWED, GrammarSource, rules_of
from quire.structured.base import GrammarError
from quire.structured.masks import Mask

Hardest = Literal["greedy", "draw", "filter"]
HARDNESS: tuple[Hardest, ...] = ("greedy", "draw", "filter")
_LEAST_LISTED = 16


@dataclass(frozen=True, slots=True)
class SeatSampling:
    """What the host must know of a seat to choose what to launch."""

    hardness: int
    """Index in `HARDNESS`."""
    penalizes: bool
    always_edits: bool
    banned_until: int
    """Tokens sampled at an index below this may not be final ones."""
    num_logprobs: int | None
    """As `Decoding.logprobs`."""
    asked_ids: Sequence[int]
    rules: RequestRules | None

    @property
    def has_few_logprobs(self) -> bool:
        """As many as the kernel can find."""
        return self.num_logprobs is not None and 0 <= self.num_logprobs <= MAX_LOGPROBS

    def edits(self, position: int) -> bool:
        """Whether its logits change before a token is sampled at this index."""
        return self.always_edits or position < self.banned_until


@dataclass(frozen=True, slots=True)
class RowMasks:
    """On the device, as `edit_logits` takes them."""

    bits: Tensor
    rows: Tensor


class DeviceSampling:
    """The seats' records, histories and lists on the device."""

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        device: Device,
        grammars: GrammarSource | None = None,
    ) -> None:
        self._device = device
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._rows = np.zeros(max_num_seqs, dtype=SAMPLE_ROW)
        self._table = torch.zeros(
            max_num_seqs, SEAT_WORDS, dtype=torch.int32, device=device.torch_device
        )
        self._stale = False
        self._workspace = SampleWorkspace.create(max_num_seqs, vocab_size, device.torch_device)
        self._history: Tensor | None = None
        self._banned: Tensor | None = None
        self._biased: Tensor | None = None
        self._biases: Tensor | None = None

    def admit(self, index: int, request: AdmittedRequest) -> SeatSampling:
        decoding, bias = request.decoding, request.decoding.logit_bias
        banned_until = decoding.banned_until(request.num_prompt_tokens)
        self._rows[index] = sample_row(decoding, request.num_prompt_tokens)
        self._stale = True
        if decoding.has_penalties:
            self.remember(index, request.token_ids, request.num_prompt_tokens)
        if banned_until:
            self._banned = self._listed(self._banned, index, decoding.final_ids, torch.int32)
        if bias:
            self._biased = self._listed(self._biased, index, list(bias), torch.int32)
            self._biases = self._listed(self._biases, index, list(bias.values()), torch.float32)
        return SeatSampling(
            hardness=0 if decoding.is_greedy else 2 if decoding.filters else 1,
            penalizes=decoding.has_penalties,
            always_edits=decoding.edits_logits,
            banned_until=banned_until,
            num_logprobs=decoding.logprobs,
            asked_ids=decoding.logprob_token_ids,
            rules=rules_of(request, self._vocab_size, self._grammars),
        )

    def remember(self, index: int, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """These are the tokens that the seat's penalties count."""
        if self._history is None:  # 0.3 MB a seat at 152,000 tokens: only if somebody asks
            shape = (len(self._rows), self._vocab_size)
            self._history = torch.zeros(shape, dtype=torch.int16, device=self._device.torch_device)
        row = edits.history_row(token_ids, num_prompt_tokens, self._vocab_size)
        self._device.upload(self._history[index], torch.from_numpy(row))

    def _listed(
        self, table: Tensor | None, index: int, values: Sequence[float], dtype: torch.dtype
    ) -> Tensor:
        """The table of the seats' lists, made or widened as need be, with this seat's in it."""
        width = 0 if table is None else table.shape[1]
        if table is None or len(values) > width:
            size = (len(self._rows), max(_LEAST_LISTED, 2 * width, len(values)))
            grown = torch.zeros(size, dtype=dtype, device=self._device.torch_device)
            if table is not None:
                grown[:, :width] = table
            table = grown
        self._device.upload(table[index, : len(values)], torch.tensor(values, dtype=dtype))
        return table

    def upload(self) -> None:
        """Before a step: what changed since the last one."""
        if self._stale:
            self._device.upload(self._table, torch.from_numpy(as_words(self._rows)))
            self._stale = False

    def masks(
        self, seats: Sequence[SeatSampling], padded: int
    ) -> tuple[RowMasks | None, dict[int, str]]:
        """What may be sampled in these rows, and why nothing may in some: made by the host and sent. Call it
        when the step has been launched, so that the device has something to do meanwhile."""
        bits: list[Mask] = []
        errors: dict[int, str] = {}
        rows = np.full(padded, -1, dtype=np.int32)
        for row, of in enumerate(seats):
            if of.rules is None:
                continue
            try:
                mask = of.rules.mask()
                if mask is not None and not mask.any():
                    raise GrammarError(NOTHING_ALLOWED)
            except GrammarError as error:
                errors[row] = str(error)
                continue
            if mask is not None:
                rows[row] = len(bits)
                bits.append(mask)
        if not bits:
            return None, errors
        return RowMasks(self._sent(np.stack(bits)), self._sent(rows)), errors

    def _sent(self, array: NDArray[np.int32] | NDArray[np.int64]) -> Tensor:
        source = torch.from_numpy(array)
        target = torch.empty(source.shape, dtype=source.dtype, device=self._device.torch_device)
        self._device.upload(target, source)
        return target

    def sample(
        self,
        logits: Tensor,
        seats: Tensor,
        positions: Tensor,
        *,
        hardest: Hardest,
        edit: bool,
        masks: RowMasks | None = None,
    ) -> DeviceTokens:
        """logits: [R, V], as the model gave them. seats: [R] int32; positions: [R] int64; on the
        device."""
        if edit:
            logits = edits.edit_logits(
                logits,
                self._table,
                seats,
                positions,
                out=torch.empty(logits.shape, dtype=torch.float32, device=logits.device),
                history=self._history,
                bitmask=None if masks is None else masks.bits,
                bitmask_rows=None if masks is None else masks.rows,
                biased_ids=self._biased,
                biases=self._biases,
                banned_ids=self._banned,
            )
        return sample(
            logits,
            self._table,
            seats,
            positions,
            self._workspace,
            hardest=hardest,
            history=self._history if edit else None,
        )

    def logprobs(
        self, logits: Tensor, rows: Mapping[int, SeatSampling], token_ids: Tensor
    ) -> DeviceLogprobs:
        """Of those rows of the logits, none of which wants more than `MAX_LOGPROBS`."""
        wanted = list(rows.values())
        most = max(len(of.asked_ids) for of in wanted)
        asked = np.zeros((len(rows), most), dtype=np.int64)
        for index, of in enumerate(wanted):
            asked[index, : len(of.asked_ids)] = of.asked_ids
        return logprobs(
            logits,
            self._sent(np.array(list(rows), dtype=np.int32)),
            token_ids,
            min(max(of.num_logprobs or 0 for of in wanted), logits.shape[1]),
            self._sent(asked) if most else None,
        )
