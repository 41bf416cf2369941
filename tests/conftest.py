"""What every test shares: two compute threads, reproducible Hypothesis, no network, no GPU by surprise."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

# Before anything imports torch: it reads these once.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import HealthCheck, settings

# A slow shared machine is not a bug in the code under test, so there is no deadline; CI draws the same
# examples each time, so that a red build is red again when looked at.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where no CUDA device is, by name, so that the summary says so."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def logging_left_as_found() -> Iterator[None]:
    """A command under test sets up the process's log lines; the next test (caplog) must not see that."""
    loggers = [logging.getLogger(name) for name in ("quire", "uvicorn.error", "uvicorn.access")]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory):
    """`quire serve` on the built-in model, in a process of its own, ready; stopped in the end."""
    import asyncio

    from quire.cli.demo.server import ServerProcess

    server = ServerProcess.start({}, tmp_path_factory.mktemp("server"))
    try:
        asyncio.run(server.wait_ready())
        yield server
    finally:
        server.stop()
