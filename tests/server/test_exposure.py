"""A server that other machines can reach without a key says so at start, once."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace

import pytest
from scripted_engine import ScriptedEngine

from quire.config import EngineConfig, ServerConfig
from quire.server.auth import exposure
from quire.server.keys import Keys
from quire.server.process import bind
from quire.server.run import StopSignals, serve_engine


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def bound(host: str) -> SimpleNamespace:
    """A listener that is bound to an address this machine need not have."""
    if ":" in host:
        return SimpleNamespace(family=socket.AF_INET6, getsockname=lambda: (host, 8000, 0, 0))
    return SimpleNamespace(family=socket.AF_INET, getsockname=lambda: (host, 8000))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_not_exposed(host):
    assert exposure(bound(host), ServerConfig(), Keys()) is None


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("0.0.0.0", "0.0.0.0:8000 (every interface)"),
        ("::", "[::]:8000 (every interface)"),
        ("192.168.1.7", "192.168.1.7:8000"),
        ("2001:db8::7", "[2001:db8::7]:8000"),
        ("fe80::1%eth0", "[fe80::1%eth0]:8000"),
        ("::ffff:10.0.0.1", "[::ffff:10.0.0.1]:8000"),
    ],
)
def test_beyond_it_the_address_the_risk_and_both_remedies_are_named(host, shown):
    text = exposure(bound(host), ServerConfig(), Keys())
    for part in (f"on {shown}, ", "/metrics", "--host 127.0.0.1", "--api-key", "QUIRE_API_KEY"):
        assert part in text
    assert "admin" not in text and "\n" not in text


def test_admin_endpoints_are_named_where_they_are_served():
    text = exposure(bound("0.0.0.0"), ServerConfig(enable_admin_endpoints=True), Keys())
    assert "admin endpoints" in text


def test_what_is_not_served_here_is_not_named():
    enabled = {"enable_admin_endpoints": True}
    for config, admin_keys in (
        (ServerConfig(**enabled, admin_port=0), Keys()),
        (ServerConfig(**enabled), Keys(["adm"])),
    ):
        assert "admin" not in exposure(bound("0.0.0.0"), config, Keys(), admin_keys)
    config = ServerConfig(admin_port=0, admin_metrics=True)
    assert "/metrics" not in exposure(bound("0.0.0.0"), config, Keys())


def test_a_key_or_client_certificates_close_it():
    assert exposure(bound("0.0.0.0"), ServerConfig(), Keys(["secret"])) is None
    tls = {"ssl_keyfile": "key.pem", "ssl_certfile": "cert.pem"}
    assert exposure(bound("0.0.0.0"), ServerConfig(**tls, ssl_cert_reqs=2), Keys()) is None
    assert exposure(bound("0.0.0.0"), ServerConfig(**tls, ssl_cert_reqs=1), Keys()) is not None
    assert exposure(bound("0.0.0.0"), ServerConfig(ssl_cert_reqs=2), Keys()) is not None  # no TLS


@pytest.mark.parametrize(("host", "exposed"), [("localhost", False), (None, True)])
def test_a_name_counts_as_what_it_resolves_to(host, exposed):
    with bind(ServerConfig(host=host, port=0)) as listener:
        assert (exposure(listener, ServerConfig(host=host), Keys()) is not None) == exposed


async def warnings_at_start(caplog, **options) -> list[str]:
    stop, url = StopSignals(), asyncio.get_running_loop().create_future()

    async def factory():
        return ScriptedEngine()

    with caplog.at_level("WARNING", logger="quire"):
        task = asyncio.create_task(
            serve_engine(
                factory,
                EngineConfig(),
                ServerConfig(port=0, **options),
                stop=stop,
                announce=url.set_result,
            )
        )
        await asyncio.wait_for(url, 5)
        stop.hit()
        assert await asyncio.wait_for(task, 5) == 0
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


async def test_the_default_address_is_warned_of_once(caplog):
    (warning,) = await warnings_at_start(caplog)
    assert "on 0.0.0.0:" in warning


@pytest.mark.parametrize("variable", ["QUIRE_API_KEY", "VLLM_API_KEY"])
async def test_a_key_in_the_environment_silences_it(caplog, monkeypatch, variable):
    monkeypatch.setenv(variable, "secret")
    assert await warnings_at_start(caplog) == []


async def test_so_do_a_key_an_address_and_a_unix_socket(caplog, tmp_path):
    assert await warnings_at_start(caplog, api_key=("secret",)) == []
    assert await warnings_at_start(caplog, host="127.0.0.1") == []
    assert await warnings_at_start(caplog, uds=str(tmp_path / "quire.sock")) == []
