"""A rank that follows, however its process was started and whatever kind of link it has."""

from __future__ import annotations

import gc
from dataclasses import replace

from quire.config import EngineConfig
from quire.distributed.links import Link
from quire.engine.assemble import worker_spec
from quire.engine.gpu import order_as_nvml
from quire.engine.setup import resolve
from quire.executor.groups import Meeting
from quire.executor.worker import WorkerLoop
from quire.kernels.cpu.build import report_compiling
from quire.messages.worker import LoadModel
from quire.runner.footprint import spec_of_rank
from quire.runner.worker import Worker
from quire.util.logging import setup_logging


def run_rank(link: Link, number: int, memory: int = -1, model: str = "") -> int:
    """Until the link ends. memory: the descriptor of what the machine's ranks share, if they share
    any. model: where this machine has the checkpoint, if not where the configuration says. Returns
    the exit status."""

    order_as_nvml()

    def make_worker(config: EngineConfig, message: LoadModel) -> Worker:
        setup_logging(log_format=config.runtime.log_format)
        if model:
            config = replace(config, model=replace(config.model, model=model))
        report_compiling()
        whole = worker_spec(resolve(config), message.max_model_len)
        shared = message.group == "shared_memory"
        meeting = Meeting(message.group, message.address, memory if shared else -1)
        worker = Worker(
            config,
            spec_of_rank(whole, config.parallel, number),
            group=meeting.join(config, whole, number),
            channels=meeting.connect(config, whole, number),
        )
        gc.freeze()
        gc.enable()
        return worker

    return WorkerLoop(link, make_worker).run()
