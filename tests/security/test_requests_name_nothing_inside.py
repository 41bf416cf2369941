"""Names in a request are never files, addresses to fetch, or objects and code of this process."""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest
from tests.security.bodies import CONVERSATIONS, COUNTING, PROMPTED, saying
from tests.server.scripted_engine import ScriptedEngine

from quire.config import EngineConfig, LoRAConfig
from quire.text.chat_template import ChatTemplate

OUTSIDE = "http://169.254.169.254/latest/meta-data"
URLS = (
    OUTSIDE,
    "https://127.0.0.1:1/x",
    "file:///etc/passwd",
    "data:image/png;base64,AAAA",
    "ftp://a/b",
)

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

_watched: list[str] | None = None


def _note_opens(event: str, arguments: tuple[object, ...]) -> None:
    if _watched is not None and event == "open":
        _watched.append(str(arguments[0]))


sys.addaudithook(_note_opens)  # it cannot be removed, hence the switch


@pytest.fixture
def opened():
    """The files that are opened meanwhile."""
    global _watched
    _watched = []
    yield _watched
    _watched = None


@pytest.fixture
def connections(monkeypatch):
    """The hosts that somebody looks up or connects to meanwhile."""
    found: list[object] = []

    def note(*arguments, **options):
        found.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", note)
    monkeypatch.setattr(socket.socket, "connect", note)
    monkeypatch.setattr(socket.socket, "connect_ex", note)
    monkeypatch.setattr(asyncio.BaseEventLoop, "sock_connect", note)
    return found


def parts(url: str) -> list[dict]:
    source = {"type": "url", "url": url}
    return [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image_url": url},
        {"type": "video_url", "video_url": {"url": url}}, {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "input_image", "image_url": url}, {"type": "input_file", "file_url": url},
        {"type": "file", "file": {"file_id": url}}, {"type": "image", "source": source},
        {"type": "document", "source": source}, {"type": "image_embeds", "image_embeds": url},
    ]  # fmt: skip


@pytest.mark.parametrize("path", CONVERSATIONS)
async def test_no_url_is_fetched(client, engine, connections, opened, path):
    engine.model.chat_template = ChatTemplate(TEMPLATE)
    for url in URLS:
        for part in parts(url):
            answer = await client.post(path, json=saying(path, [part]))
            assert answer.status_code == 400, (part, answer.text)
    for url in URLS:  # a text that is a URL is a text
        assert (await client.post(path, json=saying(path, url))).status_code == 200
    assert connections == []
    assert [name for name in opened if "passwd" in name] == []


@pytest.mark.parametrize("path", PROMPTED)
async def test_no_tensors_and_no_arguments_for_loaders(client, engine, path):
    """prompt_embeds were read by torch.load; mm_processor_kwargs named a revision whose code was run."""
    for name, value in (
        ("prompt_embeds", "gASVAAAAAAAAAIwFcG9zaXg="), ("mm_processor_kwargs", {"code_revision": "evil"}),
        ("mm_processor_kwargs", {"trust_remote_code": True}), ("media_io_kwargs", {"video": {"fps": 9}}),
        ("multi_modal_data", {"image": "x"}), ("mm_hashes", ["h"]), ("shm_handle", "psm_1"),
        ("logits_processors", ["os.system"]), ("custom_logit_processor", "gASV"),
        ("lora_path", "/etc"), ("tp_size", 10**9), ("vllm_xargs", {"a": "b"}),
    ):  # fmt: skip
        before = len(engine.submitted)
        answer = await client.post(path, json=PROMPTED[path] | {name: value})
        if answer.status_code == 200:  # unknown here: said so, and not passed on
            said = name in answer.text or name in str(answer.headers) or path in COUNTING
            assert said, (name, answer.text)
            for each in engine.submitted[before:]:
                assert name not in repr(each.params)
        else:
            assert answer.status_code == 400, (name, answer.text)


NAMES = ("../../etc/passwd", "/etc/passwd", "..", ".", "a/../../etc/passwd", "~root", "a\x00b", "%2e%2e%2fx",
         "C:\\x", "\\\\host\\share", "a" * 5000, "$(id)", "file:///etc/passwd")  # fmt: skip


@pytest.mark.parametrize("path", PROMPTED)
async def test_a_models_name_is_no_path(make_client, tmp_path, opened, connections, path):
    """Also where names are looked up in a directory."""
    lora = LoRAConfig(enable_lora=True, lora_dir=(str(tmp_path / "adapters"),))
    (tmp_path / "adapters").mkdir()
    client = make_client(loaded=False, engine_config=EngineConfig(lora=lora))
    client.state.engine_loaded(ScriptedEngine(lora=lora))
    for name in NAMES:
        answer = await client.post(path, json=PROMPTED[path] | {"model": name})
        assert answer.status_code in (400, 404), (name, answer.text)
        assert str(tmp_path) not in answer.text
    assert [name for name in opened if "passwd" in name or name.startswith("/etc")] == []
    assert connections == []


async def test_ids_of_responses_are_no_paths(client, opened):
    for name in ("..%2f..%2fetc%2fpasswd", "resp_x%00", "resp_" + "x" * 5000):
        for method in ("GET", "DELETE"):
            assert (await client.request(method, f"/v1/responses/{name}")).status_code == 404
    assert [name for name in opened if "passwd" in name] == []
