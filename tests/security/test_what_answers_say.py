"""Texts of exceptions never reach a client: one of them held an address of the heap (CVE-2026-54236), and the
route for another dialect was mended later than the first."""

from __future__ import annotations

import pytest
from tests.security.bodies import CONVERSATIONS, PROMPTED

SECRET = "<Image at 0x7f3a00> /root/.cache/key"


@pytest.mark.parametrize("path", PROMPTED)
@pytest.mark.parametrize("kind", [RuntimeError, KeyError, ValueError, OSError, MemoryError])
async def test_no_route_echoes_the_text_of_an_exception(client, engine, monkeypatch, path, kind):
    def fail(*args, **options):
        raise kind(SECRET)

    monkeypatch.setattr(engine.model.tokenizer, "encode", fail)
    await _check(client, path)
    if path in CONVERSATIONS:
        monkeypatch.setattr(engine.model.chat_template, "render", fail)
        await _check(client, path)


async def _check(client, path) -> None:
    answer = await client.post(path, json=PROMPTED[path])
    assert answer.status_code == 500, answer.text
    for part in ("0x7f3a", "/root", "Error(", "Traceback"):
        assert part not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
