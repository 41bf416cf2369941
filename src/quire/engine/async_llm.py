"""The asyncio front end for serving: many requests at once over one engine-core process, or several."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from quire.config import EngineConfig
from quire.engine.async_adapters import AsyncAdapters
from quire.engine.core_client import PING_SECONDS
from quire.engine.front_end import Effects, FrontEnd
from quire.engine.input_processor import PromptInput
from quire.engine.recovery import is_restarting
from quire.engine.replica_cores import ReplicaCores
from quire.engine.setup import ServedModel, locate, resolve, serve_model
from quire.engine.stream import RequestStream
from quire.errors import EngineDeadError
from quire.lora.request import LoRARequest
from quire.messages import (
    Answer,
    ControlAction,
    CoreFailed,
    CoreInput,
    CoreOutput,
    EngineReady,
    Inspect,
    ReadRecord,
    ResetPrefixCache,
    SchedulerStats,
    Sleep,
    StepOutputs,
    WakeUp,
)
from quire.messages.failures import error_of
from quire.messages.state import CoreState
from quire.metrics import MetricsSink
from quire.outputs import RequestOutput
from quire.placement import Placement
from quire.sampling_params import BeamSearchParams, PoolingParams, SamplingParams
from quire.text.parsing.base import ThinkingTokens

DRAIN_BATCH = 16
"""Messages that are handled before other tasks get a turn."""
DEFAULT_HEALTH_TIMEOUT = 60.0
RESTART_SECONDS = 0.05
"""How often a core that is being started again is looked at."""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the scheduler loop makes progress; that the process exists is not enough."""

    alive: bool
    heartbeat_age: float
    """Seconds since the loop's last message."""
    reason: str
    replicas: tuple[str, ...] = ()
    """Of each engine core: "ok", "silent", "restarting" or "stopped". Alive: one is ok or will be."""


