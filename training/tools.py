"""Conversations with tools: a call, its result, an answer in words, and questions that need no tool.

Tools are made up from verbs, nouns and fields, so that the model has to read the list it is shown.
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
    INTEGER,
    NUMBER,
    STRING,
    Field,
    Schema,
    said,
    spoken,
    unknown_field,
)

Messages = list[w.Message]

VERBS = (
    "get find book send set create delete play open start stop list check order cancel add remove "
    "update show count track translate schedule call buy make read write lookup search"
).split()
HELD_OUT_VERBS = "reserve print rename launch measure".split()
NOUNS = (
    "weather time table room flight train ticket email message reminder alarm lamp door song "
    "playlist note file user order package recipe price rate news score map route address contact "
    "calendar meeting event task invoice payment balance light heating forecast taxi movie"
).split()
HELD_OUT_NOUNS = "ferry museum garage printer rocket sauna ladder visa harbour".split()
QUERY_VERBS = "get find check show list lookup track search count read".split()

# Argument -> how a request states it.
PLACES = "city location place town destination".split()
ARGUMENTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(PLACES, ("in {}", "for {}", "to {}")),
    "name": ("for {}", "named {}", "called {}"),
    "customer": ("for {}", "of {}"),
    "contact": ("to {}", "for {}"),
    "user": ("for {}", "of {}"),
    "day": ("on {}", "for {}"),
    "date": ("on {}", "for {}"),
    "guests": ("for {} guests", "for {} people"),
    "people": ("for {} people", "for {}"),
    "minutes": ("for {} minutes", "in {} minutes"),
    "hours": ("for {} hours", "in {} hours"),
    "quantity": ("{} times", "with quantity {}"),
    "colour": ("in {}", "with colour {}"),
    "language": ("in {}", "into {}"),
    "item": ("with a {}", "for the {}"),
    "title": ("titled {}", "called {}"),
    "message": ("saying {}", "with the message {}"),
    "text": ("saying {}", "with the text {}"),
    "email": ("for {}", "to {}"),
    "priority": ("with {} priority", "with priority {}"),
    "order_id": ("for order {}", "with order id {}"),
    "id": ("with id {}", "number {}"),
    "price": ("below {}", "at {}"),
    "unit": ("in {}",),
    "query": ("for {}", "about {}"),
    "level": ("to {}", "at level {}"),
    "room": ("in room {}", "for room {}"),
}
UNITS = ["celsius", "fahrenheit"]
TEMPERATURES: tuple[str, ...] = ("sunny", "cloudy", "rain", "snow", "windy", "clear")
ASKS: tuple[str, ...] = (
    "{verb} the {noun}{facts}",
    "please {verb} a {noun}{facts}",
    "can you {verb} the {noun}{facts}?",
    "I want to {verb} a {noun}{facts}",
    "could you {verb} a {noun}{facts}?",
    "{verb} a {noun}{facts}, please",
    "{verb} {noun}{facts}",
    "use {tool}{facts}",
    "call {tool}{facts}",
)
QUERIES: tuple[str, ...] = (
    "what is the {noun}{facts}?",
    "what's the {noun}{facts}?",
    "show me the {noun}{facts}",
    "tell me the {noun}{facts}",
    "I need the {noun}{facts}",
    "how is the {noun}{facts}?",
)
HELD_OUT_ASKS: tuple[str, ...] = (
    "would you {verb} the {noun}{facts}?",
    "go and {verb} a {noun}{facts}",
    "I'd like you to {verb} the {noun}{facts}",
)
HELD_OUT_QUERIES: tuple[str, ...] = (
    "do you know the {noun}{facts}?",
    "let me see the {noun}{facts}",
)
# Tools that everybody tries, and what they are asked.
CLASSIC: tuple[tuple[str, str, str, str], ...] = (
    ("get_weather", "Get the weather in a city", "city", "what is the weather like in {}?"),
    ("get_weather", "Get the current weather", "location", "is it raining in {}?"),
    ("get_current_weather", "Weather of a place", "location", "how warm is it in {}?"),
    ("get_time", "Get the time in a city", "city", "what time is it in {}?"),
    ("find_person", "Look up a person", "name", "who is {}?"),
    ("buy", "Buy a thing", "item", "buy a {}"),
    ("set_colour", "Set the colour of the lamp", "colour", "make the lamp {}"),
    ("set_timer", "Set a timer in minutes", "minutes", "set a timer for {} minutes"),
)
# Name, description, and how two numbers are given.
SUMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("multiply", "Multiply two numbers", ("what is {} times {}?", "{} * {}", "multiply {} and {}")),
    ("add", "Add two numbers", ("what is {} plus {}?", "{} + {}", "add {} and {}")),
    ("subtract", "Subtract b from a", ("what is {} minus {}?", "{} - {}", "subtract: {}, {}")),
    ("divide", "Divide a by b", ("what is {} divided by {}?", "{} / {}", "divide {} by {}")),
    ("power", "Raise a to the power b", ("{} to the power {}", "what is {} ** {}?")),
    ("compare", "Compare two numbers", ("is {} more than {}?", "compare {} and {}")),
)
SUM_KEYS: tuple[tuple[str, str], ...] = (
    ("a", "b"),
    ("x", "y"),
    ("first", "second"),
    ("left", "right"),
)
FAILURES = (
    "not found",
    "timeout",
    "no such city",
    "permission denied",
    "unknown id",
    "bad request",
)
FAILED = "The call of {} failed: {}."


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a conversation offers."""

    name: str
    text: str
    fields: tuple[Field, ...]
    required: tuple[str, ...]
    verb: str
    noun: str

    def schema(self, rng: Random | None = None) -> Schema:
        """`parameters`; with `rng` in one of the forms that clients write."""
        properties: dict[str, Schema] = {}
        for field in self.fields:
            properties[field.key] = dict(field.schema)
            if rng and rng.random() < 0.15:
                properties[field.key]["description"] = f"The {spoken(field.key)}"
        schema: Schema = {"type": "object", "properties": properties}
        if self.required:
            schema["required"] = list(self.required)
        if rng and rng.random() < 0.25:
            schema["additionalProperties"] = False
        return schema


