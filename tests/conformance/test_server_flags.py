"""Flags that change what every client gets."""

from __future__ import annotations

import json
import logging

import pytest
from tests.server.scripted_engine import data_lines

from quire.config import ServerConfig
from quire.server.app import build_app
from quire.server.process import http_server
from quire.server.state import ServerState

CHAT = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True}
COMPLETION = {"prompt": "hi", "logprobs": 1}


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)]
)
async def test_they_do_what_the_client_did_not_ask_for(make_client, path, body):
    plain = make_client()
    flags = make_client(return_tokens_as_token_ids=True, enable_force_include_usage=True)
    for client, asked in ((plain, False), (flags, True)):
        whole = (await client.post(path, json=body)).text
        assert ("token_id:" in whole) is asked
        streamed = (await client.post(path, json=body | {"stream": True})).content
        last = json.loads(data_lines(streamed)[-2])
        assert (last["choices"] == [] and "usage" in last) is asked


async def test_docs_can_be_turned_off(make_client):
    for client, status in ((make_client(), 200), (make_client(disable_fastapi_docs=True), 404)):
        for path in ("/openapi.json", "/docs", "/redoc"):
            assert (await client.get(path)).status_code == status, path


def test_access_lines_that_nobody_wants():
    config = ServerConfig(disable_access_log_for_endpoints="/v1/models, /load")
    http_server(build_app(ServerState(config)), config)
    logger = logging.getLogger("uvicorn.access")

    def logged(path: str) -> bool:
        args = ("1.2.3.4:5", "GET", path, "1.1", 200)
        return bool(
            logger.filter(logging.LogRecord("a", logging.INFO, "", 0, "%s %s %s %s %d", args, None))
        )

    paths = ("/health", "/v1/models", "/load?x=1", "/v1/completions", "/v1/models/x")
    assert [logged(path) for path in paths] == [False, False, False, True, True]
    config = ServerConfig()
    http_server(build_app(ServerState(config)), config)
    assert logged("/load")
