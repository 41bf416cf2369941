"""Body limit, API keys, request ids, CORS, HTTP metrics."""

from __future__ import annotations

import json
import re

import pytest
from all_routes import all_routes

from quire.config import ServerConfig
from quire.errors import ConfigError
from quire.server.keys import configured_keys
from quire.server.middleware import MAX_REQUEST_ID_CHARS

COMPLETIONS = "/v1/completions"
JSON = {"content-type": "application/json"}


async def call(app, *, path="/v1/models", method="GET", headers=(), body=b"", **scope):
    """Raw ASGI: what an HTTP client library would normalise away. -> (status, headers, body)"""
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    await app(
        {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(),
            "query_string": b"", "headers": list(headers), "scheme": "http",
            "server": ("test", 80), "client": ("1.2.3.4", 5), "root_path": "",
            "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"}, **scope,
        },
        receive,
        send,
    )  # fmt: skip
    body = b"".join(m.get("body", b"") for m in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


def app_of(client):
    return client._transport.app


# --- body limit -----------------------------------------------------------------------------------


async def test_announced_length_over_the_limit(make_client, engine):
    client = make_client(max_body_bytes=1000)
    response = await client.post(COMPLETIONS, json={"prompt": "x" * 2000})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == 413
    assert engine.submitted == []
    assert (await client.post(COMPLETIONS, json={"prompt": "x" * 500})).status_code == 200


@pytest.mark.parametrize("length", [b"9" * 50, b"99999999999"])
async def test_absurd_lengths(client, length):
    status, _, _ = await call(
        app_of(client), path=COMPLETIONS, method="POST", headers=[(b"content-length", length)]
    )
    assert status == 413


async def test_unannounced_body_is_cut_off_as_it_arrives(make_client, engine):
    client = make_client(max_body_bytes=10_000)
    given = 0

    async def endless():
        nonlocal given
        while True:
            given += 1000
            yield b"x" * 1000

    response = await client.post(COMPLETIONS, content=endless(), headers=JSON)
    assert response.status_code == 413
    assert given <= 12_000


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_every_endpoint_is_limited(make_client, path):
    response = await make_client(max_body_bytes=100).post(path, content=b" " * 101, headers=JSON)
    assert response.status_code == 413


# --- API keys -------------------------------------------------------------------------------------


@pytest.fixture
def locked(make_client):
    return make_client(api_keys=("sekret", "other key"))


OPEN = ["/", "/health", "/ready", "/ping", "/metrics", "/version"]


@pytest.mark.parametrize("path", OPEN)
async def test_probes_need_no_key(locked, path):
    assert (await locked.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"), ("POST", "/tokenize"), ("POST", "/detokenize"),
        ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/openapi.json"), ("GET", "/nope"),
        ("GET", "/health/"), ("GET", "/health/../v1/models"), ("GET", "/%2Fhealth"),
        ("GET", "/Health"), ("GET", "/v1/models?x=/health"), ("OPTIONS", "/v1/models"),
    ],
)  # fmt: skip
async def test_everything_else_does(locked, method, path):
    response = await locked.request(method, path)
    assert response.status_code == 401, path
    assert response.json() == {"error": "Unauthorized"}
    assert response.headers["www-authenticate"] == "Bearer"


async def test_every_registered_route_is_guarded_or_listed(locked):
    paths = {route.path for route in all_routes(app_of(locked))}
    assert {*OPEN, "/v1/chat/completions", "/v1/models/{model_id:path}", "/docs"} <= paths
    for path in paths - {*OPEN}:
        for method in ("GET", "POST", "DELETE"):
            status, _, _ = await call(
                app_of(locked), method=method, path=re.sub("{[^}]*}", "x", path)
            )
            assert status == 401, path


@pytest.mark.parametrize(
    "value", ["Bearer sekret", "bearer sekret", "Bearer  sekret ", "Bearer other key"]
)
async def test_right_keys(locked, value):
    response = await locked.get("/v1/models", headers={"authorization": value})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "sekret", "Basic sekret", "Bearer sekre", "Bearer sekrets",
     "Bearer SEKRET", "Bearer sekret, Bearer x"],
)  # fmt: skip
async def test_wrong_keys(locked, value):
    response = await locked.get("/v1/models", headers={"authorization": value})
    assert response.status_code == 401


async def test_two_authorization_headers_are_none(locked):
    headers = [(b"authorization", b"Bearer sekret"), (b"authorization", b"Bearer x")]
    assert (await call(app_of(locked), headers=headers))[0] == 401


@pytest.mark.parametrize(
    "host", [b"a/?x=", b"test/health?", b"x/health#", b"/health", b"a\\health", b""]
)
async def test_host_header_cannot_open_a_path(locked, host):
    """CVE-2026-48746: request.url is rebuilt from Host; the decision must not read it."""
    for path in ("/v1/models", "/v1/completions"):
        status, _, _ = await call(app_of(locked), path=path, headers=[(b"host", host)])
        assert status == 401


async def test_forwarded_headers_cannot_open_a_path(locked):
    for name in (b"x-forwarded-prefix", b"x-original-url", b"x-rewrite-url", b"x-forwarded-uri"):
        status, _, _ = await call(app_of(locked), headers=[(name, b"/health")])
        assert status == 401


