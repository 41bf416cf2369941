"""One worker in this very process and thread."""

from __future__ import annotations

from quire.config import EngineConfig
from quire.executor.base import Executor
from quire.runner.footprint import WorkerSpec
from quire.runner.worker import Worker
from quire.sampling.sampler import GrammarSource


def inline_executor(config: EngineConfig, spec: WorkerSpec, grammars: GrammarSource) -> Executor:
    """A worker has an executor's methods already. Raises `ConfigError` if its device cannot be used."""
    return Worker(config, spec, grammars=grammars)
