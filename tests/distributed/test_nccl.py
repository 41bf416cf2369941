"""The NCCL group over a fake of PyTorch's process group: ranks as threads, tensors in ordinary memory."""

from __future__ import annotations

import threading

import pytest
import torch

from quire.distributed.nccl import NcclGroup
from quire.errors import ConfigError, WorkerError


class Done:
    def wait(self) -> bool:
        return True


class FakeNccl:
    """One rank's side of an all-gather. Refuses what NCCL would: pieces of different sizes or types."""

    def __init__(
        self, rank: int, shared: list[torch.Tensor | None], barrier: threading.Barrier
    ) -> None:
        self.rank, self.shared, self.barrier = rank, shared, barrier
        self.calls = 0
        self.aborted = False

    def _allgather_base(self, output: torch.Tensor, piece: torch.Tensor) -> Done:
        assert piece.is_contiguous() and output.is_contiguous() and output.dim() == 1
        assert output.numel() == len(self.shared) * piece.numel() and output.dtype == piece.dtype
        self.calls += 1
        self.shared[self.rank] = piece
        self.barrier.wait(20)
        sizes = {(one.numel(), one.dtype) for one in self.shared if one is not None}
        assert len(sizes) == 1, f"pieces differ: {sizes}"
        output.copy_(torch.cat([one for one in self.shared if one is not None]))
        self.barrier.wait(20)
        return Done()

    def abort(self) -> None:
        self.aborted = True


class Ranks:
    def __init__(self, size: int) -> None:
        shared: list[torch.Tensor | None] = [None] * size
        barrier = threading.Barrier(size)
        self.capturing = False
        self.fakes = [FakeNccl(rank, shared, barrier) for rank in range(size)]
        self.groups = [
            NcclGroup(rank=rank, size=size, process_group=fake, is_capturing=lambda: self.capturing)
            for rank, fake in enumerate(self.fakes)
        ]

    def gather(self, x: torch.Tensor, cuts: list[int]) -> list[torch.Tensor | Exception]:
        found: dict[int, torch.Tensor | Exception] = {}

        def run(rank: int) -> None:
            begin, end = cuts[rank], cuts[rank + 1]
            try:
                found[rank] = self.groups[rank].gather(x[:, begin:end], begin, x.shape[1])
            except (ConfigError, WorkerError) as error:
                found[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self.groups))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[rank] for rank in range(len(self.groups))]


@pytest.mark.parametrize("cuts", [[0, 4, 8], [0, 3, 8], [0, 1, 2, 8], [0, 4, 6, 8]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathers_of_any_widths(cuts: list[int], dtype: torch.dtype) -> None:
    ranks = Ranks(len(cuts) - 1)
    for rows in (1, 5):
        x = torch.randn(rows, 8).to(dtype)
        for result in ranks.gather(x, cuts):
            assert isinstance(result, torch.Tensor) and torch.equal(result, x)


def test_a_capture_reads_nothing_back_and_uses_what_was_learned() -> None:
    ranks = Ranks(2)
    x = torch.randn(3, 8)
    ranks.gather(x, [0, 3, 8])
    assert ranks.fakes[0].calls == 2  # the columns, the pieces
    ranks.capturing = True
    for result in ranks.gather(x, [0, 3, 8]):
        assert isinstance(result, torch.Tensor) and torch.equal(result, x)
    assert ranks.fakes[0].calls == 3
    for error in ranks.gather(x, [0, 4, 8]):
        assert isinstance(error, ConfigError) and "divided in 0 ways" in str(error)


def test_one_width_in_two_divisions() -> None:
    """Rank 0 has the same columns in both."""
    ranks = Ranks(3)
    x = torch.randn(3, 10)
    for cuts in ([0, 4, 7, 10], [0, 4, 8, 10], [0, 4, 7, 10]):
        for result in ranks.gather(x, cuts):
            assert isinstance(result, torch.Tensor) and torch.equal(result, x)
    ranks.capturing = True
    with pytest.raises(
        ConfigError, match=r"4 from 0 at rank 0, is divided in 2 ways.*enforce-eager"
    ):
        ranks.groups[0].gather(x[:, :4], 0, 10)


def test_columns_that_are_no_whole() -> None:
    ranks = Ranks(2)
    x = torch.randn(3, 8)
    found: list[Exception] = []

    def run(rank: int, begin: int) -> None:
        with pytest.raises(WorkerError) as caught:
            ranks.groups[rank].gather(x[:, begin : begin + 3], begin, 8)
        found.append(caught.value)

    threads = [threading.Thread(target=run, args=place) for place in ((0, 0), (1, 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "[(0, 3), (4, 3)], are not one whole of 8" in str(found[0]) == str(found[1])


def test_after_an_abort() -> None:
    ranks = Ranks(1)
    ranks.groups[0].abort("Rank 1 has ended.")
    ranks.groups[0].close()
    assert ranks.fakes[0].aborted
    with pytest.raises(WorkerError, match=r"Rank 1 has ended\."):
        ranks.groups[0].gather(torch.ones(1, 1), 0, 1)


@pytest.mark.skipif(hasattr(torch.distributed, "ProcessGroupNCCL"), reason="this PyTorch has NCCL")
def test_a_pytorch_without_nccl() -> None:
    with pytest.raises(ConfigError, match="has no NCCL"):
        NcclGroup("127.0.0.1:1", rank=0, size=2)