@dataclass(frozen=True, slots=True)
class Task:
    """A conversation that ends in a question, the tools as `tools` has them, and the call wanted."""

    messages: Messages
    specs: list[dict[str, Any]]
    name: str
    arguments: dict[str, Any]

    @property
    def question(self) -> Messages:
        """What a client sends: without the system text, which the template writes from `specs`."""
        return [m for m in self.messages[:-1] if m["role"] != "system"]


def tool_spec(tool: Tool, rng: Random | None = None) -> dict[str, Any]:
    """A tool in OpenAI's shape."""
    function = {"name": tool.name, "description": tool.text, "parameters": tool.schema(rng)}
    if rng and rng.random() < 0.1:
        del function["description"]
    if rng and rng.random() < 0.1:
        function["strict"] = True
    return {"type": "function", "function": function}


def tool_system(specs: list[dict[str, Any]]) -> str:
    """The system text that the chat template writes for `tools`; a test keeps the two equal."""
    lines = "\n".join(json.dumps(spec) for spec in specs)
    return f"You may call these tools:\n<tools>\n{lines}\n</tools>"


def write_call(name: str, arguments: str) -> str:
    """A call as the chat template writes it; `arguments` is JSON."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _argument(rng: Random, *, held_out: bool) -> Field:
    if held_out and rng.random() < 0.6:
        return unknown_field(rng, rng.choice(HELD_OUT_KEYS))
    if rng.random() < 0.15 and not held_out:
        return unknown_field(rng)
    key = rng.choice((*ARGUMENTS, "city", "location", "name", "query"))
    if key == "unit":
        return Field(key, {**STRING, "enum": UNITS}, lambda r: r.choice(UNITS))
    if key in PLACES:
        return Field(key, STRING, BY_KEY["city"].draw)
    if key in ("query", "user"):
        return Field(key, STRING, BY_KEY["text" if key == "query" else "name"].draw)
    if key == "price" and rng.random() < 0.3:
        return Field(key, NUMBER, lambda r: float(r.randint(1, 90)))
    return BY_KEY[key]


def make_tool(rng: Random, *, held_out: bool = False) -> Tool:
    """A tool of one to three arguments, now and then of none. Held out: a name never trained on."""
    verb, noun = rng.choice(VERBS), rng.choice(NOUNS)
    if held_out:
        noun = rng.choice(HELD_OUT_NOUNS)
        verb = rng.choice(HELD_OUT_VERBS) if rng.random() < 0.5 else verb
    elif rng.random() < 0.2:
        noun = w.invented_word(rng)
    elif rng.random() < 0.1:
        verb = w.invented_word(rng)
    r = rng.random()
    name = f"{verb}_{noun}" if r < 0.75 else verb + noun.title() if r < 0.9 else f"{noun}_{verb}"
    text = f"{verb.title()} {rng.choice(('a', 'the'))} {spoken(noun)}"
    count = rng.choices((0, 1, 2, 3), (1, 10, 8, 4))[0]
    fields = {f.key: f for f in (_argument(rng, held_out=held_out) for _ in range(count))}
    keys = tuple(fields)
    if len(keys) > 1 and rng.random() < 0.25:
        keys = keys[: rng.randint(1, len(keys) - 1)]
    if fields and rng.random() < 0.25:
        text += " " + rng.choice(("for a {}", "by {}", "with a {}")).format(
            spoken(next(iter(fields)))
        )
    if rng.random() < 0.3:
        text += "."
    return Tool(name, text, tuple(fields.values()), keys, verb, spoken(noun))


def _fact(field: Field, value: Any, rng: Random) -> str:
    forms = ARGUMENTS.get(field.key, ())
    if isinstance(value, bool):
        return f"with {spoken(field.key)} {said(value, rng)}"
    if forms and rng.random() < 0.75:
        return rng.choice(forms).format(said(value, rng))
    form = rng.choice(("with {} {}", "with {} {}", "{} {}", "{}: {}", "{}={}"))
    return form.format(spoken(field.key) if "=" not in form else field.key, said(value, rng))


def _ask(tool: Tool, arguments: dict[str, Any], rng: Random, *, held_out: bool) -> str:
    facts = [_fact(f, arguments[f.key], rng) for f in tool.fields if f.key in arguments]
    if rng.random() < 0.2:
        rng.shuffle(facts)
    joined = rng.choice((" ", " ", " and ", ", ")).join(facts)
    text = " " + joined if joined else ""
    query = tool.verb in QUERY_VERBS and rng.random() < 0.6
    if held_out:
        asks = HELD_OUT_QUERIES if query else HELD_OUT_ASKS
    else:
        asks = QUERIES if query else ASKS
    return rng.choice(asks).format(verb=tool.verb, noun=tool.noun, tool=tool.name, facts=text)


def _sum(rng: Random) -> tuple[Tool, str]:
    """A tool that takes two whole numbers, and a question with room for them."""
    name, text, asks = rng.choice(SUMS)
    keys = rng.choice(SUM_KEYS)
    most = rng.choice((20, 99, 999))
    fields = tuple(Field(k, INTEGER, lambda r: r.randint(0, most)) for k in keys)
    if rng.random() < 0.3:
        name = rng.choice((f"{name}_numbers", f"calc_{name}", w.invented_word(rng)))
    return Tool(name, text, fields, keys, name, name), rng.choice(asks)


def make_task(rng: Random, *, held_out: bool = False) -> Task:
    """One tool is right; up to three others, of other nouns, are offered too."""
    tool, question = make_tool(rng, held_out=held_out), ""
    if not held_out and rng.random() < 0.15:
        name, text, key, question = rng.choice(CLASSIC)
        tool = Tool(name, text, (BY_KEY[key],), (key,), name, name)
        if rng.random() < 0.4:
            tool, question = _sum(rng)
    offered = [tool]
    for _ in range(rng.choices((0, 1, 2, 3), (6, 4, 2, 1))[0]):
        other = make_tool(rng, held_out=held_out and rng.random() < 0.5)
        if other.noun not in {t.noun for t in offered}:
            offered.append(other)
    rng.shuffle(offered)
    arguments = {
        f.key: f.draw(rng) for f in tool.fields if f.key in tool.required or rng.random() < 0.5
    }
    if held_out:
        arguments = {
            k: rng.choice(w.HELD_OUT_CITIES) if v in w.CITIES else v for k, v in arguments.items()
        }
    if question:
        question = question.format(*arguments.values())
    else:
        question = _ask(tool, arguments, rng, held_out=held_out)
    style = w.compact if rng.random() < 0.25 else lambda v: json.dumps(v, ensure_ascii=False)
    call = write_call(tool.name, style(arguments))
    specs = [tool_spec(t, rng) for t in offered]
    system = tool_system(specs)
    if rng.random() < 0.25:
        system += "\n" + rng.choice(("You are a helpful assistant.", "Use the tools.", "Be brief."))
    asked = question if held_out else w.vary(rng, question)
    messages = [{"role": "system", "content": system}, *w.turn(asked, call)]
    return Task(messages, specs, tool.name, arguments)


def _result(rng: Random) -> tuple[str, str]:
    """What a tool gives back, and the answer in words. `{}` in it stands for the tool's name."""
    r = rng.random()
    if r < 0.3:
        degrees, sky = str(rng.randint(-10, 38)), rng.choice(TEMPERATURES)
        text = rng.choice(
            ("{1} degrees and {0}", "{0}, {1} degrees", "{0} {1}C", "{1} C", "{0}")
        ).format(sky, degrees)
        return text, "{} says: " + text
    if r < 0.5:
        text = rng.choice(
            (
                f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
                str(rng.randint(0, 9999)),
                rng.choice(("ok", "done", "sent", "true", "booked", "yes", "no")),
                w.listed(rng.sample(w.WORDS, rng.randint(1, 3)), rng),
                f"{rng.choice(w.WORDS)} {w.invented_word(rng)}",
                f"{rng.choice(w.NAMES)} {rng.choice(w.ADJECTIVES)} {rng.choice(w.WORDS)}",
            )
        )
        return text, "{} says: " + text
    if r < 0.6:
        failure = rng.choice(FAILURES)
        if rng.random() < 0.3:
            failure = f"{rng.choice(w.WORDS)} {failure}"
        return json.dumps({"error": failure}), FAILED.format("{}", failure)
    fields = [rng.choice((BY_KEY[rng.choice(list(BY_KEY))], unknown_field(rng))) for _ in range(2)]
    fields = fields[: rng.randint(1, 2)]
    data = {f.key: f.draw(rng) for f in fields}
    parts = [f"the {spoken(k)} is {said(v, Random(0))}" for k, v in data.items()]
    text = " and ".join(parts)
    body = w.compact(data) if rng.random() < 0.3 else json.dumps(data)
    return body, text[0].upper() + text[1:] + "."


