"""`kv_transfer_params`, vLLM's name for who has or wants a request's KV, and what follows for the engine.

To a prefill instance (P) a router sends {"do_remote_decode": true}; what P answers it sends to a decode
instance (D), unchanged. A client may send anything: D asks only configured peers (`KVTransfer.admits`), and
a ticket that is wrong, used or expired there gives no KV. Then D computes the prompt, with the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from quire.config import KVTransfer
from quire.config.kv_transfer import MAX_RANKS
from quire.messages import KVSource

KEY = "kv_transfer_params"
"""In `SamplingParams.extra_args`, as in vLLM."""


@dataclass(frozen=True, slots=True)
class Handoff:
    source: KVSource | None = None
    """The instance that has the prompt's KV."""
    hold: bool = False
    """Hold the prompt's KV for another instance."""
    ignored: str = ""
    """Why the parameters have no effect, for the client and the log."""


_Port = Annotated[int, Meta(ge=0, le=65535)]


class _Params(msgspec.Struct):
    """The fields that have an effect. Others are vLLM's or a router's own."""

    do_remote_decode: bool | None = None
    do_remote_prefill: bool | None = None
    remote_engine_id: Annotated[str, Meta(max_length=256)] = ""
    remote_host: str = ""
    remote_port: _Port = 0
    remote_ports: Annotated[list[_Port], Meta(max_length=MAX_RANKS)] | None = None
    tp_size: Annotated[int, Meta(ge=1, le=MAX_RANKS)] = 1
    ticket: Annotated[str, Meta(max_length=1024)] = ""
    num_tokens: Annotated[int, Meta(ge=0, le=2**31)] = 0


def read_handoff(extra_args: Mapping[str, object] | None, transfer: KVTransfer | None) -> Handoff:
    """transfer: this instance's; None if it exchanges no KV. Never raises."""
    given = (extra_args or {}).get(KEY)
    if not given:
        return Handoff()
    if transfer is None:
        return Handoff(ignored=f"{KEY} has no effect: the server has no --kv-transfer-config")
    if isinstance(given, Mapping):  # routers send null for what they do not know
        given = {name: value for name, value in given.items() if value is not None}
    try:
        params = msgspec.convert(given, _Params)
    except msgspec.ValidationError as error:
        return Handoff(ignored=f"{KEY} has no effect: {error}")
    if params.do_remote_decode and not transfer.produces:
        return Handoff(ignored=f"{KEY} do_remote_decode has no effect: kv_role is kv_consumer")
    hold = params.do_remote_decode is True
    if not params.do_remote_prefill:
        return Handoff(hold=hold)
    if wrong := _wrong(params, transfer):
        return Handoff(None, hold, f"{KEY} do_remote_prefill has no effect: {wrong}")
    source = KVSource(
        engine_id=params.remote_engine_id,
        host=params.remote_host,
        ports=_ports(params),
        ticket=params.ticket,
        num_tokens=params.num_tokens,
    )
    return Handoff(source, hold)


def _wrong(params: _Params, transfer: KVTransfer) -> str:
    if not transfer.consumes:
        return "kv_role is kv_producer"
    if not (params.remote_host and params.ticket and params.num_tokens > 0):
        return "it needs remote_host, remote_port, ticket and num_tokens"
    if not transfer.admits(params.remote_host, _ports(params)):
        return "remote_host and remote_port are not among the peers of --kv-transfer-config"
    return ""


def _ports(params: _Params) -> tuple[int, ...]:
    first = params.remote_port
    return tuple(params.remote_ports or range(first, min(first + params.tp_size, 65536)))


def to_params(source: KVSource, request_id: str) -> dict[str, object]:
    """P's answer. It has vLLM's fields, which routers look at; no block id ever leaves the process."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": source.engine_id,
        "remote_request_id": request_id,
        "remote_host": source.host,
        "remote_port": source.ports[0],
        "remote_ports": list(source.ports),
        "remote_block_ids": [],
        "tp_size": len(source.ports),
        "ticket": source.ticket,
        "num_tokens": source.num_tokens,
    }