class AsyncLLM:
    """One model, served. Build with `await AsyncLLM.start(config)`; all calls from one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        core: ReplicaCores,
        model: ServedModel,
        ready: EngineReady,
    ) -> None:
        self.config = config
        self.model = model
        self.ready = ready
        self._core = core
        replicas = config.parallel.data_parallel_size
        running = replicas * config.scheduler.max_num_seqs
        limits = dataclasses.replace(config.scheduler, max_num_seqs=running)
        self._front = FrontEnd(model, limits, lora=config.lora)
        self.adapters = AsyncAdapters(
            self._front.adapters, model.names, self._send_all, self._control
        )
        self._streams: dict[str, RequestStream] = {}
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._stats_listeners: list[Callable[[StepOutputs], None]] = []
        self._closing = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._descriptors = core.descriptors
        for descriptor in self._descriptors:
            self._loop.add_reader(descriptor, self._drain)
        self._pinger = asyncio.create_task(self._ping(), name="quire-ping")

    @classmethod
    async def start(cls, config: EngineConfig, core: ReplicaCores | None = None) -> AsyncLLM:
        """Spawn the engine core or cores, load tokenizer and template meanwhile, and wait until they serve.

        core: one that was started earlier and not configured yet; this object closes it.
        Raises the error of the start: `ConfigError`, `ModelError`, `MemoryFitError`, ...
        """
        core = core or ReplicaCores(config, restarts=True)
        waiting: asyncio.Future[EngineReady] | None = None
        try:
            located = await asyncio.to_thread(locate, config)
            resolved = resolve(located)
            core.configure(located)
            waiting = asyncio.ensure_future(asyncio.to_thread(core.wait_ready))
            model = await asyncio.to_thread(serve_model, located, resolved)
            ready = await asyncio.shield(waiting)
        except BaseException:
            core.stop_waiting()
            if waiting is not None:
                # A socket may be used by one thread at a time: let the waiting thread return before
                # closing it.
                await asyncio.wait([waiting])
                waiting.exception()
            await asyncio.to_thread(core.close)
            raise
        # With max_model_len auto, the core has decided the length when it sized its cache.
        model = dataclasses.replace(model, max_model_len=ready.max_model_len)
        llm = cls(located, core, model, ready)
        try:
            await llm.adapters.start()
        except BaseException:
            await llm.shutdown()
            raise
        return llm

    # --- requests ---------------------------------------------------------------------------------

    def submit(
        self,
        prompt: PromptInput,
        params: SamplingParams | PoolingParams | BeamSearchParams,
        *,
        request_id: str | None = None,
        placement: Placement = Placement(),
        add_special_tokens: bool = True,
        thinking: ThinkingTokens | None = None,
        deadline: float | None = None,
    ) -> RequestStream:
        """Validate, tokenize and queue a request. A grammar should have passed `check_grammar`. deadline: see
        `FrontEnd.read`.

        Raises `RequestError` for a request that cannot be served, `QueueFullError` if too many wait,
        `EngineSleepingError` if the engine sleeps, `EngineDeadError` if it has died. After
        this returns, the request ends in exactly one finish reason.
        """
        request = self._front.read(
            prompt,
            params,
            request_id=request_id,
            placement=placement,
            add_special_tokens=add_special_tokens,
            thinking=thinking,
            deadline=deadline,
        )
        self._core.check_refused(request.sequences)
        self._front.check_queue(request)
        effects = self._front.start(request)
        ids = [message.request_id for message in request.sequences]
        stream = RequestStream(request.request_id, request.prompt_token_ids, self.abort, ids)
        self._streams[request.request_id] = stream
        self._apply(effects)
        return stream

    async def generate(
        self,
        prompt: PromptInput,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """`submit` as an iterator, vLLM's form. The adapter is read first, if it is new.

        Raises also `ModelError` for an adapter that cannot be served.
        """
        placement = Placement()
        if lora_request is not None:
            placement = Placement(adapter=await self.adapters.use(lora_request))
        async for output in self.submit(prompt, params, request_id=request_id, placement=placement):
            yield output

    def abort(self, request_id: str) -> None:
        """End a request now. Unknown or finished ids are ignored."""
        self._apply(self._front.abort([request_id]))

    def check_grammar(self, params: SamplingParams) -> Sequence[str]:
        """Compile the grammar once, in a process that can be killed. It blocks, so call it in a thread.
        Returns warnings for the client.

        Raises `InvalidParameterError` with the reason.
        """
        return self._front.check_grammar(params)

    # --- the engine as a whole --------------------------------------------------------------------

    async def reset_prefix_cache(self) -> bool:
        """Drop all cached prefixes. Returns True when it is done."""
        await self._control(ResetPrefixCache())
        return True

    async def sleep(self, level: int = 1) -> None:
        """Refuse new requests, wait for running ones, and free the memory of the KV cache (level 1) or
        also of the weights (2).

        If it is cancelled while it waits for requests, the engine stays awake. `wake_up` ends the wait
        too: then it raises `EngineError`."""
        await self._control(Sleep(level))

    async def wake_up(self) -> None:
        """Allocate the memory again and serve. If that raises, the engine still sleeps."""
        await self._control(WakeUp())

    @property
    def is_sleeping(self) -> bool:
        """Whether it sleeps or is about to: it refuses requests."""
        return self._front.is_sleeping

    async def inspect(self) -> list[CoreState]:
        """The state of each engine core that serves. It is read between two steps, so it may take one."""
        return (await self._control(Inspect())).states

    async def records(self) -> list[bytes]:
        """The record of decisions of each core, for `quire.scheduler.record_reader`."""
        return (await self._control(ReadRecord())).records

    async def _control(self, action: ControlAction) -> Answer:
        """Carry out a control call. Raises the error of the call."""
        control = self._front.new_control(action)
        call = self._calls[control.id] = self._loop.create_future()
        try:
            self._apply(self._front.start_control(control))
            answer: Answer = await call
        finally:
            self._front.cancel_control(control)
            self._calls.pop(control.id, None)
        if answer.failure is not None:
            raise error_of(answer.failure)
        return answer

    # --- the core's messages ----------------------------------------------------------------------

    def _send(self, message: CoreInput) -> None:
        """Send, then check for messages: ZeroMQ's descriptor is edge-triggered, and sending may consume
        the edge."""
        self._core.send(message)
        self._loop.call_soon(self._drain)

    def _send_all(self, messages: Sequence[CoreInput]) -> None:
        if not self.is_dead:
            self._apply(self._front.settle(Effects(send=list(messages))))

    def _drain(self) -> None:
        """Handle the messages that have come, and let other tasks run from time to time."""
        try:
            for _ in range(DRAIN_BATCH):
                if self.is_dead or self._closing:
                    return
                message = self._core.try_receive()
                if message is None:
                    self._look_again()
                    return
                self._take(message)
            self._loop.call_soon(self._drain)
        except Exception as error:
            self._die(f"The front end failed on the engine's output ({type(error).__name__}).")
            raise

    def _look_again(self) -> None:
        """A core that is started again goes through stages that no descriptor tells of."""
        if self._core.is_restarting and self._timer is None:
            self._timer = self._loop.call_later(RESTART_SECONDS, self._restart)

    def _restart(self) -> None:
        self._timer = None
        self._drain()

    def _take(self, message: CoreOutput) -> None:
        if isinstance(message, CoreFailed):
            self._die(message.failure.message)
            return
        self._apply(self._front.take(message))
        if isinstance(message, StepOutputs):
            for listener in self._stats_listeners:
                listener(message)

    def _apply(self, effects: Effects) -> None:
        for message in effects.send:
            self._send(message)
        for output in effects.outputs:
            stream = self._streams[output.request_id]
            if output.finished:
                del self._streams[output.request_id]
            stream.put(output)
        for answer in effects.answers:
            call = self._calls.pop(answer.id, None)
            if call is not None and not call.done():  # else its caller has been cancelled
                call.set_result(answer)

    def _die(self, message: str) -> None:
        """The engine has died: all live requests end with the error, and later ones are refused."""
        if self.is_dead:
            return
        self._stop_reading()
        self._fail(message)

    def _stop_reading(self) -> None:
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)

    def _fail(self, message: str) -> None:
        self._front.fail(message)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put(EngineDeadError(message))
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.done():
                call.set_exception(EngineDeadError(message))

    async def _ping(self) -> None:
        """Notice a core that has died or does not answer."""
        while not self.is_dead:
            await asyncio.sleep(PING_SECONDS)
            if (reason := self._core.check()) is not None:
                self._die(reason)
            self._drain()

    # --- for operators ----------------------------------------------------------------------------

    def health(self, timeout: float = DEFAULT_HEALTH_TIMEOUT) -> Health:
        """Whether the latest message of the scheduler loop is recent."""
        age = time.monotonic() - self._core.heartbeat
        if not self.is_dead and (reason := self._core.exited()) is not None:
            self._die(reason)
        states = tuple(self._core.states(timeout))
        if self._front.dead is not None:
            return Health(False, age, str(self._front.dead), states)
        if is_restarting(states):
            return Health(True, 0.0, "restarting", states)
        if age > timeout:
            reason = f"The scheduler loop has not answered for {age:.0f} s."
            return Health(False, age, reason, states)
        return Health(True, age, "ok", states)

    @property
    def is_dead(self) -> bool:
        return self._front.dead is not None

    @property
    def stats(self) -> SchedulerStats:
        """The scheduler's state after the last step."""
        return self._front.stats

    def attach_metrics(self, metrics: MetricsSink, *, log_prefixes: bool = False) -> None:
        """Report all events to `metrics` from now on. log_prefixes: log each request's `PrefixReport`."""
        self._front.report_to(metrics, log_prefixes=log_prefixes)

    def add_stats_listener(self, callback: Callable[[StepOutputs], None]) -> None:
        self._stats_listeners.append(callback)

    async def shutdown(self) -> None:
        """Abort all requests and end the core. Idempotent."""
        if self._closing:
            return
        self._apply(self._front.abort(self._front.request_ids))
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        self._pinger.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._pinger
        self._stop_reading()
        self._fail("The engine has been shut down.")
        self._front.close()
        await asyncio.to_thread(self._core.close)
