"""`--kv-transfer-config`: vLLM's keys, and whose KV may be read."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from quire.config import KVTransfer, from_flat
from quire.config.kv_transfer import CONNECTORS, IDLE_KEYS, NOT_HERE, ROLES
from quire.errors import ConfigError

BASE = {"kv_connector": "TCPConnector", "kv_role": "kv_both"}


def of(*, extra: dict[str, object] | None = None, **keys: object) -> KVTransfer:
    given = BASE | keys | ({"kv_connector_extra_config": extra} if extra is not None else {})
    found = from_flat({"kv_transfer_config": given}).kv_transfer.transfer
    assert found is not None
    return found


def refusal(**keys: object) -> str:
    with pytest.raises(ConfigError) as caught:
        of(**keys)
    message = str(caught.value)
    assert message.startswith("kv_transfer_config") and message[-1] in ".?"
    return message


def test_it_is_off_by_default() -> None:
    assert from_flat({}).kv_transfer.transfer is None
    assert from_flat({"kv_transfer_config": {}}).kv_transfer.transfer is None
    assert from_flat({"kv_transfer_config": {"kv_connector": None}}).kv_transfer.transfer is None


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("role", ROLES)
def test_every_connector_and_role(connector: str, role: str) -> None:
    place = {"kv_ip": "unix:/run/kv"} if connector == "SharedMemoryConnector" else {}
    found = of(kv_connector=connector, kv_role=role, extra={"peers": ["10.0.0.1:14579"]}, **place)
    assert (found.kv_connector, found.kv_role) == (connector, role)
    assert found.produces == (role != "kv_consumer")
    assert found.consumes == (role != "kv_producer")


def test_every_key() -> None:
    extra = {"peers": ["a:1"], "key_file": "/k", "lease_seconds": 5, "listen": "0.0.0.0"}
    found = of(
        engine_id="p0", kv_ip="10.0.0.1", kv_port=5600, kv_buffer_size=1e9,
        kv_load_failure_policy="fail", extra=extra,
    )  # fmt: skip
    assert found == KVTransfer(
        "TCPConnector",
        "kv_both",
        "p0",
        "10.0.0.1",
        5600,
        10**9,
        "fail",
        "0.0.0.0",
        ("a:1",),
        "/k",
        5,
    )
    assert of(kv_buffer_size="4G").kv_buffer_size == 4 * 2**30
    assert of(**dict.fromkeys(IDLE_KEYS, 1)) == of()
    assert of(kv_ip=None, extra={}) == of()


@pytest.mark.parametrize("name", NOT_HERE)
def test_connectors_of_vllm_that_are_missing_say_what_to_use(name: str) -> None:
    assert f"{name!r} is not supported: {NOT_HERE[name]}." in refusal(kv_connector=name)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"kv_connector": "XConnector"}, "connectors are TCPConnector,"),
        ({"kv_connector": None}, "needs kv_connector"),
        ({"kv_role": None}, "needs kv_role"),
        ({"kv_role": "prefill"}, "kv_role must be one of kv_producer"),
        ({"kv_rolle": "kv_both"}, "Did you mean kv_role?"),
        ({"peers": ["a:1"]}, "no key 'peers'"),
        ({"extra": {"peer": ["a:1"]}}, "Did you mean peers?"),
        ({"extra": {"peers": "a:1"}}, "peers must be a list of HOST:PORT"),
        ({"extra": {"peers": ["a:b"]}}, "'a:b' is no HOST:PORT"),
        ({"extra": {"peers": ["a:0"]}}, "'a:0' is no HOST:PORT"),
        ({"extra": {"peers": [":1"]}}, "':1' is no HOST:PORT"),
        ({"extra": {"peers": ["10.0.0.1/8:1"]}}, "has host bits set"),
        ({"extra": {"lease_seconds": 0}}, "lease_seconds must be a number of 1 to 3600"),
        ({"kv_port": 0}, "kv_port must be a port"),
        ({"kv_port": 65535}, "kv_port must be a port"),
        ({"kv_port": 5.5}, "kv_port must be a port"),
        ({"kv_buffer_size": True}, "kv_buffer_size must be a number of bytes"),
        ({"kv_buffer_size": "1GB"}, "kv_buffer_size: expected an integer such as"),
        ({"kv_ip": "0.0.0.0"}, 'kv_connector_extra_config {"listen": "0.0.0.0"}'),
        ({"kv_ip": "[::]"}, "is no address at which others find this instance"),
        ({"kv_ip": "unix:/run/kv"}, "is for SharedMemoryConnector"),
        ({"kv_connector": "SharedMemoryConnector"}, "kv_ip '127.0.0.1' must be unix:PATH"),
        ({"kv_load_failure_policy": "ignore"}, "recompute or fail"),
        ({"kv_connector_module_path": "a.b"}, "runs no code of others"),
        ({"kv_connector_extra_config": [1]}, "must be an object"),
        ({"kv_role": "kv_consumer"}, 'needs kv_connector_extra_config {"peers"'),
    ],
)
def test_mistakes_are_one_error_each(keys: dict[str, object], says: str) -> None:
    assert says in refusal(**keys)


def test_the_page_has_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "disaggregation.md").read_text(encoding="utf-8")
    keys = {item.name for item in fields(KVTransfer)} - {"_peers"} | IDLE_KEYS | set(CONNECTORS)
    assert [key for key in keys | set(ROLES) if f"`{key}`" not in page] == []


def test_replicas_have_ports_and_names_of_their_own() -> None:
    config = from_flat(
        {"kv_transfer_config": BASE | {"engine_id": "p", "kv_port": 5600}}
    ).kv_transfer
    each = [config.of_replica(index, 2).transfer for index in range(2)]
    assert [(one.engine_id, one.kv_port) for one in each if one] == [("p-0", 5600), ("p-1", 5602)]
    assert from_flat({}).kv_transfer.of_replica(1, 2).transfer is None


@pytest.mark.parametrize(
    "others", [{"enable_prefix_caching": False}, {"nnodes": 2, "tensor_parallel_size": 2}]
)
def test_options_that_do_not_go_with_it(others: dict[str, object]) -> None:
    from_flat(others)
    with pytest.raises(ConfigError, match=next(iter(others))):
        from_flat({"kv_transfer_config": BASE, **others})


@pytest.mark.parametrize(
    ("peer", "host", "ports", "admitted"),
    [
        ("10.0.0.1:5600", "10.0.0.1", [5600], True),
        ("10.0.0.1:5600", "10.0.0.1", [5600, 5601], True),
        ("10.0.0.1:5600", "10.0.0.1", [5601], False),
        ("10.0.0.1:5600", "10.0.0.1", [5600, 22], False),
        ("10.0.0.1:5600", "10.0.0.2", [5600], False),
        ("10.0.0.1", "10.0.0.1", [7], True),
        ("Prefill-0.kv:5600", "prefill-0.KV", [5600], True),
        ("prefill:5600", "prefill.evil", [5600], False),
        ("10.0.0.0/8:5600", "10.9.9.9", [5600], True),
        ("10.0.0.0/8:5600", "11.0.0.1", [5600], False),
        ("10.0.0.0/8:5600", "10.0.0.1.evil", [5600], False),
        ("10.0.0.0/8", "fe80::1", [5600], False),
        ("[::1]:5600", "::1", [5600], True),
        ("::1", "::1", [5600], True),
        ("unix:/run/p", "unix:/run/p", [0, 1], True),
        ("unix:/run/p", "unix:/run/q", [0], False),
        ("10.0.0.1", "unix:/run/q", [0], False),
    ],
)  # fmt: skip
def test_kv_is_read_from_peers_only(peer: str, host: str, ports: list[int], admitted: bool) -> None:
    assert of(extra={"peers": ["other:1", peer]}).admits(host, ports) is admitted
    assert of().admits(host, ports) is False
