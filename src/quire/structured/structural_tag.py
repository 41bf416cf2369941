"""Free text with tagged parts, each of which must match its own grammar, as one grammar in Lark's syntax.

Two forms, both from vLLM: `structures` and `triggers` (the older one), and `format`, a tree of formats. A
*trigger* is a text after which the model must continue with one of the tags that begin with it. Before a
trigger the text is free.

In the grammar, free text is a lexer token that matches as much as it can, so nothing could follow it.
Where something must follow, both are made one token, which ends as soon as it can ("lazy").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.structured.base import invalid

FORMATS: dict[str, tuple[str, ...]] = {
    "const_string": ("value",),
    "json_schema": ("json_schema",),
    "regex": ("pattern",),
    "grammar": ("grammar",),
    "any_text": (),
    "sequence": ("elements",),
    "or": ("elements",),
    "tag": ("begin", "content", "end"),
    "triggered_tags": ("triggers", "tags"),
    "tags_with_separator": ("tags", "separator"),
}
"""The fields that each type of format must have."""
OPTIONAL = {
    "json_schema": ("style",),
    "triggered_tags": ("at_least_one", "stop_after_first"),
    "tags_with_separator": ("at_least_one", "stop_after_first"),
}
ANY_TEXT = "/(?s:.*)/"
EMPTY = '""'


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the right-hand side of a rule."""

    text: str
    regular: bool = False
    """It can be part of a lexer token (literals, regexes), and not only of a rule."""
    open: bool = False
    """It ends in free text."""


def tag_grammar(
    tag: dict[str, Any],
    *,
    schema_text: Callable[[object], str],
    regex_text: Callable[[str], str],
    special_tokens: Mapping[str, int],
) -> str:
    """The grammar of a structural tag. The depth of `tag` is limited: see `spec.py`.

    schema_text, regex_text: functions that write a schema or a regex in Lark.

    Raises `InvalidParameterError`.
    """
    if "format" in tag:
        _check_keys(tag, ("format",), ("type",), "structural_tag")
        root = tag["format"]
    else:
        _check_keys(tag, ("structures", "triggers"), ("type",), "structural_tag")
        root = {
            "type": "triggered_tags",
            "triggers": tag["triggers"],
            "tags": [_old_tag(one) for one in _list(tag["structures"], "structures")],
        }
    writer = _Writer(schema_text, regex_text, special_tokens)
    start = writer.format(root)
    return "\n".join([f"%llguidance {{}}\nstart: {writer.in_rule(start)}", *writer.rules])


def _old_tag(structure: object) -> dict[str, Any]:
    structure = _object(structure, "a structure")
    _check_keys(structure, ("begin", "end"), ("schema",), "a structure")
    content = {"type": "json_schema", "json_schema": structure.get("schema", {})}
    return {"begin": structure["begin"], "content": content, "end": structure["end"]}


