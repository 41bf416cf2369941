"""A rank that follows, however its process was started and whatever kind of link it has."""

from __future__ import annotations

import gc
from dataclasses import replace

from quire.config import EngineConfig
from quire.distributed.links import Link
from quire.engine.assemble import worker_spec
from quire.engine.setup import resolve
from quire.executor.groups import join
from quire.executor.ranks import Meeting
from quire.executor.worker import WorkerLoop
from quire.kernels.cpu.build import report_compiling
from quire.runner.footprint import spec_of_rank
from quire.runner.worker import Worker
from quire.util.logging import setup_logging


def run_rank(link: Link, number: int, meeting: Meeting, model: str = "") -> int:
    """Until the link ends. meeting: of the stage's ranks. model: where this machine has the checkpoint, if
    not where the configuration says. Returns the exit status."""

    def make_worker(config: EngineConfig, max_model_len: int) -> Worker:
        setup_logging(log_format=config.runtime.log_format)
        if model:
            config = replace(config, model=replace(config.model, model=model))
        report_compiling()
        spec = spec_of_rank(worker_spec(resolve(config), max_model_len), config.parallel, number)
        group = None
        if config.parallel.tensor_parallel_size > 1:
            group = join(config, number, meeting)
        worker = Worker(config, spec, group=group)
        gc.freeze()
        gc.enable()
        return worker

    return WorkerLoop(link, make_worker).run()
