"""The admin endpoints on a listener of their own, with a key of their own."""

from __future__ import annotations

import asyncio
import logging
import socket
import stat
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from all_routes import all_routes
from scripted_engine import ScriptedEngine

from quire.config import EngineConfig, LoRAConfig, ServerConfig
from quire.errors import ConfigError
from quire.server.app import build_admin_app
from quire.server.auth import DASHBOARD, OPEN_PATHS, PROBES, ApiKeyAuth, check_admin
from quire.server.keys import Keys, configured_admin_keys
from quire.server.middleware import tenant_of
from quire.server.run import StopSignals, serve_engine

ADMIN = [
    ("GET", "/server_info"), ("GET", "/is_sleeping"), ("POST", "/reset_prefix_cache"),
    ("POST", "/sleep"), ("POST", "/wake_up"), ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"), ("GET", "/debug/state"),
]  # fmt: skip
LORA = EngineConfig(lora=LoRAConfig(enable_lora=True))
COMPLETIONS = "/v1/completions"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("QUIRE_API_KEY", "VLLM_API_KEY", "QUIRE_ADMIN_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def admin_client(client: httpx.AsyncClient, *keys: str, host="127.0.0.1:8001") -> httpx.AsyncClient:
    """Of the admin app over the state of `client`'s."""
    app = build_admin_app(client.state, admin_keys=keys)
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://x", headers={"host": host}
    )


# --- which routes, where ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", [{"admin_port": 0}, {"admin_host": "::1"}, {"admin_uds": "/x"}])
@pytest.mark.parametrize("enabled", [False, True])
async def test_the_api_has_no_admin_routes_where_they_have_a_listener(make_client, where, enabled):
    client = make_client(engine_config=LORA, enable_admin_endpoints=enabled, **where)
    admin = admin_client(client)
    for method, path in ADMIN:
        assert (await client.request(method, path)).status_code == 404, path
        assert (await admin.request(method, path)).status_code != 404, path
    assert not {path for _, path in ADMIN} & set(
        (await client.get("/openapi.json")).json()["paths"]
    )


async def test_the_admin_listener_serves_no_model(make_client):
    admin = admin_client(make_client(admin_port=0))
    for path in (
        COMPLETIONS,
        "/v1/chat/completions",
        "/v1/models",
        "/tokenize",
        "/",
        "/openapi.json",
    ):
        assert (await admin.get(path)).status_code == 404, path
    for path in [*PROBES, "/metrics", "/load"]:
        assert (await admin.get(path)).status_code == 200, path


async def test_the_tables_of_this_file_are_whole(make_client):
    app = build_admin_app(make_client(engine_config=LORA, admin_port=0).state)
    debug = {"/debug/requests", "/debug/requests/{id}", "/debug/timeline"}  # test_explanations.py
    others = {*PROBES, DASHBOARD, "/metrics", "/load", "/abort_requests", *debug}
    assert {route.path for route in all_routes(app)} == {path for _, path in ADMIN} | others


async def test_metrics_may_move_there(make_client):
    client = make_client(api_keys=("k",), admin_port=0, admin_metrics=True)
    assert (await client.get("/metrics")).status_code == 401
    assert (await client.get("/metrics", headers=bearer("k"))).status_code == 404
    assert "vllm:num_requests_running" in (await admin_client(client).get("/metrics")).text
    assert (await make_client(admin_port=0).get("/metrics")).status_code == 200


async def test_an_operator_may_end_every_keys_requests(make_client, engine):
    client = make_client(api_keys=("a", "b"), admin_port=0)
    engine.hold()
    asking = [
        asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "x"}, headers=bearer(key)))
        for key in "ab"
    ]
    async with asyncio.timeout(5):
        while len(engine.submitted) < 2 or len(client.state.live) < 2:
            await asyncio.sleep(0)
    ids = [submitted.request_id.removesuffix("-0") for submitted in engine.submitted]
    admin = admin_client(client, "adm")
    response = await admin.post("/abort_requests", json={"request_ids": ids}, headers=bearer("adm"))
    assert sorted(response.json()["aborted"]) == sorted(ids)
    engine.release()
    for answer in asking:
        assert (await answer).json()["choices"][0]["finish_reason"] == "abort"


# --- keys -------------------------------------------------------------------------------------------


async def test_every_path_of_the_admin_listener_wants_its_key(make_client):
    client = make_client(engine_config=LORA, api_keys=("client",), admin_port=0)
    admin = admin_client(client, "adm", "adm2")
    for route in all_routes(build_admin_app(client.state)):
        for headers in ({}, bearer("client"), bearer("ad"), {"x-api-key": "client"}):
            response = await admin.request(sorted(route.methods)[0], route.path, headers=headers)
            is_open = route.path in PROBES | {DASHBOARD}  # the page has no data
            assert (response.status_code == 401) != is_open, route.path
    assert (await admin.get("/nope")).status_code == 401
    for key in ("adm", "adm2"):
        answer = await admin.get("/server_info", headers=bearer(key))
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
    assert (await client.get("/v1/models", headers=bearer("adm"))).status_code == 401


