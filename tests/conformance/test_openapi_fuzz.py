"""Whatever the OpenAPI document allows, and what it does not, is answered without a 5xx.

`scripts/fuzz-http` runs this with 2,000 examples; here there are a few of each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.database import InMemoryExampleDatabase
from schemathesis import GenerationMode
from tests.conformance.live import builtin_engine, live_server
from tests.server.scripted_engine import ScriptedEngine

from quire.config import ServerConfig
from quire.server.app import build_app
from quire.server.state import ServerState

EXAMPLES = int(os.environ.get("QUIRE_FUZZ_EXAMPLES", "200"))
"""In all, over the endpoints of both engines."""
FLAGS = {"enable_admin_endpoints": True, "enable_tokenizer_info_endpoint": True}
SLEEP = ("/sleep", "/wake_up", "/is_sleeping")
"""Asleep, a server answers 503."""

SCHEMA = schemathesis.openapi.from_dict(build_app(ServerState(ServerConfig(**FLAGS))).openapi())
OPERATIONS = [
    operation for operation in (result.ok() for result in SCHEMA.get_all_operations())
    if operation.path not in SLEEP
]  # fmt: skip


async def scripted_engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="module", params=["scripted", "builtin"])
def server(request) -> Iterator[httpx.Client]:
    make = scripted_engine if request.param == "scripted" else builtin_engine
    with live_server(make, **FLAGS) as client:
        client.kind = request.param
        yield client


def weight(operation) -> int:
    """Bodies have more to them than paths."""
    return 8 if operation.body else 1


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.method}{o.path}")
def test_no_example_makes_a_5xx(server, operation):
    share = EXAMPLES * weight(operation) / sum(map(weight, OPERATIONS))
    share *= 0.7 if server.kind == "scripted" else 0.3
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if operation.body else [None]
    for mode in modes:
        cases = operation.as_strategy(**({"generation_mode": mode} if mode else {}))

        @settings(
            max_examples=max(1, round(share / len(modes))), deadline=None, derandomize=False,
            database=InMemoryExampleDatabase(), suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )  # fmt: skip
        @given(cases)
        def check(case) -> None:
            answer = case.call(base_url=str(server.base_url), timeout=60)
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert_is_an_error(answer.status_code, answer.content)

        check()


def assert_is_an_error(status: int, content: bytes) -> None:
    error = json.loads(content)["error"]
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and error["type"]
    if "code" in error:
        assert error["code"] == status
        assert error["param"] is None or isinstance(error["param"], str)
