"""Endpoints for operators, beyond the probes.

Every client that may send requests may read /load and abort its own key's requests. The other routes show
the server's configuration or affect all clients. They exist on the admin listener, which may abort all
requests, or, without one, with --enable-admin-endpoints (vLLM: with VLLM_SERVER_DEV_MODE) on the API's: then
every API key may use them, unless there is an --admin-api-key. /tokenizer_info has its own flag, as in vLLM.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import msgspec
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from quire.errors import ConfigError, InvalidParameterError
from quire.server.auth import is_from_this_machine
from quire.server.body import parse, read_json
from quire.server.dashboard import add_dashboard_routes
from quire.server.debug import debug_router
from quire.server.engine_protocol import ServedModel, SleepingEngine
from quire.server.errors import ApiError, bad_request
from quire.server.middleware import owner_of
from quire.server.openapi import request_body
from quire.server.requests import AbortRequest, LoadAdapterRequest, UnloadAdapterRequest
from quire.server.state import ServerState
from quire.util.version import VERSION

SECRET_WORDS = frozenset({"key", "keys", "keyfile", "token", "secret", "password"})
HIDDEN = "***"


def requests_router(state: ServerState, *, of_all: bool = False) -> APIRouter:
    """What runs, and ending it. of_all: requests of every key."""
    router = APIRouter()

    @router.get("/load")
    async def load() -> Response:
        """How many requests are being answered."""
        return _json({"server_load": len(state.live)})

    @router.post("/abort_requests", openapi_extra=request_body(AbortRequest))
    async def abort_requests(request: Request) -> Response:
        """End requests by the ids of their answers; their clients get the output so far, with finish_reason
        "abort". Returns the ids that were found; requests of another API key are not found."""
        asked = parse(AbortRequest, await read_json(request)).request
        owner = owner_of(request.scope)
        return _json({"aborted": state.live.abort(set(asked.request_ids), owner, of_all=of_all)})

    if state.config.enable_tokenizer_info_endpoint and not of_all:

        @router.get("/tokenizer_info")
        async def tokenizer_info() -> Response:
            """Special tokens and chat template, for clients that tokenize for themselves."""
            return _json(describe_tokenizer(state.loaded_engine().model))

    return router


def admin_router(state: ServerState) -> APIRouter:
    """What shows the configuration or affects all clients."""
    router = debug_router(state)
    _add_admin_routes(router, state)
    add_dashboard_routes(router, state)
    if state.engine_config.lora.enable_lora:
        _add_adapter_routes(router, state)
    return router


def local_router(state: ServerState) -> APIRouter:
    """What shows the state, for this machine only: of a server without keys and without admin routes."""
    router = APIRouter(dependencies=[Depends(_from_this_machine)])
    add_dashboard_routes(router, state)
    router.include_router(debug_router(state))
    return router


async def _from_this_machine(request: Request) -> None:
    if not is_from_this_machine(request.scope):
        raise ApiError(403, "Only for this machine: see docs/dashboard.md.")


def _add_admin_routes(router: APIRouter, state: ServerState) -> None:
    @router.get("/server_info")
    async def server_info() -> Response:
        """Version, models and every option's value; secrets are hidden."""
        config = {
            field.name: _visible(getattr(state.engine_config, field.name))
            for field in dataclasses.fields(state.engine_config)
        }
        config["server"] = _visible(state.config)
        model = state.loaded_engine().model
        info = {"version": VERSION, "models": model.names, "max_model_len": model.max_model_len}
        return _json({**info, "config": config})

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache(request: Request) -> Response:
        """Drop all cached prefixes; running requests keep theirs."""
        _take_only(request)
        return _json({"success": await state.serving_engine().reset_prefix_cache()})

    @router.post("/sleep")
    async def sleep(request: Request) -> Response:
        """Refuse new requests, wait for running ones, and free the memory of the KV cache (level 1) or
        also of the weights (2)."""
        _take_only(request, "level", mode="wait")
        level = request.query_params.get("level", "1")
        if level not in ("1", "2"):
            raise bad_request("level must be 1 or 2.", param="level")
        await _sleeper(state).sleep(int(level))
        return _json({"is_sleeping": True})

    @router.post("/wake_up")
    async def wake_up(request: Request) -> Response:
        """Allocate the memory again and accept requests."""
        _take_only(request)
        try:
            await _sleeper(state).wake_up()
        except ConfigError as error:  # memory is lacking: it stays asleep
            raise ApiError(500, str(error)) from None
        return _json({"is_sleeping": False})

    @router.get("/is_sleeping")
    async def is_sleeping() -> Response:
        """Whether the engine sleeps or is about to: it refuses requests."""
        return _json({"is_sleeping": _sleeper(state).is_sleeping})