class _Writer:
    """Writes one grammar; `rules` are those that the start rule uses."""

    def __init__(
        self,
        schema_text: Callable[[object], str],
        regex_text: Callable[[str], str],
        special_tokens: Mapping[str, int],
    ) -> None:
        self.rules: list[str] = []
        self._schema_text = schema_text
        self._regex_text = regex_text
        # Longest first: a trigger may begin with another one.
        self._special = sorted(special_tokens.items(), key=lambda item: -len(item[0]))

    def format(self, value: object) -> Part:
        fmt = _object(value, "a format")
        kind = fmt.get("type", "tag" if "begin" in fmt else None)
        if kind not in FORMATS:
            raise invalid(f"the format type must be one of {', '.join(FORMATS)}.", kind)
        _check_keys(fmt, FORMATS[kind], ("type", *OPTIONAL.get(kind, ())), kind)
        if kind == "const_string":
            return self._literal(fmt["value"], "value")
        if kind == "json_schema":
            if fmt.get("style", "json") != "json":
                raise invalid("json_schema is supported in the style json only.", fmt["style"])
            return Part(f"%json {self._schema_text(fmt['json_schema'])}")
        if kind == "regex":
            return Part(f"/{self._regex_text(_text(fmt['pattern'], 'pattern'))}/", regular=True)
        if kind == "grammar":
            raise invalid("grammars inside structural tags are not supported; use grammar alone.")
        if kind == "any_text":
            return Part(ANY_TEXT, regular=True, open=True)
        if kind == "sequence":
            return self._sequence([self.format(one) for one in _list(fmt["elements"], "elements")])
        if kind == "or":
            return self._either([self.format(one) for one in _list(fmt["elements"], "elements")])
        if kind == "tag":
            return self._tag(self._literal(fmt["begin"], "begin"), fmt)
        if kind == "triggered_tags":
            return self._triggered(fmt)
        return self._separated(fmt)

    def _literal(self, value: object, name: str) -> Part:
        """A text in which the names of special tokens mean those tokens."""
        text = _text(value, name)
        for token, token_id in self._special:
            before, found, after = text.partition(token)
            if found:
                inner = f"<[{token_id}]>"
                return Part(
                    f"{self._literal(before, name).text} {inner} {self._literal(after, name).text}"
                )
        return Part(json.dumps(text) if text else "", regular=True)

    def _sequence(self, parts: Sequence[Part]) -> Part:
        """Parts one after the other; neighbours that are regular become one lexer token."""
        runs: list[list[Part]] = []
        for part in parts:
            if not part.text:
                continue
            if runs and runs[-1][-1].regular and part.regular:
                runs[-1].append(part)
            elif runs and runs[-1][-1].open:
                raise invalid("free text must be last, or in a tag that has an end.")
            else:
                runs.append([part])
        if len(runs) == 1 and runs[0][0].regular:
            text = " ".join(part.text for part in runs[0])
            return Part(f"({text})", regular=True, open=runs[0][-1].open)
        texts = [self._token(run) if run[0].regular else run[0].text for run in runs]
        return Part(" ".join(texts), open=bool(runs) and runs[-1][-1].open)

    def _tag(self, begin: Part, fmt: Mapping[str, Any]) -> Part:
        content = self.format(fmt["content"])
        ends = fmt["end"] if isinstance(fmt["end"], list) else [fmt["end"]]
        end = self._either([self._literal(one, "end") for one in ends])
        if content.open and not end.text:
            return self._sequence([begin, content])
        if not content.open:
            return self._sequence([begin, content, end])
        if not content.regular:
            raise invalid("free text must be last, or the only content of a tag.")
        if end.regular:
            return Part(f"{begin.text} {self._token([content, end], lazy=True)}")
        return Part(f"{begin.text} {content.text} {end.text}")

    def _triggered(self, fmt: Mapping[str, Any]) -> Part:
        triggers = [_text(one, "a trigger") for one in _list(fmt["triggers"], "triggers")]
        tags = [_object(one, "a tag") for one in _list(fmt["tags"], "tags")]
        for tag in tags:
            _check_keys(tag, FORMATS["tag"], ("type",), "a tag")
        bodies: list[str] = []
        first: list[str] = []
        for trigger in triggers:
            begins = [(tag, _text(tag["begin"], "begin")) for tag in tags]
            mine = [(tag, text) for tag, text in begins if text.startswith(trigger)]
            if not trigger or not mine:
                raise invalid("every trigger must begin the `begin` of a tag.", trigger)
            rest = [
                self._tag(self._literal(text.removeprefix(trigger), "begin"), tag)
                for tag, text in mine
            ]
            body = self._rule(self.in_rule(self._closed(rest)))
            literal = self._literal(trigger, "a trigger")
            free = Part(ANY_TEXT, regular=True, open=True)
            if literal.regular:
                bodies.append(f"{self._token([free, literal], lazy=True)} {body}")
            else:
                bodies.append(f"{self._token([free])} {literal.text} {body}")
            first.append(f"{literal.text} {body}")
        for tag in tags:
            if not any(_text(tag["begin"], "begin").startswith(trigger) for trigger in triggers):
                raise invalid("every tag must begin with one of the triggers.", tag["begin"])
        any_tag = self._rule(" | ".join(bodies))
        one_first = self._rule(" | ".join(first))
        if fmt.get("stop_after_first"):
            return Part(one_first) if fmt.get("at_least_one") else self._optional_tag(any_tag)
        head = f"{one_first} " if fmt.get("at_least_one") else ""
        return Part(f"{head}{any_tag}* {ANY_TEXT}", open=True)

    def _optional_tag(self, tag: str) -> Part:
        return Part(f"({tag} | {ANY_TEXT})", open=True)

    def _separated(self, fmt: Mapping[str, Any]) -> Part:
        tags = [
            self.format({"type": "tag"} | _object(one, "a tag"))
            for one in _list(fmt["tags"], "tags")
        ]
        tag = self._rule(self.in_rule(self._closed(tags)))
        separator = self._literal(fmt["separator"], "separator").text
        text = tag if fmt.get("stop_after_first") else f"{tag} ({separator} {tag})*"
        return Part(text if fmt.get("at_least_one") else f"({text})?")

    def _either(self, parts: Sequence[Part]) -> Part:
        if len(parts) == 1:
            return parts[0]
        regular = all(part.regular for part in parts)
        texts = [part.text or EMPTY if regular else self.in_rule(part) for part in parts]
        return Part(f"({' | '.join(texts)})", regular, any(part.open for part in parts))

    def _closed(self, tags: Sequence[Part]) -> Part:
        if any(tag.open for tag in tags):
            raise invalid("a tag with free text needs an end.")
        return self._either(tags)

    def in_rule(self, part: Part) -> str:
        """The part as it is written in a rule. A regular part is one token: else its pieces would be
        matched one by one, each as long as possible."""
        return self._token([part]) if part.regular and part.text else part.text or EMPTY

    def _rule(self, text: str) -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}: {text}")
        return name

    def _token(self, parts: Sequence[Part], *, lazy: bool = False) -> str:
        """A separate lexer token, written as a rule, since only rules can be lazy."""
        number = len(self.rules)
        self.rules.append(f"T{number}: {' '.join(part.text for part in parts)}")
        return self._lazy(number) if lazy else f"T{number}"

    def _lazy(self, number: int) -> str:
        self.rules.append(f"r{number}[lazy]: T{number}")
        return f"r{number}"


def _check_keys(
    value: Mapping[str, Any], required: Sequence[str], optional: Sequence[str], what: str
) -> None:
    missing = [key for key in required if key not in value]
    unknown = [key for key in value if key not in (*required, *optional)]
    if missing:
        raise invalid(f"{what} needs {', '.join(missing)}.")
    if unknown:
        raise invalid(f"{what} has the unknown field {unknown[0]!r}.", unknown[0])


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(f"{what} must be an object.", value)
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise invalid(f"{what} must be a list that is not empty.", value)
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise invalid(f"{what} must be text without NUL characters.", value)
    return value