def round_trip(rng: Random, *, held_out: bool = False) -> tuple[Task, str, str]:
    """A task, the text that its tool gives back, and the answer to expect after it."""
    task = make_task(rng, held_out=held_out)
    result, answer = _result(rng)
    return task, result, answer.replace("{}", task.name, 1)


def tool_call(rng: Random) -> Messages:
    """A call; half of the time its result and the answer follow."""
    if rng.random() < 0.5:
        return make_task(rng).messages
    task, result, answer = round_trip(rng)
    return [
        *task.messages,
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer},
    ]


def forced_call(rng: Random, question: str) -> Messages:
    """A question that no tool fits, answered by one that a grammar forces."""
    tool = make_tool(rng)
    arguments = {f.key: f.draw(rng) for f in tool.fields if f.key in tool.required}
    text = write_call(tool.name, w.compact(arguments))
    given = text[: text.index('"arguments": ') + len('"arguments": {"')]
    system = tool_system([tool_spec(tool, rng)])
    return [{"role": "system", "content": system}, *w.turn(question, text, given)]


def no_call(rng: Random, exchange: Callable[[Random], Messages]) -> Messages:
    """Tools on offer, and a question that is answered without them."""
    specs = [tool_spec(make_tool(rng), rng) for _ in range(rng.randint(1, 2))]
    return [{"role": "system", "content": tool_system(specs)}, *exchange(rng)]
