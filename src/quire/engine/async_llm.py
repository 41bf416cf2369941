"""The serving front end: many requests at once over one engine-core process, in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import msgspec
import zmq

from quire.config import EngineConfig
from quire.engine.beam_search import BeamSearch, BeamStream, step_params
from quire.engine.controls import Controls
from quire.engine.core_client import CoreProcess
from quire.engine.failures import error_of
from quire.engine.input_processor import EngineRequest, InputProcessor, PromptInput
from quire.engine.output_processor import OutputProcessor
from quire.engine.setup import ServedModel, locate, resolve, serve_model
from quire.errors import (
    EngineDeadError,
    EngineSleepingError,
    InvalidParameterError,
    QueueFullError,
)
from quire.messages import (
    AbortRequests,
    Answer,
    ControlAction,
    CoreFailed,
    CoreInput,
    CoreOutput,
    EngineReady,
    Ping,
    Pong,
    ResetPrefixCache,
    SchedulerStats,
    Sleep,
    StepOutputs,
    WakeUp,
)
from quire.metrics import MetricsSink
from quire.outputs import RequestOutput
from quire.placement import Placement
from quire.sampling_params import BeamSearchParams, PoolingParams, SamplingParams
from quire.structured.checker import GrammarChecker
from quire.text.parsing.base import ThinkingTokens

PING_SECONDS = 2.0
DRAIN_BATCH = 16
"""Messages taken in before other tasks get a turn."""
DEFAULT_HEALTH_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the scheduler loop turns: not whether a process exists."""

    alive: bool
    heartbeat_age: float
    """Seconds since the loop last answered or produced anything."""
    reason: str


class RequestStream:
    """Outputs of one request, in order, ending with the one that is `finished`.

    Raises `EngineDeadError` from iteration if the engine dies. Leaving early (cancellation, `aclose`,
    garbage) should go through `abort`, which is idempotent.
    """

    def __init__(self, engine: AsyncLLM, request: EngineRequest) -> None:
        self.request_id = request.request_id
        self.prompt_token_ids = request.prompt_token_ids
        self._engine = engine
        self._outputs: deque[RequestOutput | Exception] = deque()
        self._arrived = asyncio.Event()
        self._over = False

    def abort(self) -> None:
        """End the request now; iteration then ends with finish_reason "abort"."""
        self._engine.abort(self.request_id)

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[RequestOutput]:
        try:
            while not self._over:
                while not self._outputs:
                    self._arrived.clear()
                    await self._arrived.wait()
                item = self._outputs.popleft()
                if isinstance(item, Exception):
                    self._over = True
                    raise item
                self._over = item.finished
                yield item
        finally:
            if not self._over:
                self.abort()

    def put(self, item: RequestOutput | Exception) -> None:
        """Called by the engine."""
        self._outputs.append(item)
        self._arrived.set()