def _add_adapter_routes(router: APIRouter, state: ServerState) -> None:
    @router.post("/v1/load_lora_adapter", openapi_extra=request_body(LoadAdapterRequest))
    async def load_lora_adapter(request: Request) -> Response:
        """Serve the LoRA adapter in a directory below `--lora-dir`; answered when it is in memory. With
        `--enable-lora`."""
        asked = parse(LoadAdapterRequest, await read_json(request)).request
        adapters = state.serving_engine().adapters
        if not asked.lora_name or not asked.lora_path:
            raise ApiError(
                400,
                "Both 'lora_name' and 'lora_path' must be provided.",
                param=None,
                kind="InvalidUserInput",
            )
        with _user_input():
            await adapters.load(asked.lora_name, asked.lora_path, replace=asked.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", openapi_extra=request_body(UnloadAdapterRequest))
    async def unload_lora_adapter(request: Request) -> Response:
        """Serve an adapter no longer. Requests that were accepted finish; then it leaves the memory. With
        `--enable-lora`."""
        asked = parse(UnloadAdapterRequest, await read_json(request)).request
        if not asked.lora_name:
            raise ApiError(
                400,
                "'lora_name' needs to be provided to unload a LoRA adapter.",
                param=None,
                kind="InvalidUserInput",
            )
        await state.loaded_engine().adapters.unload(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


@contextlib.contextmanager
def _user_input() -> Iterator[None]:
    """Errors about an adapter have vLLM's type."""
    try:
        yield
    except InvalidParameterError as error:
        raise ApiError(400, str(error), param=error.param, kind="InvalidUserInput") from None


def _sleeper(state: ServerState) -> SleepingEngine:
    engine = state.serving_engine()
    if not isinstance(engine, SleepingEngine):
        raise ApiError(501, "This engine cannot sleep.")
    return engine


def _take_only(request: Request, *known: str, **neutral: str) -> None:
    """Raises a 400 for a query parameter of vLLM that has an effect there and none here."""
    for name, value in request.query_params.items():
        if name not in known and value.lower() not in ("false", neutral.get(name)):
            raise bad_request("This query parameter is not supported.", param=name[:64])


def describe_tokenizer(model: ServedModel) -> dict[str, object]:
    """In the form of tokenizer_config.json. Only the fields listed here, so never a path."""
    config, template = model.tokenizer.config, model.chat_template
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_model_len,
        **{name: spec.content for name, spec in config.named_tokens.items()},
        "additional_special_tokens": [spec.content for spec in config.extra_tokens],
        "added_tokens_decoder": {
            str(i): dataclasses.asdict(spec) for i, spec in config.added_tokens.items()
        },
        "chat_template": template.source if template is not None else None,
    }


def _visible(config: object) -> dict[str, object]:
    """Fields of a config dataclass. Texts whose name says that they are secret are hidden, so that this
    code need not change for a new secret option."""
    shown: dict[str, object] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        secret = not SECRET_WORDS.isdisjoint(field.name.split("_"))
        shown[field.name] = HIDDEN if secret and value and isinstance(value, str | tuple) else value
    return shown


def _json(body: Mapping[str, object]) -> Response:
    return Response(
        msgspec.json.encode(body),
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )
