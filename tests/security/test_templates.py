"""A template's work is bounded on every route that renders one, and none comes from a client.

vLLM mended this route by route, and /v1/responses was forgotten (PYSEC-2026-4344). Here the limits are in
`ChatTemplate.render`, below all routes."""

from __future__ import annotations

import pytest
from tests.security.bodies import CONVERSATIONS, saying

from quire.text.chat_template import ChatTemplate

SAFE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
FUEL = SAFE + (
    "{% if messages[0].content[:4] == 'boom' %}{% for i in range(10000) %}{% for j in range(10000) %}"
    "{% endfor %}{% endfor %}{% endif %}"
)
OUTPUT = SAFE + (
    "{% if messages[0].content[:4] == 'boom' %}{% for i in range(10000) %}{{ messages[0].content }}"
    "{% endfor %}{% endif %}"
)


@pytest.mark.parametrize("path", CONVERSATIONS)
@pytest.mark.parametrize(
    ("source", "text"), [(FUEL, "boom"), (OUTPUT, "boom" + "x" * 5000)], ids=["fuel", "output"]
)
async def test_fuel_and_output_are_limited_on_every_route(client, engine, path, source, text):
    engine.model.chat_template = ChatTemplate(source)
    response = await client.post(path, json=saying(path, text))
    assert response.status_code == 400, response.text
    assert "template" in response.json()["error"]["message"]
    assert engine.submitted == []
    good = await client.post(path, json=saying(path, "hi"))
    assert good.status_code == 200, good.text


@pytest.mark.parametrize("path", CONVERSATIONS)
async def test_no_route_takes_a_template(client, engine, path):
    """As a field, or as an argument that would stand for the template, its messages or its functions."""
    engine.model.chat_template = ChatTemplate(SAFE)
    bomb = "{{ cycler.__init__.__globals__.os.system('id') }}"
    body = CONVERSATIONS[path]
    response = await client.post(path, json=body | {"chat_template": bomb})
    assert response.status_code == 400 or "chat_template" in response.text, response.text
    assert all("os.system" not in str(each.prompt) for each in engine.submitted)
    for name in ("chat_template", "messages", "tools", "raise_exception", "strftime_now"):
        response = await client.post(path, json=body | {"chat_template_kwargs": {name: bomb}})
        if response.status_code == 200:  # a dialect without this field
            assert "chat_template_kwargs" in response.text, response.text
        else:
            assert response.status_code == 400, response.text