class AsyncLLM:
    """One model, served. Build with `await AsyncLLM.start(config)`; all calls from one event loop."""

    def __init__(
        self, config: EngineConfig, core: CoreProcess, model: ServedModel, ready: EngineReady
    ) -> None:
        self.config = config
        self.model = model
        self.ready = ready
        self.stats = SchedulerStats()
        self._core = core
        self._input = InputProcessor(model, has_head=model.spec.has_head)
        self._checker = GrammarChecker(
            model.tokenizer, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids
        )
        self._controls = Controls()
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._output = OutputProcessor(
            model.tokenizer, stream_interval=config.scheduler.stream_interval
        )
        self._streams: dict[str, RequestStream] = {}
        self._searches: set[BeamStream] = set()
        self._stats_listeners: list[Callable[[StepOutputs], None]] = []
        self._heartbeat = time.monotonic()
        self._dead: EngineDeadError | None = None
        self._finish_times: deque[float] = deque(maxlen=64)
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(core.socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._drain)
        self._pinger = asyncio.create_task(self._ping(), name="quire-ping")

    @classmethod
    async def start(cls, config: EngineConfig, core: CoreProcess | None = None) -> AsyncLLM:
        """Spawn the engine core, load tokenizer and template meanwhile, and wait until it serves.

        core: one that was started earlier and not configured yet; it is ours to close from now on.
        Raises what kept it from starting: `ConfigError`, `ModelError`, `MemoryFitError`, ...
        """
        core = core or CoreProcess(kernels=config.runtime.kernels)
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
                # A socket has one user at a time: let the waiting thread go before closing it.
                await asyncio.wait([waiting])
                waiting.exception()
            await asyncio.to_thread(core.close)
            raise
        # The core sized its cache last: with max_model_len auto, its length is the one that holds.
        model = dataclasses.replace(model, max_model_len=ready.max_model_len)
        return cls(located, core, model, ready)

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
    ) -> RequestStream | BeamStream:
        """Validate, tokenize and queue a request. A grammar should have passed `check_grammar`.

        Raises `RequestError` for a request that cannot be served, `QueueFullError` when too many wait,
        `EngineDeadError` when there is no engine. After this returns, the request ends in exactly
        one finish reason.
        """
        if self._dead is not None:
            raise self._dead
        if self._controls.is_sleeping:
            raise EngineSleepingError("The engine sleeps; wake it up first (POST /wake_up).")
        if request_id is not None and request_id in self._streams:
            raise InvalidParameterError(
                f"request_id {request_id!r} is in use.", param="request_id", value=request_id
            )
        request = self._input.process(
            prompt,
            params,
            request_id=request_id,
            placement=placement,
            add_special_tokens=add_special_tokens,
            thinking=thinking,
        )
        self._check_queue(request)
        if isinstance(params, BeamSearchParams):
            return self._search(request, params)
        return self._launch(request)

    def _launch(self, request: EngineRequest) -> RequestStream:
        if self._dead is not None:
            raise self._dead
        stream = RequestStream(self, request)
        self._streams[request.request_id] = stream
        self._output.add(request)
        for sequence in request.sequences:
            self._send(sequence)
        return stream

    def _search(self, request: EngineRequest, params: BeamSearchParams) -> BeamStream:
        """A search whose beams are requests of their own. They are not turned away by a full queue, and keep
        the place in it that the search has."""
        step = step_params(params, self.model.vocab_size)

        def extend(token_ids: list[int]) -> RequestStream:
            beam = self._input.process(
                token_ids, step, placement=request.placement, max_logprobs=-1
            )
            beam.sequences[0] = msgspec.structs.replace(
                beam.sequences[0], arrival_time=request.arrival_ts
            )
            return self._launch(beam)

        search = BeamSearch(
            request.prompt_token_ids, params, self.model.eos_token_ids, request.max_tokens
        )
        return BeamStream(
            request, search, self.model.tokenizer, extend, self._searches, self._release_sleeps
        )

    async def generate(
        self, prompt: PromptInput, params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """`submit`, iterated: vLLM's spelling."""
        async for output in self.submit(prompt, params, request_id=request_id):
            yield output

    def abort(self, request_id: str) -> None:
        """End a request now. Unknown or finished ids are ignored."""
        ids, output = self._output.abort(request_id)
        if ids and self._dead is None:
            self._send(AbortRequests(ids))
        if output is not None:
            self._deliver(output)

    def check_grammar(self, params: SamplingParams) -> Sequence[str]:
        """Compile the grammar once, in a process that can be killed: blocking, for a thread. The engine core,
        which compiles it again, is not to meet one that never ends. Returns what to warn the client of.

        Raises `InvalidParameterError` with the reason.
        """
        wanted = self._input.grammar(params)
        if wanted is None:
            return ()
        self._checker.check(wanted.spec)
        return wanted.warnings

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. Returns True when it is done."""
        await self._control(ResetPrefixCache())
        return True

    async def sleep(self, level: int = 1) -> None:
        """Take no more requests, wait for those that run, and give back the KV cache's memory (level 1) or
        the weights' too (2).

        Cancelled while it waits for requests, it is off. `wake_up` calls it off too: then it raises
        `EngineError`."""
        await self._control(Sleep(level))

    async def wake_up(self) -> None:
        """Serve again. Raises what keeps the engine from it; it then still sleeps."""
        for answer in self._controls.call_off():
            self._resolve(answer)
        await self._control(WakeUp())

    @property
    def is_sleeping(self) -> bool:
        """Whether it sleeps, or is about to: it takes no requests."""
        return self._controls.is_sleeping

    async def _control(self, action: ControlAction) -> None:
        """Carry out a control call. Raises what it raised."""
        if self._dead is not None:
            raise self._dead
        control = self._controls.new(action)
        call = self._calls[control.id] = self._loop.create_future()
        try:
            busy = bool(self._streams or self._searches)
            for message in self._controls.start(control, busy=busy):
                self._send(message)
            answer = await call
        finally:
            self._controls.cancel(control.id)
            self._calls.pop(control.id, None)
        if answer.failure is not None:
            raise error_of(answer.failure)

    def _resolve(self, answer: Answer) -> None:
        """Tell the caller, unless it no longer waits."""
        call = self._calls.pop(answer.id, None)
        if call is not None and not call.done():
            call.set_result(answer)

    def _release_sleeps(self) -> None:
        if not (self._streams or self._searches):
            for message in self._controls.release():
                self._send(message)

    def _check_queue(self, request: EngineRequest) -> None:
        scheduler = self.config.scheduler
        live, more = self._output.num_sequences, max(1, len(request.sequences))
        if scheduler.max_num_queued_reqs:
            limit = scheduler.max_num_seqs + scheduler.max_num_queued_reqs
            if live + more > limit:
                self._reject(
                    "max_num_queued_reqs",
                    f"{live} sequences run or wait and this request adds {more}; "
                    f"the server takes {limit} (--max-num-seqs plus --max-num-queued-reqs).",
                )
        if scheduler.max_num_queued_tokens and live >= scheduler.max_num_seqs:
            queued = self._output.num_queued_tokens + len(request.prompt_token_ids)
            if queued > scheduler.max_num_queued_tokens:
                self._reject(
                    "max_num_queued_tokens",
                    f"{queued} prompt tokens would wait; the server queues "
                    f"{scheduler.max_num_queued_tokens} (--max-num-queued-tokens).",
                )

    def _reject(self, reason: str, message: str) -> None:
        self._output.metrics.on_rejected(reason)
        raise QueueFullError(f"The queue is full: {message}", retry_after=self._drain_seconds())

    def _drain_seconds(self) -> float:
        """How long until someone finishes, judged by the latest finishes. At least a second."""
        times = self._finish_times
        if len(times) < 2 or times[-1] == times[0]:
            return 1.0
        waiting = max(1, self.stats.num_waiting)
        return min(60.0, max(1.0, waiting * (times[-1] - times[0]) / (len(times) - 1)))

    # --- the core's messages ----------------------------------------------------------------------

    def _send(self, message: CoreInput) -> None:
        """ZeroMQ's descriptor is edge-triggered, and sending may consume the edge: look afterwards."""
        self._core.send(message)
        self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Take in the messages that are there, pausing for others now and then."""
        try:
            for _ in range(DRAIN_BATCH):
                if self._dead is not None or self._closing:
                    return
                message = self._core.try_receive()
                if message is None:
                    return
                self._take(message)
            self._loop.call_soon(self._drain)
        except Exception as error:
            self._die(f"The front end failed on the engine's output ({type(error).__name__}).")
            raise

    def _take(self, message: CoreOutput) -> None:
        self._heartbeat = time.monotonic()
        if isinstance(message, StepOutputs):
            self.stats = message.stats or self.stats
            processed = self._output.process(message)
            if processed.aborts:
                self._send(AbortRequests(processed.aborts))
            for output in processed.outputs:
                self._deliver(output)
            for listener in self._stats_listeners:
                listener(message)
        elif isinstance(message, CoreFailed):
            self._die(message.failure.message)
        elif isinstance(message, Answer):
            self._controls.take(message)
            self._output.metrics.on_sleep_state(message.sleep_level)
            self._resolve(message)
        else:
            assert isinstance(message, (Pong, EngineReady))

    def _deliver(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        if output.finished:
            del self._streams[output.request_id]
            self._finish_times.append(time.monotonic())
            self._release_sleeps()
        stream.put(output)

    def _die(self, message: str) -> None:
        """No more service: every live request ends with the error, later ones are refused."""
        if self._dead is not None:
            return
        self._dead = EngineDeadError(message)
        self._loop.remove_reader(self._descriptor)
        self._output.fail_all(message)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put(EngineDeadError(message))
        self._fail_calls(self._dead)

    def _fail_calls(self, error: EngineDeadError) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.done():
                call.set_exception(error)

    async def _ping(self) -> None:
        """Ask for a sign of life when there is none, and notice a core that has died."""
        nonce = 0
        while self._dead is None:
            await asyncio.sleep(PING_SECONDS)
            if self._core.process.poll() is not None:
                self._die(f"The engine core exited with status {self._core.process.returncode}.")
            elif time.monotonic() - self._heartbeat >= PING_SECONDS:
                nonce += 1
                self._send(Ping(nonce))

    # --- what operators ask -----------------------------------------------------------------------

    def health(self, timeout: float = DEFAULT_HEALTH_TIMEOUT) -> Health:
        """Judged by the scheduler loop's latest sign of life."""
        age = time.monotonic() - self._heartbeat
        if self._dead is None and self._core.process.poll() is not None:
            self._die(f"The engine core exited with status {self._core.process.returncode}.")
        if self._dead is not None:
            return Health(False, age, str(self._dead))
        if age > timeout:
            return Health(False, age, f"The scheduler loop has not answered for {age:.0f} s.")
        return Health(True, age, "ok")

    @property
    def is_dead(self) -> bool:
        return self._dead is not None

    def attach_metrics(self, metrics: MetricsSink) -> None:
        """Report everything that happens to `metrics`, from now on."""
        self._output.metrics = metrics

    def add_stats_listener(self, callback: Callable[[StepOutputs], None]) -> None:
        self._stats_listeners.append(callback)

    async def shutdown(self) -> None:
        """Abort what is left and end the core. Idempotent."""
        if self._closing:
            return
        for request_id in list(self._streams):
            self.abort(request_id)
        self._closing = True
        self._pinger.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._pinger
        self._loop.remove_reader(self._descriptor)
        self._dead = self._dead or EngineDeadError("The engine has been shut down.")
        self._fail_calls(self._dead)
        self._checker.close()
        await asyncio.to_thread(self._core.close)
