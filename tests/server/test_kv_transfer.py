"""`kv_transfer_params` over HTTP: in every dialect, streamed or not, and refused where it cannot work."""

from __future__ import annotations

import json

import pytest
from scripted_engine import data_lines

from quire.config import EngineConfig, KVTransferConfig

HI = [{"role": "user", "content": "hi"}]
BODIES = {
    "/v1/completions": {"prompt": "a b"},
    "/v1/chat/completions": {"messages": HI},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": HI, "max_tokens": 4},
}
HOLD = {"do_remote_decode": True}
ANSWER = {"do_remote_prefill": True, "remote_host": "10.0.0.1", "remote_port": 5600, "ticket": "t"}
CONFIG = EngineConfig(
    kv_transfer=KVTransferConfig(
        {
            "kv_connector": "TCPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"peers": ["10.0.0.1:5600"]},
        }
    )
)


@pytest.mark.parametrize("url", BODIES)
async def test_the_whole_answer_has_them(make_client, engine, url):
    client = make_client(engine_config=CONFIG)
    engine.kv_transfer_params = ANSWER
    response = await client.post(url, json=BODIES[url] | {"kv_transfer_params": HOLD})
    assert response.status_code == 200, response.text
    assert response.json()["kv_transfer_params"] == ANSWER
    assert "warnings" not in response.json()
    assert engine.submitted[0].params.extra_args == {"kv_transfer_params": HOLD}
    engine.kv_transfer_params = None
    assert "kv_transfer_params" not in (await client.post(url, json=BODIES[url])).json()
    assert engine.submitted[1].params.extra_args is None


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("usage", [False, True])
async def test_a_stream_has_them_in_the_chunk_with_the_finish_reason(
    make_client, engine, url, usage
):
    engine.kv_transfer_params = ANSWER
    body = BODIES[url] | {"kv_transfer_params": HOLD, "stream": True}
    body |= {"stream_options": {"include_usage": True}} if usage else {}
    response = await make_client(engine_config=CONFIG).post(url, json=body)
    chunks = [json.loads(line) for line in data_lines(response.content)[:-1]]
    ended = [bool(c["choices"] and c["choices"][0]["finish_reason"]) for c in chunks]
    assert [chunk.get("kv_transfer_params") for chunk in chunks] == [
        ANSWER if is_end else None for is_end in ended
    ]
    assert sum(ended) == 1


@pytest.mark.parametrize("url", BODIES)
async def test_a_foreign_host_is_ignored_with_a_warning(make_client, engine, url):
    params = ANSWER | {"remote_host": "169.254.169.254", "num_tokens": 5}
    client = make_client(engine_config=CONFIG)
    response = await client.post(url, json=BODIES[url] | {"kv_transfer_params": params})
    assert response.status_code == 200
    [warning] = response.json()["warnings"]
    assert "not among the peers" in warning
    assert warning in response.headers["x-quire-warnings"]


async def test_a_server_without_the_option_says_so(client):
    body = BODIES["/v1/completions"] | {"kv_transfer_params": HOLD}
    [warning] = (await client.post("/v1/completions", json=body)).json()["warnings"]
    assert "no --kv-transfer-config" in warning


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/completions", {"prompt": "a", "use_beam_search": True, "n": 2}),
        ("/v1/chat/completions", {"messages": HI, "use_beam_search": True, "n": 2}),
        ("/v1/chat/completions/batch", {"messages": [HI, HI]}),
        ("/v1/completions", {"prompt": "a", "kv_transfer_params": "yes"}),
    ],
)
async def test_what_cannot_work_is_refused_by_name(make_client, engine, url, fields):
    client = make_client(engine_config=CONFIG)
    response = await client.post(url, json={"kv_transfer_params": HOLD, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"].endswith("kv_transfer_params")
    assert engine.submitted == []
