"""The front end's connection to the engine core, in this process or in a child process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from quire.config import EngineConfig
from quire.config.parallel import ParallelConfig
from quire.errors import EngineDeadError
from quire.messages import CoreFailed, CoreInput, CoreOutput, EngineReady, Ping, Shutdown
from quire.messages.failures import error_of
from quire.util.cores import pinned
from quire.util.environment import child_environment
from quire.util.interrupts import interrupts_deferred
from quire.util.processes import ending

if TYPE_CHECKING:  # `quire serve` starts the core before it imports the scheduler
    from quire.engine.core import EngineCore

START_POLL_SECONDS = 0.1
RECONNECT_MILLISECONDS = 5
EXIT_GRACE_SECONDS = 5.0
LAST_MESSAGE_MS = 200
"""Until what an ended process had sent has passed through this process's I/O thread."""
PING_SECONDS = 2.0
"""How often `check` is to be called."""


class InlineCore:
    """The core in this process: `receive` runs a step.

    Ctrl-C waits for the end of a step or a message. A step that stopped between planning and computing would
    leave blocks in the prefix cache whose keys and values were never written.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._answers: deque[CoreOutput] = deque()

    def send(self, message: CoreInput) -> None:
        with interrupts_deferred():
            answer = self._core.handle(message)
        if answer is not None:
            self._answers.append(answer)

    def receive(self) -> CoreOutput:
        """The next output. Call only if one is expected."""
        if self._answers:
            return self._answers.popleft()
        with interrupts_deferred():
            output = self._core.step()
            loading = self._core.scheduler.loading
            while loading is not None and loading.transfers.is_held_for_others:
                self._answers.append(self._core.step())  # there may be no other call for long
            return output

    def close(self) -> None:
        self._core.close()


class CoreProcess:
    """A core in a child process, and the socket to it. Blocking; `AsyncLLM` polls the descriptor.

    The process starts at once, and imports torch and compiles the kernels (seconds) before it gets its
    configuration. So create it as early as possible, then import, find the model, and call `configure`.
    """

    def __init__(
        self,
        *,
        kernels: str = "auto",
        parallel: ParallelConfig | None = None,
        cpus: Collection[int] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`kernels` as in `RuntimeConfig`: "reference" needs nothing compiled. parallel: of the engine,
        if it may have several ranks; they start at once too. cpus: that the process may
        use; None: as this one. environment: variables beside this process's."""
        self._directory = tempfile.mkdtemp(prefix="quire-")  # mode 0700: other users cannot connect
        address = f"ipc://{Path(self._directory, 'core.sock')}"
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        # We connect and the core binds: messages sent before it listens are queued here, and a core that
        # has died can never make `send` block.
        self.socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MILLISECONDS)
        self.socket.connect(address)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(CoreOutput).decode
        self._configured = False
        self._asked_to_end = self._closed = False
        self._given_up = self._is_over = False
        self.heartbeat = time.monotonic()
        """When the latest message came."""
        self.silent_checks = 0
        """Calls of `check` since then."""
        with pinned(cpus):
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "quire.engine.core_process",
                    address,
                    kernels,
                    msgspec.json.encode(parallel or ParallelConfig()).decode(),
                ],
                stdin=subprocess.PIPE,  # when it ends, the core knows that this process has ended
                start_new_session=True,  # on Ctrl-C, this process decides
                env={**child_environment(), **(environment or {})},
            )

    def configure(self, config: EngineConfig) -> None:
        """Load this model. Call once, with a `config` from `locate`."""
        assert not self._configured
        self._configured = True
        self.socket.send(msgspec.json.encode(config))

    def send(self, message: CoreInput) -> None:
        self.socket.send(self._encode(message))

    def wait_ready(self) -> EngineReady:
        """Block until the model is loaded. Raises the core's error."""
        while (ready := self.poll_ready()) is None:
            pass
        return ready

    def poll_ready(self) -> EngineReady | None:
        """As `wait_ready`; None if it takes longer than a moment."""
        if self._given_up:
            raise EngineDeadError("The start of the engine core was given up.")
        message = self.receive(timeout=START_POLL_SECONDS)
        if isinstance(message, CoreFailed):
            raise error_of(message.failure)
        return message if isinstance(message, EngineReady) else None

    def stop_waiting(self) -> None:
        """Make `wait_ready` return, from another thread."""
        self._given_up = True

    def receive(self, *, timeout: float | None = None) -> CoreOutput | None:
        """The next output; None after `timeout` seconds. Raises `EngineDeadError` if the core died."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            message = self.try_receive()
            if message is not None:
                return message
            if (reason := self.exited()) is not None:
                raise EngineDeadError(reason)
            if deadline is not None and time.monotonic() >= deadline:
                return None
            self.socket.poll(1000 if timeout is None else int(timeout * 1000) + 1)

    def try_receive(self) -> CoreOutput | None:
        """The next output, or None if there is none."""
        try:
            received = self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        message: CoreOutput = self._decode(received)
        self.heartbeat, self.silent_checks = time.monotonic(), 0
        return message

    def exited(self) -> str | None:
        """The reason, if the process has ended and all that it had sent is read."""
        if self.process.poll() is None:
            return None
        if not self._closed and self.socket.poll(0 if self._is_over else LAST_MESSAGE_MS):
            return None
        self._is_over = True
        name = f"The engine core (pid {self.process.pid})"
        return f"{name} {ending(self.process.returncode)}."

    def check(self) -> str | None:
        """Call it every `PING_SECONDS`: `exited`, and a ping for a core that sends nothing."""
        if (reason := self.exited()) is None:
            if self.silent_checks:
                self.send(Ping(self.silent_checks))
            self.silent_checks += 1
        return reason

    def states(self, timeout: float) -> list[str]:
        """Of each core: "ok", "stopped", or "silent" if it has sent nothing for this many seconds."""
        if self.exited() is not None:
            return ["stopped"]
        return ["silent" if time.monotonic() - self.heartbeat > timeout else "ok"]

    @property
    def descriptors(self) -> list[int]:
        """Readable when there may be messages. Edge-triggered, and `send` may consume the edge."""
        return [int(self.socket.getsockopt(zmq.FD))]

    def ask_to_end(self) -> None:
        """Begin `close`, without waiting. Idempotent."""
        if self._asked_to_end:
            return
        self._asked_to_end = True
        if self.process.poll() is None and not self._configured:
            # It has no state yet, and would first finish its imports. The compiler ends with it.
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.poll() is None:
            self.send(Shutdown())
        if self.process.stdin is not None:
            self.process.stdin.close()

    def close(self) -> None:
        """End the core: with a message, then with a signal. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.ask_to_end()
        try:
            self.process.wait(EXIT_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.socket.close()
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)
