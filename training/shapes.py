"""Short JSON objects, as a schema wants them: values that the prompt states, values to invent, and
prompts that say nothing of the kind.

Under a grammar the model is not asked whether to write JSON, and the schema's keys may be ones that
the prompt does not name. Such answers carry `given`: their first token is forced and not learnt.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from training import words as w
from training.fields import (
    BY_KEY,
    HELD_OUT_KEYS,
    OPEN,
    PEOPLE,
    STATED,
    THINGS,
    Field,
    Schema,
    nested_field,
    object_schema,
    spoken,
    statement,
    unknown_field,
)

Ask = Callable[[Random], str]

JSON_WITH_KEYS: tuple[str, ...] = (
    "Give {} as JSON.",
    "Return {} as JSON.",
    "Extract {} as JSON.",
    "JSON with {}, please.",
    "Answer as JSON with {}.",
    "Write JSON with the keys {}.",
    "What are {}? Answer in JSON.",
    "Put {} into a JSON object.",
    "Return a JSON object with {}.",
    "give me {} in JSON",
    "respond with JSON: {}",
    "fill in {} as JSON",
    "I want {} as JSON.",
)
HELD_OUT_WITH_KEYS: tuple[str, ...] = (
    "Output {} in JSON format.",
    "Please reply with a JSON object that holds {}.",
    "Show {} as a JSON object.",
)
JSON_WITHOUT_KEYS: tuple[str, ...] = (
    "Answer as JSON.",
    "Give JSON.",
    "As JSON, please.",
    "Convert to JSON.",
    "Extract the data as JSON.",
    "Return only JSON.",
    "Parse this into JSON.",
    "in JSON",
    "JSON:",
)
HELD_OUT_WITHOUT_KEYS: tuple[str, ...] = ("Turn this text into JSON.", "Reply in JSON.")
INVENT: tuple[str, ...] = (
    "invent a {}",
    "make up a {}",
    "give me a random {}",
    "describe a {}",
    "generate a {}",
    "an example {}",
    "create a fictional {}",
    "tell me about a {}",
    "show me a {}",
    "a {}, please",
)
HELD_OUT_INVENT: tuple[str, ...] = ("dream up a {}", "I need test data: one {}")
ANYTHING: tuple[str, ...] = (
    "give me a JSON object",
    "write some JSON",
    "a JSON object, please",
    "show me an example of JSON",
    "any small JSON object",
    "answer with JSON",
)
AS_JSON = (" as JSON", " in JSON", " in JSON format", ". Answer as JSON.", ", as a JSON object")
SYSTEMS: tuple[str, ...] = (
    "Answer in JSON.",
    "You are a helpful assistant that writes JSON.",
    "Extract the fields as JSON.",
    "You extract data from text.",
    "Respond only with JSON.",
    "You are a helpful assistant.",
    "You are a parser.",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A conversation that ends in a question, the schema of its answer, and the answer.

    `stated`: the prompt says what the values are; `asked`: it asks for JSON, so that the answer needs
    no grammar.
    """

    messages: list[w.Message]
    schema: Schema
    value: dict[str, Any]
    stated: bool
    asked: bool

    @property
    def question(self) -> list[w.Message]:
        return self.messages[:-1]


def draw_fields(rng: Random, *, held_out: bool = False) -> list[Field]:
    """One to four fields: those of a thing, or any. Held out: one of them has an unseen key."""
    count = rng.choices((1, 2, 3, 4), (3, 8, 5, 2))[0]
    r = rng.random()
    if r < 0.35:
        keys = rng.choice(list(THINGS.values())).split()
        start = 0 if rng.random() < 0.7 else rng.randrange(len(keys))
        picked = [BY_KEY[k] for k in keys[start : start + count]]
    else:
        pool = [*PEOPLE, *STATED] if r < 0.85 else STATED
        picked = rng.sample(pool, count)
        if rng.random() < 0.45:
            picked[0] = rng.choice(PEOPLE) if rng.random() < 0.5 else BY_KEY["name"]
    if rng.random() < 0.12:
        picked[-1] = nested_field(rng)
    if held_out:
        picked[rng.randrange(len(picked))] = unknown_field(rng, rng.choice(HELD_OUT_KEYS))
    else:
        picked = [unknown_field(rng) if rng.random() < 0.2 else f for f in picked]
    return list({f.key: f for f in picked}.values())


def _renamed(value: Any, rng: Random) -> Any:
    """The same with names and cities that training never uses."""
    if isinstance(value, dict):
        return {k: _renamed(v, rng) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, rng) for v in value]
    if value in w.NAMES:
        return rng.choice(w.HELD_OUT_NAMES)
    return rng.choice(w.HELD_OUT_CITIES) if value in w.CITIES else value


def write(value: dict[str, Any], style: str) -> str:
    """JSON as `json.dumps` writes it, "compact", or "pretty"."""
    if style == "compact":
        return w.compact(value)
    return json.dumps(value, indent=2 if style == "pretty" else None, ensure_ascii=False)


