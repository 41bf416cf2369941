"""A template's work is bounded on every route that renders one, and none comes from a client.

vLLM mended this route by route, and /v1/responses was forgotten (PYSEC-2026-4344). Here the limits are in
`ChatTemplate.render`, below all routes."""

from __future__ import annotations

import pytest
from tests.security.bodies import CONVERSATIONS, COUNTING, saying

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
    plain = (await client.post(path, json=body)).json()
    for field in (
        {"chat_template": bomb},
        *(
            {"chat_template_kwargs": {name: bomb}}
            for name in ("chat_template", "messages", "tools")
        ),
        *({"chat_template_kwargs": {name: bomb}} for name in ("raise_exception", "strftime_now")),
    ):
        response = await client.post(path, json=body | field)
        if (
            path in COUNTING and response.status_code == 200
        ):  # it reads what matters to a count alone
            assert response.json() == plain
        else:
            said = response.status_code == 400 or next(iter(field)) in response.text
            assert said, (field, response.text)
    assert all(each.prompt == engine.submitted[0].prompt for each in engine.submitted)
