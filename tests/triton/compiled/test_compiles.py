"""A kernel that is compiled while requests wait is reported, once."""

from __future__ import annotations

import logging

import torch

from quire.kernels.triton import layers
from quire.kernels.triton.compiles import SERVING, report_compiles
from tests.triton.harness import compile_launches


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def launch(width: int) -> None:
    x = torch.empty(3, width, dtype=torch.bfloat16, device="meta")
    layers.add(x, torch.empty_like(x))


def launch_and_look() -> None:
    """In the child process of the harness."""
    kept = Kept()
    logging.getLogger("quire.kernels.triton.compiles").addHandler(kept)
    report_compiles()
    launch(1000)
    assert not kept.messages, "at the start"
    before = SERVING.set(True)
    launch(1000)
    assert not kept.messages, "it is compiled"
    launch(1001)
    launch(1003)
    SERVING.reset(before)
    launch(1005)
    [message] = kept.messages
    assert "_add" in message


def test_it_is_reported_once() -> None:
    assert len(compile_launches(launch_and_look)) == 5
