"""How each seat is sampled, kept on the device; sampling a step there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from quire.kernels.triton import logits as edits
from quire.kernels.triton.logprobs import MAX_LOGPROBS, DeviceLogprobs, logprobs
from quire.kernels.triton.sampling import DeviceTokens, SampleWorkspace, sample
from quire.kernels.triton.seats import SEAT_WORDS, seat
from quire.messages import AdmittedRequest
from quire.runner.device import Device

Hardest = Literal["greedy", "draw", "filter"]
HARDNESS: tuple[Hardest, ...] = ("greedy", "draw", "filter")
_LEAST_BANNED = 16


@dataclass(frozen=True, slots=True)
class SeatSampling:
    """What the host must know of a seat to choose what to launch."""

    hardness: int
    """Index in `HARDNESS`."""
    penalizes: bool
    banned_until: int
    """Tokens sampled at an index below this may not be final ones."""
    num_logprobs: int | None
    """As `SamplingParams.logprobs`: -1 is all."""

    def edits(self, position: int) -> bool:
        """Whether its logits change before a token is sampled at this index."""
        return self.penalizes or position < self.banned_until


class DeviceSampling:
    """The seats' records, histories and lists on the device."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: Device) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._host_table = np.zeros((max_num_seqs, SEAT_WORDS), dtype=np.int32)
        self._table = torch.zeros(
            max_num_seqs, SEAT_WORDS, dtype=torch.int32, device=device.torch_device
        )
        self._stale = False
        self._workspace = SampleWorkspace.create(max_num_seqs, vocab_size, device.torch_device)
        self._history: Tensor | None = None
        self._banned: Tensor | None = None

    def admit(self, index: int, request: AdmittedRequest) -> SeatSampling:
        params = request.params
        final_ids = sorted({*request.eos_token_ids, *(params.stop_token_ids or ())})
        final_ids = [token for token in final_ids if token < self._vocab_size]
        banned_until = request.num_prompt_tokens + params.min_tokens if final_ids else 0
        if not params.min_tokens:
            banned_until = 0
        self._host_table[index] = seat(
            temperature=params.temperature,
            top_p=params.top_p,
            min_p=params.min_p,
            top_k=params.top_k,
            seed=request.seed,
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
            num_banned=len(final_ids) if banned_until else 0,
            banned_until=banned_until,
        )
        self._stale = True
        if params.has_penalties:
            self._remember(index, request)
        if banned_until:
            self._ban(index, final_ids)
        filters = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        return SeatSampling(
            hardness=0 if params.is_greedy else 2 if filters else 1,
            penalizes=params.has_penalties,
            banned_until=banned_until,
            num_logprobs=params.logprobs,
        )

    def _remember(self, index: int, request: AdmittedRequest) -> None:
        if self._history is None:  # 0.3 MB a seat at 152,000 tokens: only if somebody asks
            shape = (len(self._host_table), self._vocab_size)
            self._history = torch.zeros(shape, dtype=torch.int16, device=self._device.torch_device)
        row = edits.history_row(request.token_ids, request.num_prompt_tokens, self._vocab_size)
        self._device.upload(self._history[index], torch.from_numpy(row))

    def _ban(self, index: int, ids: list[int]) -> None:
        width = 0 if self._banned is None else self._banned.shape[1]
        if self._banned is None or len(ids) > width:
            grown = torch.zeros(
                len(self._host_table),
                max(_LEAST_BANNED, 2 * width, len(ids)),
                dtype=torch.int32,
                device=self._device.torch_device,
            )
            if self._banned is not None:
                grown[:, :width] = self._banned
            self._banned = grown
        row = torch.tensor(ids, dtype=torch.int32)
        self._device.upload(self._banned[index, : len(ids)], row)

    def upload(self) -> None:
        """Before a step: what changed since the last one."""
        if self._stale:
            self._device.upload(self._table, torch.from_numpy(self._host_table))
            self._stale = False

    def sample(
        self, logits: Tensor, seats: Tensor, positions: Tensor, *, hardest: Hardest, edit: bool
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
        self, logits: Tensor, rows: list[int], token_ids: Tensor, k: int
    ) -> DeviceLogprobs:
        """Of those rows of the logits; k at most `MAX_LOGPROBS`."""
        index = torch.empty(len(rows), dtype=torch.int32, device=logits.device)
        self._device.upload(index, torch.tensor(rows, dtype=torch.int32))
        return logprobs(logits, index, token_ids, min(k, MAX_LOGPROBS))