async def test_root_path_opens_the_same_routes(make_client):
    client = make_client(api_keys=("k",), root_path="/llm")
    for path, expected in [
        ("/health", 200), ("/llm/health", 200), ("/llm/v1/models", 401), ("/v1/models", 401),
        ("/llmhealth", 401), ("/llm/llm/health", 401),
    ]:  # fmt: skip
        assert (await client.get(path)).status_code == expected, path
    response = await client.get("/llm/v1/models", headers={"authorization": "Bearer k"})
    assert response.status_code == 200


async def test_websockets_are_closed(locked):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/health", "headers": []}
    await app_of(locked)(scope, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_keys_from_flags_and_environment():
    environ = {"VLLM_API_KEY": "a", "QUIRE_API_KEY": "b", "OTHER": "c"}
    keys = configured_keys(ServerConfig(api_key=("k",)), environ)
    assert [key for key in (b"k", b"a", b"b", b"c", b"") if keys.find(key)] == [b"k", b"a", b"b"]
    assert not configured_keys(ServerConfig(), {"VLLM_API_KEY": ""})
    with pytest.raises(ConfigError, match="api_key"):
        configured_keys(ServerConfig(api_key=("",)), {})


# --- request ids ----------------------------------------------------------------------------------


async def test_request_id_is_echoed(client, engine):
    response = await client.post(
        COMPLETIONS, json={"prompt": "a"}, headers={"x-request-id": "zyx-1.2:3_4"}
    )
    assert response.headers["x-request-id"] == "zyx-1.2:3_4"
    assert "zyx" not in engine.submitted[0].request_id, "never an internal key"


@pytest.mark.parametrize(
    "value", [b"", b"a b", b"a\r\nset-cookie: x", b"<script>", b"\xff", b"x" * 129, b"a;b"]
)
async def test_odd_request_ids_are_replaced(client, value):
    _, headers, _ = await call(app_of(client), headers=[(b"x-request-id", value)])
    given = headers[b"x-request-id"]
    assert given != value and given.isalnum() and len(given) <= MAX_REQUEST_ID_CHARS


async def test_every_answer_has_an_id(locked):
    for path in ("/health", "/v1/models", "/nope"):
        assert (await locked.get(path)).headers["x-request-id"]


async def test_same_request_id_twice_is_two_requests(client, engine):
    for _ in range(2):
        response = await client.post(
            COMPLETIONS, json={"prompt": "a"}, headers={"x-request-id": "same"}
        )
        assert response.status_code == 200
    assert len({s.request_id for s in engine.submitted}) == 2


# --- CORS and metrics -----------------------------------------------------------------------------


async def test_cors(make_client):
    client = make_client(allowed_origins=("https://a.example",), api_keys=("k",))
    preflight = {
        "origin": "https://a.example", "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }  # fmt: skip
    response = await client.options(COMPLETIONS, headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    response = await client.get("/health", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in response.headers
    response = await client.get("/v1/models", headers={"origin": "https://a.example"})
    assert response.status_code == 401
    assert response.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.parametrize("url", [COMPLETIONS, "/v1/messages", "/v1/responses"])
async def test_a_browsers_preflight_needs_no_key(make_client, url):
    """Nor is it asked for one with the headers of either provider's client."""
    client = make_client(api_keys=("k",))
    preflight = {
        "origin": "https://a.example", "access-control-request-method": "POST",
        "access-control-request-headers": "x-api-key,anthropic-version,authorization,content-type",
    }  # fmt: skip
    response = await client.options(url, headers=preflight)
    assert response.status_code == 200
    allowed = response.headers["access-control-allow-headers"].lower()
    assert allowed == "*" or {"x-api-key", "anthropic-version", "authorization"} <= {
        name.strip() for name in allowed.split(",")
    }
    assert "POST" in response.headers["access-control-allow-methods"]
    found = await client.get(
        "/v1/models", headers={"origin": "https://a.example", "x-api-key": "k"}
    )
    assert found.status_code == 200 and "access-control-allow-origin" in found.headers


async def test_http_metrics_by_route_not_by_path(client):
    await client.post(COMPLETIONS, json={"prompt": "a"})
    await client.post(COMPLETIONS, json={})
    await client.get("/nope-1")
    await client.get("/nope-2")
    await client.get("/v1/models/tiny")
    text = (await client.get("/metrics")).text
    row = 'http_requests_total{handler="%s",method="%s",status="%s"}'
    assert row % ("/v1/completions", "POST", "2xx") + " 1.0" in text
    assert row % ("/v1/completions", "POST", "4xx") + " 1.0" in text
    assert row % ("none", "GET", "4xx") + " 2.0" in text
    assert row % ("/v1/models/{model_id:path}", "GET", "2xx") + " 1.0" in text
    assert "nope" not in text


async def test_openapi_documents_the_bodies(client):
    document = (await client.get("/openapi.json")).json()
    body = document["paths"][COMPLETIONS]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/CompletionRequest"}
    schemas = document["components"]["schemas"]
    assert "temperature" in schemas["ChatCompletionRequest"]["properties"]
    for reference in json.dumps(document).split('"$ref": "#/components/schemas/')[1:]:
        assert reference.partition('"')[0] in schemas
