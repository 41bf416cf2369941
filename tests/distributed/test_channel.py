"""Channels between stages: order, running ahead, and who is named when one does not come."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest
import torch

from quire.distributed.channel import SharedMemoryChannel, channel_bytes
from quire.distributed.link_channel import LinkChannel
from quire.errors import WorkerError
from quire.kernels.group import Channel

SLOTS = 3
Ends = tuple[Channel, Channel]


def open_links(timeout: float) -> Ends:
    """Of one process, over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        receiver, sender = (
            LinkChannel(
                address,
                sends=sends,
                slots=SLOTS,
                numbers=(4, 6),
                timeout=timeout,
                descriptor=-1 if sends else os.dup(listener.fileno()),
            )
            for sends in (False, True)
        )
    return sender, receiver


def open_ends(timeout: float) -> Ends:
    memory = os.memfd_create("test")
    try:
        os.ftruncate(memory, channel_bytes(SLOTS, 1 << 12))
        sender, receiver = (
            SharedMemoryChannel(memory, sends=sends, slots=SLOTS, timeout=timeout, numbers=(4, 6))
            for sends in (True, False)
        )
    finally:
        os.close(memory)
    return sender, receiver


@pytest.fixture(params=[open_ends, open_links], ids=["shared memory", "links"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    found = request.param(0.3)
    yield found
    for each in found:
        each.close()
        each.close()


def step(number: int) -> torch.Tensor:
    return torch.full((1 + number % 5, 8), number, dtype=torch.bfloat16)


def test_steps_come_in_order_and_the_sender_runs_ahead(ends: Ends) -> None:
    sender, receiver = ends
    for first in range(0, 30, SLOTS):
        for number in range(first, first + SLOTS):
            sender.send(step(number))  # does not wait
        for number in range(first, first + SLOTS):
            found = receiver.receive(1 + number % 5, 8, torch.bfloat16)
            assert torch.equal(found, step(number))


def test_from_another_thread(ends: Ends) -> None:
    sender, receiver = ends
    thread = threading.Thread(target=lambda: [sender.send(step(number)) for number in range(200)])
    thread.start()
    for number in range(200):
        assert torch.equal(receiver.receive(1 + number % 5, 8, torch.bfloat16), step(number))
    thread.join()


def test_a_sender_that_does_not_come_is_named(ends: Ends) -> None:
    with pytest.raises(WorkerError, match=r"ank 4 .*is late by 0\.3 s"):
        ends[1].receive(1, 8, torch.float32)


def test_a_receiver_that_does_not_come_is_named() -> None:
    sender, receiver = open_ends(0.3)
    for number in range(SLOTS):
        sender.send(step(number))
    with pytest.raises(WorkerError, match=r"Rank 6 .*is late by 0\.3 s"):
        sender.send(step(SLOTS))
    sender.close()
    receiver.close()


@pytest.mark.parametrize("of_links", [False, True])
def test_an_abort_ends_every_wait(of_links: bool) -> None:
    sender, receiver = (open_links if of_links else open_ends)(60.0)
    errors: list[str] = []

    def wait() -> None:
        with pytest.raises(WorkerError) as found:
            receiver.receive(1, 8, torch.float32)
        errors.append(str(found.value))

    thread = threading.Thread(target=wait)
    thread.start()
    (receiver if of_links else sender).abort("rank 2 was killed")
    thread.join(30.0)
    assert errors == ["rank 2 was killed"]
    sender.close()
    receiver.close()


def test_a_stranger_is_not_the_sender() -> None:
    sender, receiver = open_links(60.0)
    assert isinstance(receiver, LinkChannel) and receiver._listener is not None
    with socket.create_connection(receiver._listener.getsockname()) as stranger:
        stranger.sendall(b"\x10\0\0\0" + bytes(16))
        sender.send(step(1))
        assert torch.equal(receiver.receive(2, 8, torch.bfloat16), step(1))
    for each in (sender, receiver):
        each.close()


def test_another_end_that_has_closed_is_named() -> None:
    sender, receiver = open_links(60.0)
    sender.send(step(0))
    receiver.receive(1, 8, torch.bfloat16)
    sender.close()
    with pytest.raises(WorkerError, match="rank 4 was closed"):
        receiver.receive(1, 8, torch.bfloat16)
    receiver.close()