@pytest.mark.parametrize("keys", [(), ("client",)])
async def test_without_a_listener_the_admin_key_guards_the_same_routes(engine, make_client, keys):
    from quire.server.app import build_app

    client = make_client(engine_config=LORA, enable_admin_endpoints=True)
    app = build_app(client.state, api_keys=keys, admin_keys=("adm",))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://test"
    ) as api:
        for method, path in ADMIN:
            for headers in ({}, bearer("client")):
                assert (await api.request(method, path, headers=headers)).status_code == 401, path
            answer = await api.request(method, path, headers=bearer("adm"))
            assert answer.status_code not in (401, 404), path
        for path in ("/v1/models", "/load"):
            assert (await api.get(path)).status_code == (401 if keys else 200)
            assert (await api.get(path, headers=bearer("client"))).status_code == 200
            assert (await api.get(path, headers=bearer("adm"))).status_code == (
                401 if keys else 200
            )
        for path in OPEN_PATHS:
            assert (await api.get(path)).status_code in (200, 404)


async def test_an_operator_is_no_tenant():
    """Whose quotas would count, and whose requests and stored responses would be its own."""
    seen = []

    async def app(scope, receive, send):
        seen.append(tenant_of(scope))

    auth = ApiKeyAuth(
        app, open_paths=PROBES, keys=Keys(["k"]), admin_keys=Keys(["adm"]), admin_paths={"/sleep"}
    )
    for path, key in (("/sleep", "adm"), ("/v1/models", "k")):
        headers = [(b"authorization", f"Bearer {key}".encode())]
        await auth({"type": "http", "path": path, "headers": headers}, None, None)
    assert seen[0] is None and seen[1] is not None


async def test_the_key_is_hidden_in_server_info(make_client):
    client = make_client(admin_port=0, admin_api_key=("sk-admin",))
    text = (await admin_client(client).get("/server_info")).text
    assert "sk-admin" not in text and '"admin_api_key":"***"' in text


def test_keys_from_flags_and_environment(monkeypatch):
    config, clients = ServerConfig(admin_api_key=("a",)), Keys(["client"])
    keys = configured_admin_keys(
        config, {"QUIRE_ADMIN_API_KEY": "b", "QUIRE_API_KEY": "c"}, clients
    )
    assert [k for k in (b"a", b"b", b"c", b"client", b"") if keys.find(k)] == [b"a", b"b"]
    assert not configured_admin_keys(ServerConfig(), {"QUIRE_ADMIN_API_KEY": ""}, clients)
    for wrong in (" ", "client"):
        with pytest.raises(ConfigError, match="admin_api_key"):
            configured_admin_keys(ServerConfig(admin_api_key=(wrong,)), {}, clients)


# --- without a key: not from web pages ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200), ({"host": "localhost:8001"}, 200), ({"host": "[::1]:8001"}, 200),
        ({"host": "LOCALHOST"}, 200), ({"host": "10.0.0.1"}, 200),
        ({"origin": "https://evil.example"}, 403), ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:8001"}, 403), ({"host": "evil.example:8001"}, 403),
        ({"host": ""}, 403), ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1@evil.example"}, 403), ({"host": "127.0.0.1:80:1"}, 403),
    ],
)  # fmt: skip
async def test_a_web_page_may_not_use_it(make_client, engine, headers, status):
    """A page's POST without a body asks no permission first, and a name of an attacker's can be made to point
    here (DNS rebinding)."""
    client = make_client(admin_port=0)
    answer = await admin_client(client).post("/reset_prefix_cache", headers=headers)
    assert answer.status_code == status, answer.text
    assert engine.resets == (status == 200)
    assert "access-control-allow-origin" not in answer.headers


async def test_names_that_are_accepted(make_client):
    named = admin_client(make_client(admin_host="Ops.example", admin_port=0), host="ops.example:80")
    assert (await named.get("/load")).status_code == 200
    tls = {"ssl_keyfile": "key.pem", "ssl_certfile": "cert.pem", "ssl_cert_reqs": 2}
    for options in ({"admin_uds": "/x"}, {"admin_port": 0, **tls}):
        other = admin_client(make_client(**options), host="whatever")
        assert (await other.get("/load")).status_code == 200
        assert (await other.get("/load", headers={"origin": "https://x"})).status_code == 403


async def test_with_a_key_the_key_decides(make_client):
    admin = admin_client(make_client(admin_port=0), "adm", host="ops.example")
    headers = bearer("adm") | {"origin": "https://ops.example"}
    assert (await admin.get("/load", headers=headers)).status_code == 200


