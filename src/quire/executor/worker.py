"""The loop of a rank that does not sample: it carries out the plans and calls that come over its link.

An exception that its caller cannot handle is sent as one message, and the process ends. A message that is not
of the protocol is logged, and changes nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from quire.config import EngineConfig
from quire.distributed.links import Link, LinkError
from quire.errors import QuireError
from quire.messages import AddAdapter, DropAdapter, Failure, Shutdown, Sleep, TransferResult, WakeUp
from quire.messages.failures import failure_of
from quire.messages.worker import (
    AdapterEnded,
    Carried,
    Loaded,
    LoadModel,
    LoadsEnded,
    OpenCache,
    Prepare,
    ReportTables,
    RunStep,
    Tables,
    WorkerFailed,
    WorkerInput,
    WorkerOutput,
)
from quire.runner.following import Follower, digest_of, tables_of
from quire.runner.worker import Worker

logger = logging.getLogger("quire.executor")

ADAPTER_POLL_SECONDS = 0.01
LOAD_POLL_SECONDS = 0.001
MakeWorker = Callable[[EngineConfig, LoadModel], Worker]
"""(message's config, message) -> this rank's worker."""


class WorkerLoop:
    """make_worker: called once, when the configuration has come."""

    def __init__(self, link: Link, make_worker: MakeWorker) -> None:
        self._link = link
        self._make_worker = make_worker
        self._worker: Worker | None = None
        self._follower: Follower | None = None
        self._loading: set[str] = set()
        """Adapters."""
        self._decode = msgspec.msgpack.Decoder(WorkerInput).decode

    def run(self) -> int:
        """Until the link ends. Returns the exit status."""
        try:
            while True:
                store = None if self._worker is None else self._worker.store
                wait = ADAPTER_POLL_SECONDS if self._loading else None
                if store is not None and store.is_loading:
                    wait = LOAD_POLL_SECONDS
                payload = self._link.receive(timeout=wait)
                if payload is not None and not self._take(payload):
                    return 0
                if self._loading:
                    self._poll_adapters()
                if store is not None:
                    self._report(store.collect())
        except LinkError:
            return 0
        except Exception as error:
            if not isinstance(error, QuireError):
                logger.exception("a rank failed")
            self._send(WorkerFailed(failure_of(error, "its log has the exception")))
            return 1

    def _take(self, payload: bytes) -> bool:
        """Returns whether to go on."""
        try:
            message: WorkerInput = self._decode(payload)
        except msgspec.DecodeError as error:
            logger.error("a message that is not of the protocol was dropped: %s", error)
            return True
        if isinstance(message, RunStep) and self._follower is not None:
            self._report(self._follower.run(message))
        elif isinstance(message, Shutdown):
            return False
        elif isinstance(message, LoadModel):
            self._load(message)
        elif self._worker is None or not self._handle(self._worker, message):
            logger.error("a %s came out of turn and was dropped", type(message).__name__)
        return True

    def _load(self, message: LoadModel) -> None:
        if self._worker is not None:
            logger.error("a second model was refused")
            return
        if message.cores:
            os.sched_setaffinity(0, message.cores)
        config = msgspec.json.decode(message.config, type=EngineConfig)
        self._worker = self._make_worker(config, message)
        found = self._worker.load()
        memory = found.memory
        self._send(Loaded(found.weight_bytes, found.step_bytes, memory.total, memory.available))

    def _handle(self, worker: Worker, message: WorkerInput) -> bool:
        """Returns False for a message that has no meaning now."""
        awake = worker.runner is not None
        if isinstance(message, OpenCache) and awake:
            self._call(lambda: worker.open_cache(message.num_blocks, message.max_model_len))
        elif isinstance(message, Sleep) and awake:
            self._loading.clear()
            self._call(lambda: worker.sleep(message.level))
        elif isinstance(message, WakeUp) and not awake:
            self._call(worker.wake_up)
        elif isinstance(message, Prepare):
            worker.prepare()
        elif isinstance(message, ReportTables) and worker.runner is not None:
            self._send(Tables(digest_of(tables_of(worker.runner.seats, message.known))))
        elif isinstance(message, AddAdapter) and worker.adapters is not None:
            self._loading.add(message.key)
            worker.adapters.load(message.key, Path(message.path))
        elif isinstance(message, DropAdapter) and worker.adapters is not None:
            self._loading.discard(message.key)
            worker.adapters.drop(message.key)
        else:
            return False
        return True

    def _call(self, call: Callable[[], None]) -> None:
        """A typed error goes to the caller; the worker is as it was."""
        failure: Failure | None = None
        try:
            call()
        except QuireError as error:
            failure = failure_of(error, "")
        runner = None if self._worker is None else self._worker.runner
        self._follower = None if runner is None else Follower(runner)
        self._send(Carried(failure))

    def _poll_adapters(self) -> None:
        assert self._worker is not None
        if self._worker.adapters is None:
            return
        for load in self._worker.adapters.poll():
            self._loading.discard(load.key)
            self._send(AdapterEnded(load.key, load.error))

    def _report(self, results: Sequence[TransferResult]) -> None:
        if results:
            self._send(LoadsEnded(list(results)))

    def _send(self, message: WorkerOutput) -> None:
        self._link.send(msgspec.msgpack.encode(message))
