"""Tools that lack what a template reads of every one."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from quire.text import ChatTemplate
from quire.text.tool_forms import describe_properties, fill_function, split_types

USER = [{"role": "user", "content": "quireuser"}]
BODY = "{{ messages[0].content }}"


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def template(each: str) -> ChatTemplate:
    inner = "{% for t in tools or [] %}{% set f = t.function %}" + each + "{% endfor %}"
    return ChatTemplate(inner + BODY)


OBJECT = {"type": "object", "properties": {"a": {"type": "string"}}}
EACH = "{% for k, v in f.parameters.properties.items() %}"
READS_ALL = "// {{ f.name + ': ' + f.description }}(" + EACH + "{{ k }} {% endfor %})\n"
READS_TYPE = EACH + "{{ k }}{% if v.type %}{{ ':' + v.type }}{% endif %}{% endfor %}\n"
READS_TEXT = EACH + "{{ k + '=' + v.description }}{% endfor %}\n"


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        ({}, "// f: ()"),
        ({"description": None, "parameters": None}, "// f: ()"),
        ({"parameters": OBJECT}, "// f: (a )"),
        ({"description": "d"}, "// f: d()"),
        ({"description": "d", "parameters": {}}, "// f: d()"),
        ({"description": "d", "parameters": {"type": "object"}}, "// f: d()"),
    ],
)
def test_a_function_without_description_or_parameters(function: dict[str, Any], shown: str) -> None:
    sent = [tool(**function)]
    before = copy.deepcopy(sent)
    text = template(READS_ALL).render(USER, tools=sent)
    assert text.splitlines()[0] == shown
    assert text.endswith("quireuser")
    assert sent == before


def test_several_types() -> None:
    properties = {"a": {"type": ["string", "null"]}, "b": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties}
    made = template(READS_TYPE)
    assert made.render(USER, tools=[tool(parameters=parameters)]).startswith("ab:integer")
    assert split_types in made.facts.tools


def test_properties_without_description() -> None:
    made = template(READS_TEXT)
    assert made.render(USER, tools=[tool(description="d", parameters=OBJECT)]).startswith("a=")
    assert describe_properties in made.facts.tools


def test_as_sent_where_the_template_takes_it() -> None:
    made = template("{{ f | tojson }}\n")
    assert made.facts.tools == ()
    assert made.render(USER, tools=[tool()]) == '{"name": "f"}\nquireuser'


def test_a_template_that_refuses_all_tools_is_left_alone() -> None:
    assert template("{{ raise_exception('no tools') }}").facts.tools == ()


def test_properties_within_properties() -> None:
    inner = {"type": "array", "items": {"type": "object", "properties": {"b": {}}}}
    parameters: Any = {"type": "object", "properties": {"a": inner, "c": True}}
    described: Any = describe_properties(tool(parameters=parameters))
    a = described["function"]["parameters"]["properties"]["a"]
    assert a["description"] == ""
    assert a["items"]["properties"]["b"] == {"description": ""}


@pytest.mark.parametrize("sent", [None, "f", {}, {"type": "custom"}, {"function": None}])
@pytest.mark.parametrize("rewrite", [fill_function, split_types, describe_properties])
def test_what_is_no_function_is_left_alone(rewrite: Any, sent: Any) -> None:
    assert rewrite(sent) == sent
