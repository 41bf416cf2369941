"""Several passes of a recorded program in one C call (draft.c)."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int64, c_void_p

import numpy as np
from numpy.typing import NDArray

from quire.kernels.cpu.library import load_library
from quire.kernels.cpu.program import NativeProgram
from quire.kernels.program import StepRows


class _DraftJob(ctypes.Structure):
    """Mirrors draft_job in draft.c."""

    _fields_ = [
        *(
            (name, c_void_p)
            for name in ("program", "step", "samples", "wanted", "drafts", "counts")
        ),
        ("most", c_int64),
    ]


class NativeDrafting:
    """For one program. Its arrays have room for as many rows as `StepRows.rows`."""

    def __init__(self, program: NativeProgram, rows: StepRows, most: int) -> None:
        self._program, self._rows = program, rows
        count = len(rows.rows)
        self._lib = load_library()
        self._drafts = np.zeros((count, most), dtype=np.int64)
        self._counts = np.zeros(count, dtype=np.int64)
        self._wanted = np.zeros(count, dtype=np.int64)
        program_address, step_address = program.addresses
        self._job = _DraftJob(
            program=program_address,
            step=step_address,
            wanted=self._wanted.ctypes.data,
            drafts=self._drafts.ctypes.data,
            counts=self._counts.ctypes.data,
            most=most,
        )

    def run(self, wanted: list[int], samples: NDArray[np.void] | None) -> list[list[int]]:
        """The drafts of each row of `StepRows.rows`, which wants one result, or none where `wanted` is 0.
        They are also written to `StepRows.token_ids`, after the row's tokens. samples: a `SAMPLE_ROW` for
        the first draft of each row; None: the likeliest tokens.

        Raises `KernelArgumentError` as a `ForwardPass` does.
        """
        count = len(wanted)
        self._wanted[:count] = wanted
        self._job.samples = None if samples is None else samples.ctypes.data
        self._program.prepare(self._rows)
        self._program.check(self._lib.quire_draft(byref(self._job)), self._rows)
        made = self._drafts[:count].tolist()
        return [drafts[:n] for drafts, n in zip(made, self._counts[:count].tolist(), strict=True)]
