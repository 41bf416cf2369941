"""The two deployments: an ingress that chooses a replica, and replicas that each run Quire's own server app.

The proxy's request (HTTP) has no body when Serve chooses where it goes, so a choice by prompt needs the
ingress. It reads the body, and passes request and answer on as ASGI messages. So a replica answers as
`quire serve` does: every endpoint, parameter, error and stream is the same code.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from quire.config import split_flat
from quire.engine.async_llm import AsyncLLM
from quire.errors import QuireError
from quire.integrations.ray.bridge import (
    Forwarding,
    merge_metrics,
    portable,
    read_body,
    run_app,
    run_whole,
)
from quire.integrations.ray.options import AppConfig, read
from quire.server.app import build_app
from quire.server.errors import ApiError, internal_error, to_api_error, unavailable
from quire.server.keys import configured_admin_keys, configured_keys, with_fair_shares
from quire.server.live import ClientGoneError, Receive
from quire.server.middleware import BodyLimit, Message, Scope, Send, send_error
from quire.server.probes import check_health
from quire.server.run import DEATH_CHECK_SECONDS, FAREWELL_SECONDS
from quire.server.state import ServerState
from quire.util.logging import setup_logging

logger = logging.getLogger(__name__)

INGRESS, REPLICA = "QuireIngress", "Quire"
CHANGING = ("/reset_prefix_cache", "/sleep", "/wake_up", "/abort_requests", "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter")  # fmt: skip
EVERY_REPLICA = {("GET", "/metrics"), *(("POST", path) for path in CHANGING)}
"""Requests that are about all replicas."""
HEALTH_SECONDS = 5.0
INGRESS_REQUESTS = 10_000
"""Most requests of an ingress process, which only passes them on."""
RETRY_SECONDS = 1
STARTING = unavailable("No replica has started.", retry_after=RETRY_SECONDS)


class Replica:
    """One copy of the model: engine and server app in this process, the engine core in a child process."""

    async def __init__(self, values: dict[str, object]) -> None:  # type: ignore[misc]  # Serve awaits it
        engine, server = split_flat(values)
        setup_logging(log_format=engine.runtime.log_format)
        keys = configured_keys(server, os.environ)
        engine = with_fair_shares(engine, keys)
        self._state = ServerState(server, engine)
        admin_keys = configured_admin_keys(server, os.environ, keys)
        self._app = build_app(self._state, api_keys=keys, admin_keys=admin_keys)
        self._keys_watch = asyncio.create_task(keys.follow(), name="quire-keys")
        self._engine = await AsyncLLM.start(engine)
        self._state.engine_loaded(self._engine)
        self._death = asyncio.create_task(self._exit_after_death(), name="quire-death-watch")

    async def stream(self, call: Mapping[str, Any]) -> AsyncGenerator[list[Message], None]:
        """Answer a request: the ASGI messages of the answer, as they come."""
        async for messages in run_app(self._app, call["scope"], call["body"]):
            yield messages

    async def whole(self, call: Mapping[str, Any]) -> tuple[str, int, str, bytes]:
        """This replica's name; status, content type and body of its answer."""
        name = serve.get_replica_context().replica_id.unique_id
        return name, *await run_whole(self._app, call["scope"], call["body"])

    async def check_health(self) -> None:
        healthy, body = check_health(self._state)
        if not healthy:
            raise RuntimeError(f"Quire is not healthy: {body}")

    async def record_replica_metadata(self) -> dict[str, int]:
        """For `PrefixRouter`: how many tokens of prefixes this replica can keep."""
        ready = self._engine.ready
        caches = self._engine.config.cache.enable_prefix_caching
        return {"cache_tokens": (ready.num_blocks - 1) * ready.block_size if caches else 0}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For an autoscaling policy of one's own: the engine's queue, in sequences."""
        stats = self._engine.stats
        return {
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "kv_usage": stats.kv_usage,
        }

    async def _exit_after_death(self) -> None:
        """A replica whose engine has died would answer quickest, with errors, and attract all requests. So
        it exits as soon as its clients have their errors; Serve starts another one."""
        while not self._engine.is_dead:
            await asyncio.sleep(DEATH_CHECK_SECONDS)
        reason = self._engine.health(float("inf")).reason
        self._state.fail(reason)
        logger.error("%s The replica exits.", reason)
        await self._state.live.wait_idle(FAREWELL_SECONDS)
        await asyncio.sleep(DEATH_CHECK_SECONDS)  # the last answers are on their way
        os._exit(1)

    async def __del__(self) -> None:
        """Serve calls this once no request runs, or at the deadline (graceful_shutdown_timeout_s)."""
        if not hasattr(self, "_death"):
            return
        self._death.cancel()
        with suppress(asyncio.CancelledError):
            await self._death
        self._state.drain()
        self._state.live.terminate_all(
            unavailable("The server is shutting down.", retry_after=RETRY_SECONDS)
        )
        await self._engine.shutdown()


class Ingress:
    """Receives all requests: reads the body, lets `PrefixRouter` choose, and passes the answer on."""

    def __init__(self, replicas: DeploymentHandle, max_body_bytes: int) -> None:
        self._replicas = replicas
        self._stream = replicas.options(method_name="stream", stream=True)
        self._app = BodyLimit(self._answer, max_body_bytes)

    def __serve_build_asgi_app__(self) -> Any:
        async def serve_request(scope: Scope, receive: Receive, send: Send) -> None:
            await self._serve(scope, receive, send)

        return serve_request  # uvicorn takes a bound method for an ASGI 2 app

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            try:
                await self._app(scope, receive, send)
            except ClientGoneError:
                return
            except QuireError as error:
                await send_error(to_api_error(error, _request_id(scope)), scope, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive)
        call = {"scope": portable(scope), "body": body}
        path = scope["path"][len(scope.get("root_path", "")) :]
        if (scope["method"], path) in EVERY_REPLICA:
            await self._ask_all(call, scope, send)
            return

        def explain(error: Exception) -> ApiError:
            return _explained(error, scope)

        await Forwarding(self._stream.remote(call), scope, send, explain).run(receive)

    async def _ask_all(self, call: dict[str, Any], scope: Scope, send: Send) -> None:
        """All metrics; or else the answer of a replica that refused, if one did, or the longest, which for
        /abort_requests is that of the replica that found them."""
        response = self._replicas.broadcast("whole", call)
        answers = await response.results_async(return_exceptions=True)
        good = [answer for answer in answers if not isinstance(answer, Exception)]
        is_metrics = scope["method"] == "GET"
        if not good or (len(good) < len(answers) and not is_metrics):
            failed = [answer for answer in answers if isinstance(answer, Exception)]
            error = _explained(failed[0], scope) if failed else STARTING
            await send_error(error, scope, send)
            return
        _, status, kind, body = max(good, key=lambda answer: (answer[1], len(answer[3])))
        if is_metrics and status == HTTPStatus.OK:
            body = merge_metrics({name: text.decode() for name, _, _, text in good}).encode()
        headers = [(b"content-type", kind.encode("latin-1"))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _explained(error: Exception, scope: Scope) -> ApiError:
    """What a client is told if no replica could answer."""
    if isinstance(error, RayActorError):
        logger.error("request %s: its replica has died: %s", _request_id(scope), error)
        return unavailable("The replica that had this request has died.", retry_after=RETRY_SECONDS)
    if isinstance(error, DeploymentUnavailableError):
        return unavailable(
            "The model cannot be started; see Serve's status.", retry_after=RETRY_SECONDS
        )
    if isinstance(error, BackPressureError):
        status = HTTPStatus.TOO_MANY_REQUESTS
        return ApiError(
            status, "Too many requests wait.", headers={"retry-after": str(RETRY_SECONDS)}
        )
    logger.error("request %s: unexpected error", _request_id(scope), exc_info=error)
    return internal_error(_request_id(scope))


def _request_id(scope: Scope) -> str:
    """The one that Serve's proxy has added, if the client sent none."""
    return dict(scope["headers"]).get(b"x-request-id", b"unknown").decode("latin-1")


