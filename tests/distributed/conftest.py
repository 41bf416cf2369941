from __future__ import annotations

import pytest

from quire.kernels.cpu.build import BuildError
from quire.kernels.cpu.library import load_library


@pytest.fixture(scope="session")
def native() -> None:
    """For ranks that share memory."""
    try:
        load_library()
    except BuildError as error:
        pytest.skip(f"no native kernels here: {error}")