def _answer(
    question: str, data: dict[str, Any], rng: Random, *, free: bool, system: str = ""
) -> list[w.Message]:
    """`free`: nothing in the prompt asks for JSON, or for these keys."""
    style = "plain"
    if free and rng.random() < 0.35:
        style = rng.choice(("compact", "compact", "pretty"))
    elif not free and rng.random() < 0.1:
        style, said_so = rng.choice(
            (
                ("compact", " Compact."),
                ("compact", " No spaces."),
                ("pretty", " Pretty."),
                ("pretty", " Indented."),
            )
        )
        question += said_so
    text = write(data, style)
    given = text[: 1 if style == "pretty" else 2] if free else ""
    head = [{"role": "system", "content": system}] if system else []
    return [*head, *w.turn(question, text, given)]


def _key_list(fields: list[Field], rng: Random) -> str:
    keys = [f.key if rng.random() < 0.8 else spoken(f.key) for f in fields]
    if rng.random() < 0.2:
        keys = ["the " + spoken(k) for k in keys]
    return w.listed(keys, rng)


def stated(rng: Random, *, held_out: bool = False) -> Shape:
    """The prompt states the values: extraction."""
    fields = draw_fields(rng, held_out=held_out and rng.random() < 0.5)
    data = {f.key: f.draw(rng) for f in fields}
    if held_out:
        data = {k: _renamed(v, rng) for k, v in data.items()}
    schema = object_schema(rng, fields)
    facts = statement(fields, data, rng)
    r = rng.random()
    if r < 0.6:
        asks = HELD_OUT_WITH_KEYS if held_out else JSON_WITH_KEYS
        ask, free = rng.choice(asks).format(_key_list(fields, rng)), False
    elif r < 0.8:
        ask = rng.choice(HELD_OUT_WITHOUT_KEYS if held_out else JSON_WITHOUT_KEYS)
        free = False
    else:
        ask, free = rng.choice(("", "What are {}?", "Tell me {}.", "Extract {}.")), True
        ask = ask.format(_key_list(fields, rng))
    between = rng.choice((" ", " ", "\n"))
    parts = [facts, ask] if rng.random() < 0.65 else [ask, facts]
    question = between.join(p for p in parts if p)
    system = rng.choice(SYSTEMS) if rng.random() < 0.3 else ""
    if rng.random() < 0.1:
        shown = f"Answer with JSON for this schema: {json.dumps(schema)}"
        system, question = (shown, facts) if rng.random() < 0.5 else ("", f"{facts}\n{shown}")
        free = False
    guided = free or (r >= 0.6 and rng.random() < 0.3)
    messages = _answer(question, data, rng, free=guided, system=system)
    return Shape(messages, schema, data, stated=True, asked=not free)


def to_invent(rng: Random, *, held_out: bool = False) -> Shape:
    """The prompt names a kind of thing, sometimes its keys, and no values."""
    thing = rng.choice(list(THINGS))
    keys = THINGS[thing].split()
    fields = [BY_KEY[k] for k in keys[: rng.choices((1, 2, 3, 4), (2, 6, 3, 1))[0]]]
    if rng.random() < 0.3:
        fields = draw_fields(rng)
    data = {f.key: f.draw(rng) for f in fields}
    question = rng.choice(HELD_OUT_INVENT if held_out else INVENT).format(thing)
    named = rng.random() < 0.4
    if named:
        question += " with " + _key_list(fields, rng)
    asked = rng.random() < 0.6
    if not held_out and rng.random() < 0.06:
        question, named, asked = rng.choice(ANYTHING), False, True
    elif asked:
        question += rng.choice(AS_JSON)
    system = rng.choice(SYSTEMS) if rng.random() < 0.25 else ""
    free = not asked or (not named and rng.random() < 0.3)
    messages = _answer(w.vary(rng, question), data, rng, free=free, system=system)
    return Shape(messages, object_schema(rng, fields), data, stated=False, asked=asked)


def unasked(rng: Random, question: str) -> Shape:
    """Any question under a schema that has nothing to do with it: short values, and an end.

    Few fields: whoever forces more forces the comma too, so that the model need only learn to end.
    """
    count = rng.choices((1, 2, 3, 4), (10, 6, 3, 1))[0]
    fields = []
    for _ in range(count):
        r = rng.random()
        pool = OPEN if r < 0.3 else PEOPLE if r < 0.5 else STATED
        fields.append(unknown_field(rng) if r > 0.85 else rng.choice(pool))
    fields = list({f.key: f for f in fields}.values())
    data = {f.key: f.draw(rng) for f in fields}
    from_prompt = [p.strip("?.,!:") for p in question.split() if p.strip("?.,!:").isalpha()]
    for field in fields:
        if field in OPEN and from_prompt and rng.random() < 0.4:
            at = rng.randrange(len(from_prompt))
            data[field.key] = " ".join(from_prompt[at : at + rng.randint(1, 3)])
    messages = _answer(question, data, rng, free=True)
    return Shape(messages, object_schema(rng, fields), data, stated=False, asked=False)
