"""What ends a request early: its client, the drain deadline, a dying engine. And silence in between.

Run against a real socket: disconnects and keep-alives are properties of a connection.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import ssl
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
from scripted_engine import ScriptedEngine, data_lines

from quire.config import EngineConfig, ServerConfig
from quire.errors import ConfigError, ModelError
from quire.server.process import bind
from quire.server.run import StopSignals, serve_engine

COMPLETIONS = "/v1/completions"


class Running:
    """A server in this loop, on a free port."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.stop = StopSignals()
        self.url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.task: asyncio.Task[int]
        self.client: httpx.AsyncClient

    async def factory(self) -> ScriptedEngine:
        await self.may_load.wait()
        return self.engine

    async def until(self, condition, seconds=5.0):
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    async def ready(self):
        async with asyncio.timeout(5):
            while (await self.client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.01)


class Connection:
    """One kept open, unlike a pool's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, server: Running) -> Connection:
        url = httpx.URL(await server.url)
        return cls(*await asyncio.open_connection(url.host, url.port))

    async def send(self, method: str, path: str, body: object = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        self.writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        await self.writer.drain()

    async def ask(self, method: str, path: str, body: object = None) -> dict[str, str]:
        await self.send(method, path, body)
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        await self.reader.readexactly(int(headers["content-length"]))
        return {"connection": "", **headers, "status": first.split()[1]}

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


@asynccontextmanager
async def running(engine=None, *, wait=True, factory=None, **config):
    server = Running(engine or ScriptedEngine())
    if not wait:
        server.may_load.clear()
    options = replace(ServerConfig(host="127.0.0.1", port=0, shutdown_timeout=5.0), **config)
    server.task = asyncio.create_task(
        serve_engine(
            factory or server.factory, EngineConfig(), options, stop=server.stop,
            announce=server.url.set_result,
        )
    )  # fmt: skip
    await asyncio.wait({server.task, server.url}, return_when=asyncio.FIRST_COMPLETED)
    if not server.url.done():
        await server.task
    async with httpx.AsyncClient(base_url=server.url.result(), timeout=10) as server.client:
        if wait:
            await server.ready()
        try:
            yield server
        finally:
            server.stop.hit()
            server.stop.hit()
            server.engine.release()
            await asyncio.wait({server.task})


def ask(**fields) -> dict:
    return {"prompt": "a", "max_tokens": 5, **fields}


# --- disconnects ----------------------------------------------------------------------------------


@pytest.mark.parametrize("held_at", ["before the first token", "in the middle"])
@pytest.mark.parametrize("prompts", ["a", ["a", "b", "c"]])
async def test_leaving_a_stream_aborts_it(held_at, prompts):
    async with running() as server:
        if held_at == "before the first token":
            server.engine.hold()
        else:
            server.engine.answer = ["word"] * 5
            original = server.engine.next_token

            async def valve(position=0):
                if position == 2:
                    server.engine.hold()
                await original(position)

            server.engine.next_token = valve
        body = ask(stream=True, prompt=prompts)
        async with server.client.stream("POST", COMPLETIONS, json=body) as response:
            assert response.status_code == 200
        count = 1 if prompts == "a" else 3
        await server.until(
            lambda: [s.aborts for s in server.engine.streams] == [1] * count, seconds=1.0
        )


async def test_leaving_a_whole_answer_aborts_it():
    async with running() as server:
        server.engine.hold()
        with pytest.raises(httpx.ReadTimeout):
            await server.client.post(COMPLETIONS, json=ask(), timeout=0.2)
        await server.until(lambda: [s.aborts for s in server.engine.streams] == [1], seconds=1.0)
        server.engine.release()
        assert (await server.client.post(COMPLETIONS, json=ask())).status_code == 200
        text = (await server.client.get("/metrics")).text
        assert 'handler="/v1/completions",method="POST",status="4xx"} 1.0' in text


async def test_a_storm_of_disconnects_leaves_nothing_behind():
    async with running() as server:
        server.engine.hold()

        async def one(streamed):
            with pytest.raises((httpx.ReadTimeout, httpx.ConnectTimeout)):
                await server.client.post(
                    COMPLETIONS, json=ask(stream=streamed), timeout=httpx.Timeout(5, read=0.3)
                )

        await asyncio.gather(*(one(i % 2 == 0) for i in range(40)))
        await server.until(
            lambda: len(server.engine.streams) == 40 and all(s.ended for s in server.engine.streams)
        )
        server.engine.release()
        assert (await server.client.post(COMPLETIONS, json=ask())).status_code == 200


async def test_finished_requests_are_not_aborted():
    async with running() as server:
        await server.client.post(COMPLETIONS, json=ask())
        await server.client.post(COMPLETIONS, json=ask(stream=True))
        assert [s.aborts for s in server.engine.streams] == [0, 0]


# --- keep-alive -----------------------------------------------------------------------------------


async def test_silence_is_filled_with_comments():
    async with running(sse_keep_alive_interval=0.05) as server:
        server.engine.hold()
        body = ask(stream=True)
        async with server.client.stream("POST", COMPLETIONS, json=body) as response:
            received = b""
            async for part in response.aiter_bytes():
                received += part
                if received.count(b": keep-alive\n\n") == 3:
                    server.engine.release()
        assert received.startswith(b": keep-alive\n\n" * 3)
        assert len(data_lines(received)) == 6


async def test_no_comments_when_switched_off():
    async with running(sse_keep_alive_interval=0.0) as server:
        server.engine.hold()
        asyncio.get_running_loop().call_later(0.2, server.engine.release)
        response = await server.client.post(COMPLETIONS, json=ask(stream=True))
        assert b": keep-alive" not in response.content


# --- a life ---------------------------------------------------------------------------------------


async def test_probes_are_answered_before_the_model_is_loaded():
    async with running(wait=False) as server:
        assert (await server.client.get("/health")).json() == {"status": "loading"}
        response = await server.client.post(COMPLETIONS, json=ask())
        assert response.status_code == 503 and response.headers["retry-after"]
        server.may_load.set()
        await server.ready()
        assert (await server.client.post(COMPLETIONS, json=ask())).status_code == 200


async def test_signal_while_loading_leaves_at_once():
    async with running(wait=False) as server:
        server.stop.hit()
        assert await asyncio.wait_for(server.task, 3) == 0


async def test_drain_lets_running_requests_finish():
    async with running() as server:
        server.engine.hold()
        first = asyncio.create_task(server.client.post(COMPLETIONS, json=ask(stream=True)))
        second = asyncio.create_task(server.client.post(COMPLETIONS, json=ask()))
        await server.until(lambda: len(server.engine.streams) == 2)
        server.stop.hit()
        await asyncio.sleep(0.05)
        assert (await server.client.get("/ready")).json() == {"status": "draining"}
        assert (await server.client.get("/health")).status_code == 200
        refused = await server.client.post(COMPLETIONS, json=ask())
        assert refused.status_code == 503 and refused.headers["retry-after"]
        server.engine.release()
        assert data_lines((await first).content)[-1] == "[DONE]"
        assert (await second).json()["choices"][0]["finish_reason"] == "stop"
        assert await asyncio.wait_for(server.task, 5) == 0
        assert server.engine.shut_down
        assert [s.aborts for s in server.engine.streams] == [0, 0]


async def test_a_connection_closes_after_the_answer_that_a_drain_waits_for():
    """Else its client sends the next request there, and gets a 503."""
    async with running() as server:
        server.engine.hold()
        idle = await Connection.open(server)
        assert (await idle.ask("GET", "/ready"))["connection"] == ""
        busy = await Connection.open(server)
        asking = asyncio.create_task(busy.ask("POST", COMPLETIONS, ask()))
        await server.until(lambda: len(server.engine.streams) == 1)
        server.stop.hit()
        assert await asyncio.wait_for(idle.reader.read(), 3) == b""
        late = await Connection.open(server)
        assert (await late.ask("GET", "/health"))["connection"] == "close"
        server.engine.release()
        assert (await asking)["connection"] == "close"
        assert await asyncio.wait_for(busy.reader.read(), 3) == b""
        for each in (idle, busy, late):
            await each.close()
        assert await asyncio.wait_for(server.task, 5) == 0


async def test_requests_are_served_until_everyone_has_noticed_the_drain():
    async with running(drain_delay=60.0) as server:
        connection = await Connection.open(server)
        assert (await connection.ask("POST", COMPLETIONS, ask()))["connection"] == ""
        server.stop.hit()
        async with asyncio.timeout(5):
            while (await server.client.get("/ready")).status_code != 503:
                await asyncio.sleep(0.01)
        # On the connection that was open, and on a new one; each closes.
        for each in (connection, await Connection.open(server)):
            answer = await each.ask("POST", COMPLETIONS, ask())
            assert (answer["status"], answer["connection"]) == ("200", "close")
            assert await asyncio.wait_for(each.reader.read(), 3) == b""
            await each.close()
        server.stop.hit()  # a second signal ends the delay too
        assert await asyncio.wait_for(server.task, 5) == 0


async def test_a_client_whose_stream_had_begun_is_told_with_its_next_answer():
    """A connection that closed after the stream would lose a request that is sent at that moment."""
    async with running(drain_delay=60.0) as server:
        next_token, may_go_on = server.engine.next_token, asyncio.Event()

        async def held(position: int = 0) -> None:
            if position:
                await may_go_on.wait()
            await next_token(position)

        server.engine.next_token = held
        connection = await Connection.open(server)
        await connection.send("POST", COMPLETIONS, ask(stream=True))
        head = await connection.reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head.lower()
        server.stop.hit()
        async with asyncio.timeout(5):
            while (await server.client.get("/ready")).status_code != 503:
                await asyncio.sleep(0.01)
        may_go_on.set()
        assert b"[DONE]" in await connection.reader.readuntil(b"\r\n0\r\n\r\n")
        answer = await connection.ask("POST", COMPLETIONS, ask())
        assert (answer["status"], answer["connection"]) == ("200", "close")
        assert await asyncio.wait_for(connection.reader.read(), 3) == b""
        await connection.close()
        server.stop.hit()
        assert await asyncio.wait_for(server.task, 5) == 0


async def test_the_delay_of_a_drain_ends():
    async with running(drain_delay=0.2) as server:
        server.stop.hit()
        assert await asyncio.wait_for(server.task, 5) == 0


@pytest.mark.parametrize("how", ["deadline", "second signal"])
async def test_what_does_not_finish_is_told(how):
    async with running(shutdown_timeout=0.2 if how == "deadline" else 60.0) as server:
        server.engine.hold()
        first = asyncio.create_task(server.client.post(COMPLETIONS, json=ask(stream=True)))
        second = asyncio.create_task(server.client.post(COMPLETIONS, json=ask()))
        await server.until(lambda: len(server.engine.streams) == 2)
        server.stop.hit()
        if how == "second signal":
            server.stop.hit()
        lines = data_lines((await first).content)
        assert json.loads(lines[-2])["error"]["message"] == "The server is shutting down."
        assert lines[-1] == "[DONE]"
        response = await second
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "The server is shutting down."
        assert await asyncio.wait_for(server.task, 5) == 0
        assert [s.aborts for s in server.engine.streams] == [1, 1]


async def test_zero_timeout_aborts_at_once():
    async with running(shutdown_timeout=0.0) as server:
        server.engine.hold()
        first = asyncio.create_task(server.client.post(COMPLETIONS, json=ask(stream=True)))
        await server.until(lambda: len(server.engine.streams) == 1)
        server.stop.hit()
        assert json.loads(data_lines((await first).content)[-2])["error"]["code"] == 503
        assert await asyncio.wait_for(server.task, 5) == 0


async def test_dead_engine_ends_requests_and_the_process():
    async with running() as server:
        server.engine.hold()
        first = asyncio.create_task(server.client.post(COMPLETIONS, json=ask(stream=True)))
        second = asyncio.create_task(server.client.post(COMPLETIONS, json=ask()))
        await server.until(lambda: len(server.engine.streams) == 2)
        server.engine.die("The engine core exited with status -9.")
        assert json.loads(data_lines((await first).content)[-2])["error"]["code"] == 500
        assert (await second).status_code == 500
        assert await asyncio.wait_for(server.task, 8) == 1
        assert server.engine.shut_down


async def test_engine_that_dies_silently_still_ends_its_requests():
    """The engine should raise in every stream; if it does not, the server does it."""
    async with running() as server:
        server.engine.hold()
        first = asyncio.create_task(server.client.post(COMPLETIONS, json=ask(stream=True)))
        await server.until(lambda: len(server.engine.streams) == 1)
        server.engine.is_dead = True
        assert json.loads(data_lines((await first).content)[-2])["error"]["code"] == 500
        assert await asyncio.wait_for(server.task, 8) == 1


async def test_what_keeps_the_engine_from_starting_is_raised():
    async def factory():
        raise ModelError("no weights")

    server_task = asyncio.create_task(
        serve_engine(
            factory, EngineConfig(), ServerConfig(host="127.0.0.1", port=0), announce=lambda _: None
        )
    )
    with pytest.raises(ModelError, match="no weights"):
        await asyncio.wait_for(server_task, 5)


# --- where it listens -----------------------------------------------------------------------------


async def test_port_in_use_is_a_clear_error():
    async with running() as server:
        port = httpx.URL(server.url.result()).port
        with pytest.raises(ConfigError, match=f"port {port}"):
            async with running(port=port):
                pass


async def test_what_is_written_is_sent_at_once():
    """Nagle's algorithm would hold an answer's second piece back until the first is acknowledged: 40 ms."""
    nodelay: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        nodelay.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listener = bind(ServerConfig(host="127.0.0.1", port=0))
    async with await asyncio.start_server(connected, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert await nodelay
        writer.close()


async def test_unix_socket(tmp_path):
    path = tmp_path / "quire.sock"
    engine = ScriptedEngine()
    stop = StopSignals()
    url = asyncio.get_running_loop().create_future()

    async def factory():
        return engine

    for _ in range(2):  # the second finds nothing left of the first
        config = ServerConfig(uds=str(path))
        stop, url = StopSignals(), asyncio.get_running_loop().create_future()
        task = asyncio.create_task(
            serve_engine(factory, EngineConfig(), config, stop=stop, announce=url.set_result)
        )
        assert await asyncio.wait_for(url, 5) == f"unix:{path}"
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            assert (await client.get("/version")).status_code == 200
        stop.hit()
        assert await asyncio.wait_for(task, 5) == 0
        assert not path.exists()


async def test_a_file_in_the_way_is_not_removed(tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")

    async def factory():
        return ScriptedEngine()

    with pytest.raises(ConfigError, match="precious"):
        await serve_engine(factory, EngineConfig(), ServerConfig(uds=str(path)))
    assert path.read_text() == "data"


async def test_tls(tmp_path):
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout",
         str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("needs openssl")
    files = {"ssl_keyfile": str(tmp_path / "key.pem"), "ssl_certfile": str(tmp_path / "cert.pem")}
    async with running(wait=False, **files) as server:
        assert server.url.result().startswith("https://")
        context = ssl.create_default_context(cafile=files["ssl_certfile"])
        async with httpx.AsyncClient(base_url=server.url.result(), verify=context) as client:
            assert (await client.get("/version")).status_code == 200


async def test_bad_tls_files():
    with pytest.raises(ConfigError, match="TLS"):
        async with running(ssl_certfile="/nonexistent.pem", ssl_keyfile="/nonexistent.key"):
            pass


# --- raw connections ------------------------------------------------------------------------------


async def raw(server: Running, data: bytes) -> bytes:
    """What comes back until the server closes the connection, which it must do soon."""
    url = httpx.URL(server.url.result())
    reader, writer = await asyncio.open_connection(url.host, url.port)
    received = b""
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(3):
            while part := await reader.read(65536):
                received += part
    except ConnectionError:
        pass
    finally:
        writer.close()
    return received


async def test_endless_headers_are_cut_off():
    async with running() as server:
        head = b"GET /health HTTP/1.1\r\nhost: x\r\n"
        answer = await raw(server, head + b"x-a: " + b"a" * 300_000)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
        many = b"".join(b"x-%d: y\r\n" % i for i in range(20_000))
        answer = await raw(server, head + many)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
        assert (await server.client.get("/health")).status_code == 200


@pytest.mark.parametrize("size", [70_000, 200_000])
async def test_a_body_that_comes_in_one_piece_is_no_head(size):
    async with running() as server:
        for _ in range(3):
            response = await server.client.post(COMPLETIONS, json=ask(user="x" * size))
            assert response.status_code == 200, response.text


async def test_twenty_megabytes_with_and_without_a_length():
    async with running() as server:
        big = b'{"prompt": "' + b"x" * (20 << 20) + b'"}'
        headers = {"content-type": "application/json"}
        response = await server.client.post(COMPLETIONS, content=big, headers=headers)
        assert response.status_code == 413

        async def parts():
            for start in range(0, len(big), 1 << 16):
                yield big[start : start + (1 << 16)]

        response = await server.client.post(COMPLETIONS, content=parts(), headers=headers)
        assert response.status_code == 413
        assert server.engine.submitted == []
        assert (await server.client.post(COMPLETIONS, json=ask())).status_code == 200


async def test_host_header_over_the_wire(monkeypatch):
    monkeypatch.setenv("QUIRE_API_KEY", "k")
    async with running(wait=False) as server:
        server.may_load.set()
        await server.ready()
        for target in (b"/v1/models", b"http://x/health?@y/v1/models", b"/v1/models?/health"):
            for host in (b"a/?x=", b"x/health?"):
                answer = await raw(
                    server,
                    b"GET " + target + b" HTTP/1.1\r\nhost: " + host
                    + b"\r\nconnection: close\r\n\r\n",
                )  # fmt: skip
                status = int(answer.split()[1])
                if target.startswith(b"http"):
                    assert status == 401 or b"data" not in answer
                else:
                    assert status == 401, (target, host, answer)


SCRIPT = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from scripted_engine import ScriptedEngine
from quire.config import EngineConfig, ServerConfig
from quire.server.run import serve_engine

async def factory():
    return ScriptedEngine()

config = ServerConfig(host="127.0.0.1", port=0, api_key=("k",), max_body_bytes=1000)
raise SystemExit(asyncio.run(serve_engine(
    factory, EngineConfig(), config, announce=lambda url: print(url, flush=True))))
"""


