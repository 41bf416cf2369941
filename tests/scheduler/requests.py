"""Requests as the front end would send them."""

from __future__ import annotations

from typing import Any

from quire.decoding import Decoding
from quire.messages import AddRequest, KVSource
from quire.placement import Placement


def add_request(
    request_id: int,
    prompt_token_ids: list[int],
    *,
    placement: Placement = Placement(),
    arrival_time: float = 0.0,
    fork_of: int | None = None,
    source: KVSource | None = None,
    hold_kv: bool = False,
    deadline: float | None = None,
    **decoding: Any,
) -> AddRequest:
    """decoding: fields of `Decoding`."""
    return AddRequest(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        decoding=Decoding(**decoding),
        placement=placement,
        arrival_time=arrival_time,
        fork_of=fork_of,
        source=source,
        hold_kv=hold_kv,
        deadline=deadline,
    )