def build(args: Mapping[str, object]) -> serve.Application:
    """See `quire.integrations.ray.app`."""
    config = read(args)
    for note in config.notes:
        logger.warning(note)
    replicas = serve.deployment(Replica, **_replica_options(config)).bind(config.values)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=config.serve.ingress_replicas,
        max_ongoing_requests=INGRESS_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replicas, config.server.max_body_bytes)


def _replica_options(config: AppConfig) -> dict[str, Any]:
    options, engine = config.serve, config.engine
    seats = engine.scheduler.max_num_seqs
    gpus = options.num_gpus
    if gpus is None:
        gpus = engine.parallel.world_size if engine.runtime.device.startswith("cuda") else 0
    cpus = options.num_cpus if options.num_cpus is not None else engine.runtime.cpu_threads or 1
    chosen: dict[str, Any] = {
        "name": REPLICA,
        "max_ongoing_requests": options.max_ongoing_requests or math.ceil(1.25 * seats),
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": max(HEALTH_SECONDS, config.server.health_timeout),
        "graceful_shutdown_timeout_s": config.server.shutdown_timeout,
        "request_router_config": RequestRouterConfig(
            request_router_class="quire.integrations.ray.router.PrefixRouter"
        ),
    }
    if options.max_replicas is None:
        return chosen | {"num_replicas": options.num_replicas}
    return chosen | {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=options.num_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.target_ongoing_requests or seats,
            upscale_delay_s=UPSCALE_SECONDS,
            look_back_period_s=LOOK_BACK_SECONDS,
        )
    }


UPSCALE_SECONDS = 5.0
LOOK_BACK_SECONDS = 15.0
"""Serve's defaults, 30 s each, are for requests much longer than these. Removing takes its 600 s."""
