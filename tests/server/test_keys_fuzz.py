"""Key files as editors, scripts and Kubernetes leave them: whatever one holds, the keys are those of the last
file without a mistake, and no request is lost."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quire.errors import ConfigError
from quire.server import keys as keys_module
from quire.server.keys import Keys

NAMES = ["a", "b", "c"]


def key_of(name: str) -> str:
    return f"sk-{name}"


def digest(name: str) -> str:
    return hashlib.sha256(key_of(name).encode()).hexdigest()


def good(names: list[str], **options: object) -> bytes:
    entries = [{"sha256": digest(name), "tenant": f"t-{name}"} for name in names]
    tenants = {f"t-{name}": options for name in names} if options else {}
    return json.dumps({"keys": entries, "tenants": tenants}).encode()


def accepted(keys: Keys) -> list[str]:
    return [name for name in NAMES if keys.find(key_of(name).encode()) is not None]


@contextmanager
def secret(content: bytes) -> Iterator[Secret]:
    with tempfile.TemporaryDirectory() as folder:
        yield Secret(Path(folder), content)


class Secret:
    """A file as Kubernetes mounts one of a Secret: a link to ..data, which is a link that is exchanged."""

    def __init__(self, folder: Path, content: bytes) -> None:
        self.folder, self.version = folder, 0
        self.path = folder / "keys"
        self.path.symlink_to("..data/keys")
        self.swap(content)

    def swap(self, content: bytes | None) -> None:
        """None: the new version has no such file."""
        self.version += 1
        version = self.folder / f"..v{self.version}"
        version.mkdir()
        if content is not None:
            (version / "keys").write_bytes(content)
        (self.folder / "..new").symlink_to(version.name)
        os.replace(self.folder / "..new", self.folder / "..data")


# --- one file ---------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.sampled_from([0, 1, 2**31, 2**63, 2**64, 10**12]),
)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from(["a", "b", "t-a", "", "a/b", "ünïcode", "x" * 65, "-a"]) | st.text(
    max_size=6
)
entries = st.fixed_dictionaries(
    {"sha256": st.sampled_from([digest("a"), digest("a").upper(), digest("b"), "sk-a"]) | values,
     "tenant": names | values},
    optional={"expires": st.sampled_from(["2999-01-01", "0001-01-01T00:00:00+23:59", "soon"]) | values,
              "name": values, "other": values},
)  # fmt: skip
options = st.fixed_dictionaries(
    {},
    optional={
        "weight": numbers | values, "best_priority": numbers | values, "rpm": numbers | values,
        "tpm": numbers, "concurrency": numbers, "shared_cache": values, "colour": values,
    },
)  # fmt: skip
files = st.fixed_dictionaries(
    {"keys": st.lists(entries, max_size=4) | values},
    optional={"tenants": st.dictionaries(names, options | values, max_size=3) | values},
)
texts = st.one_of(
    files.map(lambda file: json.dumps(file).encode("utf-8", "surrogatepass")),
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(["keys = ", "[tenants.a]\nrpm = ", "[tenants.a]\nweight = "]).flatmap(
        lambda start: st.sampled_from(
            ["9" * 5000, "[" * 5000, "{a=" * 3000, "nan", "inf", "-inf", "1e999", "0x" + "f" * 99, "true"]
        ).map(lambda value: (start + value).encode())
    ),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(content=texts)
@example(content=b'{"keys":' + b"[" * 100_000)
@example(content=b"\xef\xbb\xbf" + good(["a"]))
@example(content=good(["a"], rpm=10**400))
@example(content=good(["a"], weight=float("nan")))
def test_a_file_is_used_as_it_says_or_refused_with_a_config_error(content: bytes) -> None:
    """And what is used can be counted with: weights, rates and times are numbers of a sensible size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys"
        path.write_bytes(content)
        try:
            keys = Keys(path=path)
        except ConfigError:
            return
    for name in NAMES:
        key = keys.find(key_of(name).encode())
        if key is None:
            continue
        assert digest(name).encode() in content.lower()
        assert 0.01 <= key.tenant.options.weight <= 1000
        lease = key.tenant.quotas.take(1)
        headers = key.tenant.quotas.headers()
        for kind in ("requests", "tokens"):
            if f"x-ratelimit-limit-{kind}" in headers:
                limit = int(headers[f"x-ratelimit-limit-{kind}"])
                assert limit - 1 <= int(headers[f"x-ratelimit-remaining-{kind}"]) <= limit
        lease.cancel()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_mistake(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(mark + good(["a"]))
    assert accepted(Keys(path=path)) == ["a"]


# --- changes ----------------------------------------------------------------------------------------

changes = st.lists(
    st.one_of(
        st.tuples(st.just("good"), st.lists(st.sampled_from(NAMES), unique=True)),
        st.tuples(st.just("bad"), texts),
        st.tuples(st.just("none"), st.none()),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(changes=changes)
def test_the_last_file_without_a_mistake_holds(changes) -> None:
    async def scenario() -> None:
        with secret(good(["a"])) as mount:
            keys, expected, tenant = Keys(path=mount.path), ["a"], None
            for kind, value in changes:
                content = good(value, rpm=5) if kind == "good" else value
                if kind == "bad" and _is_valid(content):
                    continue
                mount.swap(content)
                before = keys.tenants.get("t-a")
                await keys.check()
                if kind == "good":
                    expected = [name for name in NAMES if name in value]
                    tenant = keys.tenants.get("t-a")
                    assert before is None or tenant is None or tenant is before
                assert keys.is_current == (kind == "good")
                assert accepted(keys) == expected

    asyncio.run(scenario())


def _is_valid(content: bytes) -> bool:
    try:
        keys_module._parse(content, "")
    except ConfigError:
        return False
    return True


async def test_a_file_that_is_exchanged_while_it_is_read(monkeypatch) -> None:
    """Each look sees one version or the other, never a mixture."""
    versions = [good(["a"], rpm=1), good(["a", "b"], rpm=2), good(["c"])]
    seen: set[tuple[str, ...]] = set()
    with secret(versions[0]) as mount:
        keys, done = Keys(path=mount.path), False

        def exchange() -> None:
            for number in range(400):
                mount.swap(versions[number % 3])
            mount.swap(versions[1])

        async def look() -> None:
            while not done:
                await keys.check()
                assert keys.is_current
                seen.add(tuple(accepted(keys)))

        looking = asyncio.ensure_future(look())
        await asyncio.to_thread(exchange)
        done = True
        await looking
        await keys.check()
        assert accepted(keys) == ["a", "b"]
        assert seen <= {("a",), ("a", "b"), ("c",)}


async def test_following_outlasts_every_mistake(monkeypatch) -> None:
    """A file that cannot be parsed must not end the task that looks for the next one."""
    monkeypatch.setattr(keys_module, "CHECK_SECONDS", 0.001)
    with secret(good(["a"])) as mount:
        keys = Keys(path=mount.path)
        async with keys.followed():
            for bad in (b"keys = " + b"9" * 5000, b'{"keys":' + b"[" * 100_000, b"\xff", None):
                mount.swap(bad)
                async with asyncio.timeout(30):
                    while keys.is_current:
                        await asyncio.sleep(0.001)
                mount.swap(good(["b"]))
                async with asyncio.timeout(30):
                    while not keys.is_current:
                        await asyncio.sleep(0.001)
                assert accepted(keys) == ["b"]


async def test_a_large_file_does_not_hold_up_requests(tmp_path: Path, monkeypatch) -> None:
    """It is parsed in a thread. Here parsing waits for the loop to go on."""
    path = tmp_path / "keys"
    path.write_bytes(good(["a"]))
    keys, loop = Keys(path=path), asyncio.get_running_loop()
    path.write_bytes(good(["b"]))
    parse = keys_module._parse

    def slow(content: bytes, where: str):
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(timeout=30)
        return parse(content, where)

    monkeypatch.setattr(keys_module, "_parse", slow)
    await keys.check()
    assert accepted(keys) == ["b"]


# --- requests while keys change (tenants-overload.md, proof 6) ----------------------------------------


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key_of(name)}"}


async def test_a_reload_loses_no_request(make_client, engine) -> None:
    """Requests that run, stream or wait while keys come and go all get their whole answers. The tenant's
    quotas are free again after them, also where it was removed meanwhile."""
    with secret(good(["a", "b"], tpm=100_000)) as mount:
        keys = Keys(path=mount.path)
        client = make_client(api_keys=keys)
        tenant = keys.tenants["t-a"]

        async def ask(name: str, stream: bool):
            body = {"prompt": "a b", "stream": stream}
            return await client.post("/v1/completions", json=body, headers=bearer(name))

        engine.hold()
        asked = [
            asyncio.ensure_future(ask(name, stream)) for name in "ab" for stream in (False, True)
        ]
        async with asyncio.timeout(30):
            while len(engine.submitted) < len(asked):
                await asyncio.sleep(0.001)
        for content in (good(["b"]), b"[[", good(["c"]), None, good(["b", "c"], tpm=5, rpm=1)):
            mount.swap(content)
            await keys.check()
        assert (await ask("a", False)).status_code == 401, "its key is gone"
        engine.release()
        answers = await asyncio.gather(*asked)
        assert [answer.status_code for answer in answers] == [200] * 4
        for answer in answers:
            assert "world" in answer.text and ("[DONE]" in answer.text or "usage" in answer.text)
        assert tenant.quotas.num_running == 0
        assert (await ask("b", False)).status_code == 200