@pytest.mark.parametrize("flags", [(), ("-O",)], ids=["plain", "optimised"])
def test_a_process_obeys_signals_and_keeps_its_guards(flags):
    """`python -O` removes asserts; no guard may be one."""
    from pathlib import Path

    code = SCRIPT.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, *flags, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = process.stdout.readline().strip()
        with httpx.Client(base_url=url, headers={"authorization": "Bearer k"}) as client:
            for _ in range(100):
                if client.get("/ready").status_code == 200:
                    break
            assert client.post(COMPLETIONS, json=ask()).status_code == 200
            assert client.post(COMPLETIONS, json=ask(prompt=[10**6])).status_code == 400
            assert client.post(COMPLETIONS, json=ask(n=0)).status_code == 400
            assert client.post(COMPLETIONS, json=ask(prompt="x" * 2000)).status_code == 413
            assert (
                client.post(
                    COMPLETIONS, json=ask(tools=1, guided_json={"type": "object"})
                ).status_code
                == 400
            )
            assert (
                client.get("/v1/models", headers={"authorization": "Bearer x"}).status_code == 401
            )
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 0, errors


def test_the_front_end_is_lean():
    heavy = ("torch", "transformers", "openai", "numpy", "huggingface_hub")
    code = (
        "import quire.server.app, quire.server.run, sys; "
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
