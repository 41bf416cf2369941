"""The engine core's own process: `python -m quire.engine.core_process ADDRESS KERNELS PARALLEL`.

ZeroMQ over a Unix socket in a private directory, msgspec structs, no pickle. The first message is the
configuration. It may come late, because the slowest parts of the start, importing torch and compiling the
kernels, do not depend on it. The first answer is `EngineReady` or `CoreFailed`. Between steps the loop
handles the messages that have arrived. Without work it lets the executor prepare, one piece at a time,
and then blocks, so an idle engine uses no processor time. It exits on `Shutdown`, and at once when its
standard input ends, which happens however the parent dies.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import signal
import sys
import threading
from pathlib import Path

import msgspec
import zmq

from quire.config import EngineConfig
from quire.config.parallel import ParallelConfig
from quire.engine.core import EngineCore
from quire.errors import QuireError
from quire.executor.death import exit_now, exit_when_closed
from quire.executor.processes import ProcessRanks, ranks_of
from quire.kernels.cpu.build import report_compiling
from quire.messages import CoreFailed, CoreInput, CoreOutput, Shutdown
from quire.messages.failures import failure_of
from quire.util.logging import setup_logging

logger = logging.getLogger("quire.engine")

QUIET_MS = 50
"""The engine is idle after this time without work and without a message, so that a client that sends one
request after another does not wait for a preparation."""


def main(address: str, kernels: str, parallel: str) -> int:
    gc.disable()  # until the start is over: it creates hundreds of thousands of objects that stay
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the front end decides when the core ends
    folder = Path(address.removeprefix("ipc://")).parent
    exit_when_closed([sys.stdin.fileno()], lambda: shutil.rmtree(folder, ignore_errors=True))
    ranks = ranks_of(msgspec.json.decode(parallel, type=ParallelConfig))  # they import torch too
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.bind(address)
    try:
        return _run(_Link(socket), kernels, ranks)
    finally:
        if ranks is not None:
            ranks.close()
        socket.close()
        context.term()


class _Link:
    """Typed messages over one socket."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(CoreInput).decode
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)

    def watch(self, descriptor: int) -> None:
        """`receive` returns when it becomes readable."""
        self._poller.register(descriptor, zmq.POLLIN)

    def receive_config(self) -> EngineConfig:
        return msgspec.json.decode(self._socket.recv(), type=EngineConfig)

    def send(self, message: CoreOutput) -> None:
        """Never blocks: without a peer (the parent has ended) the message is dropped."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(self._encode(message), zmq.NOBLOCK)

    def receive(self, *, wait_ms: int | None) -> list[CoreInput]:
        """All messages that have come, after waiting at most this long for one (None: without limit)."""
        if wait_ms != 0:
            self._poller.poll(wait_ms)
        messages = []
        while int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            messages.append(self._decode(self._socket.recv(zmq.NOBLOCK)))
        return messages


def _run(link: _Link, kernels: str, ranks: ProcessRanks | None) -> int:
    try:
        compiling = threading.Thread(target=_compile_kernels, args=(kernels,))
        compiling.start()
        import quire.executor.inline  # noqa: F401 (torch, while the configuration is on its way)
        from quire.engine.assemble import build_core, executor_of
        from quire.engine.setup import resolve

        config = link.receive_config()
        setup_logging(log_format=config.runtime.log_format)
        report_compiling()
        compiling.join()
        core, ready = build_core(config, resolve(config), executor_of(ranks, pin=True))
    except Exception as error:
        link.send(CoreFailed(failure_of(error, "The engine core failed")))
        if not isinstance(error, QuireError):
            logger.exception("the engine core failed to start")
        return 1
    gc.freeze()  # torch's 200,000 objects stay; traversing them is a pause of 0.1 s
    gc.enable()
    link.send(ready)
    if core.executor.watched is not None:
        link.watch(core.executor.watched)
    try:
        _serve(core, link)
    except Exception as error:
        logger.exception("the engine core failed")
        _save_record(core, config.scheduler.decision_record_dir)
        link.send(CoreFailed(failure_of(error, "The engine core failed")))
        return 1
    finally:
        core.close()
    return 0


def _save_record(core: EngineCore, directory: str | None) -> None:
    """Before the process ends."""
    record = core.scheduler.record
    if directory is None or record is None:
        return
    from quire.engine.record_files import save

    with contextlib.suppress(Exception):  # of a state that the failure has left
        save(directory, [record.dump()], "the engine core failed")


def _compile_kernels(kernels: str) -> None:
    """On a first start, in parallel with the import of torch: both take more than a second. Later code
    finds the kernels built, or gets the same error and reports it."""
    if kernels == "reference":
        return
    from quire.kernels.cpu.build import BuildError, build

    with contextlib.suppress(BuildError):
        build()


def _serve(core: EngineCore, link: _Link) -> None:
    may_prepare = True
    while True:
        wait_ms = 0 if core.has_work else QUIET_MS if may_prepare else None
        messages = link.receive(wait_ms=wait_ms)
        for message in messages:
            if isinstance(message, Shutdown):
                return
            answer = core.handle(message)
            if answer is not None:
                link.send(answer)
        core.executor.check()
        if core.has_work:
            link.send(core.step())
            may_prepare = True
        else:
            may_prepare = bool(messages) or core.prepare()


if __name__ == "__main__":
    exit_now(main(*sys.argv[1:]))
