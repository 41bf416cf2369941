from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch

from quire.kernels.base import Kernels
from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.native import NativeKernels
from quire.kernels.reference import ReferenceKernels

T = TypeVar("T")


@pytest.fixture(scope="session")
def native() -> NativeKernels:
    try:
        return NativeKernels()
    except BuildError as error:
        pytest.skip(f"no native kernels here: {error}")


@pytest.fixture(scope="session")
def reference() -> Kernels:
    return ReferenceKernels()


@pytest.fixture
def with_threads() -> Iterator[Callable[[int, Callable[[], T]], T]]:
    """Calls something with torch set to so many threads."""
    before = torch.get_num_threads()

    def call(threads: int, operation: Callable[[], T]) -> T:
        torch.set_num_threads(threads)
        return operation()

    yield call
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine a small parallel region can wait a time slice for its second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