# --- the listener -------------------------------------------------------------------------------------


def bound(host: str) -> SimpleNamespace:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return SimpleNamespace(family=family, getsockname=lambda: (host, 8001))


def test_beyond_this_machine_it_needs_a_key():
    for host in ("0.0.0.0", "10.0.0.7", "::"):
        with pytest.raises(ConfigError, match=r"--admin-api-key or QUIRE_ADMIN_API_KEY"):
            check_admin(bound(host), ServerConfig(admin_host=host), Keys())
        check_admin(bound(host), ServerConfig(admin_host=host), Keys(["adm"]))
    for host in ("127.0.0.1", "::1"):
        check_admin(bound(host), ServerConfig(admin_host=host), Keys())
    tls = {"ssl_keyfile": "key.pem", "ssl_certfile": "cert.pem", "ssl_cert_reqs": 2}
    check_admin(bound("0.0.0.0"), ServerConfig(admin_host="0.0.0.0", **tls), Keys())


@pytest.mark.parametrize(
    "options",
    [{"admin_uds": "/x", "admin_port": 1}, {"admin_metrics": True}, {"admin_port": 65536}],
)
def test_options_that_contradict_are_refused(options):
    with pytest.raises(ConfigError, match="admin_"):
        ServerConfig(**options)


@asynccontextmanager
async def serving(engine: ScriptedEngine, **options):
    """-> (stop, task, URL of the API)"""
    stop, url = StopSignals(), asyncio.get_running_loop().create_future()

    async def factory():
        return engine

    config = replace(ServerConfig(host="127.0.0.1", port=0, shutdown_timeout=5.0), **options)
    task = asyncio.create_task(
        serve_engine(factory, EngineConfig(), config, stop=stop, announce=url.set_result)
    )
    await asyncio.wait({task, url}, return_when=asyncio.FIRST_COMPLETED)
    if not url.done():
        await task
    try:
        yield stop, task, url.result()
    finally:
        stop.hit()
        stop.hit()
        engine.release()
        await asyncio.wait({task})


def unix_client(path) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=str(path))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=10)


async def until(ask, status: int) -> None:
    async with asyncio.timeout(10):
        while (await ask()).status_code != status:
            await asyncio.sleep(0.01)


async def test_both_listen_answer_and_drain_together(tmp_path, engine):
    path = tmp_path / "admin.sock"
    async with serving(engine, admin_uds=str(path)) as (stop, task, url):
        async with unix_client(path) as admin, httpx.AsyncClient(base_url=url) as api:
            await until(lambda: admin.get("/ready"), 200)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert (await api.get("/server_info")).status_code == 404
            assert (await admin.get("/server_info")).status_code == 200
            engine.hold()
            asking = asyncio.create_task(api.post(COMPLETIONS, json={"prompt": "a"}))
            async with asyncio.timeout(5):
                while not engine.streams:
                    await asyncio.sleep(0.01)
            stop.hit()
            await until(lambda: admin.get("/ready"), 503)
            refused = await admin.post("/reset_prefix_cache")  # like a new request at the API
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")
            assert not task.done()
            engine.release()
            assert (await asking).status_code == 200
        assert await asyncio.wait_for(task, 10) == 0
        assert not path.exists()


async def test_its_port_is_announced_and_is_loopbacks(engine, caplog):
    with caplog.at_level(logging.INFO, logger="quire"):
        async with serving(engine, admin_port=0):
            pass
    (line,) = [r.getMessage() for r in caplog.records if "admin endpoints on" in r.getMessage()]
    assert line.startswith("admin endpoints on http://127.0.0.1:")


async def test_a_port_in_use_stops_the_start_and_leaves_nothing(tmp_path, engine):
    path = tmp_path / "api.sock"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="--admin-port"):
            async with serving(engine, uds=str(path), admin_port=taken.getsockname()[1]):
                pass
    with pytest.raises(ConfigError, match="beyond this machine"):
        async with serving(engine, uds=str(path), admin_host="0.0.0.0", admin_port=0):
            pass
    assert not path.exists()


async def test_the_end_of_one_server_is_the_end_of_both(tmp_path, engine, monkeypatch):
    """A process whose operators are locked out, or its clients, should be replaced."""
    from quire.server.listeners import Listeners

    found = []
    original = Listeners.run

    async def run(self):
        found.append(self)
        await original(self)

    monkeypatch.setattr(Listeners, "run", run)
    path = tmp_path / "admin.sock"
    async with serving(engine, admin_uds=str(path)) as (_, task, _url):
        async with unix_client(path) as admin:
            await until(lambda: admin.get("/ready"), 200)
        found[0].admin.server.should_exit = True
        assert await asyncio.wait_for(task, 10) == 0
