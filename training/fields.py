"""Named fields: their types as JSON Schema says them, values to draw, and words to state them in."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from training import words as w

Draw = Callable[[Random], Any]
Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Field:
    """One property of an object. `clauses` say its value of a person or a thing: "is {} years old"."""

    key: str
    schema: Schema
    draw: Draw
    clauses: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "enum" if "enum" in self.schema else str(self.schema["type"])


def _of(*pools: list[str]) -> Draw:
    flat = [x for pool in pools for x in pool]
    return lambda rng: rng.choice(flat)


def _int(low: int, high: int) -> Draw:
    return lambda rng: rng.randint(low, high)


def _price(rng: Random) -> float:
    return rng.randint(1, 99) + rng.choice((0.5, 0.25, 0.99, 0.95, 0.1))


def _decimal(rng: Random) -> float:
    return rng.randint(-20, 120) + rng.randint(1, 9) / 10


def _flag(rng: Random) -> bool:
    return rng.random() < 0.5


def person(rng: Random) -> str:
    """A first name, often invented, sometimes with a surname."""
    first = rng.choice(w.NAMES) if rng.random() < 0.5 else w.invented_word(rng).title()
    if rng.random() < 0.25:
        last = rng.choice(w.SURNAMES) if rng.random() < 0.6 else w.invented_word(rng).title()
        return f"{first} {last}"
    return first


def place(rng: Random) -> str:
    return rng.choice(w.CITIES) if rng.random() < 0.7 else w.invented_word(rng).title()


def phrase(rng: Random) -> str:
    """One to four words, as an unknown string field may want them."""
    made = [rng.choice(w.WORDS) for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))]
    if rng.random() < 0.3:
        made.insert(0, rng.choice(w.ADJECTIVES))
    if rng.random() < 0.25:
        made[-1] = w.invented_word(rng)
    return " ".join(made)


def title(rng: Random) -> str:
    text = f"{rng.choice(w.ADJECTIVES)} {rng.choice(w.WORDS)}"
    return f"The {text.title()}" if rng.random() < 0.6 else text.title()


def email(rng: Random) -> str:
    return (
        f"{rng.choice(w.NAMES).lower()}@{rng.choice(w.WORDS)}.{rng.choice(('com', 'org', 'net'))}"
    )


def date(rng: Random) -> str:
    return f"20{rng.randint(10, 39)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def street(rng: Random) -> str:
    return f"{rng.randint(1, 99)} {rng.choice(w.WORDS).title()} Street"


def _list_of(draw: Draw, most: int = 3) -> Draw:
    def some(rng: Random) -> list[Any]:
        made = [draw(rng) for _ in range(rng.randint(1, most))]
        return list(dict.fromkeys(made))

    return some


STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
STRINGS: Schema = {"type": "array", "items": STRING}
INTEGERS: Schema = {"type": "array", "items": INTEGER}


def _fields(keys: str, schema: Schema, draw: Draw, *clauses: str) -> list[Field]:
    return [Field(key, schema, draw, clauses) for key in keys.split()]


PEOPLE = _fields(
    "name first_name full_name customer user username author owner student employee contact",
    STRING,
    person,
    "is called {}",
)
STATED: list[Field] = [
    *_fields("age", INTEGER, _int(1, 99), "is {} years old", "is {}", "is aged {}"),
    *_fields("city town location", STRING, place, "lives in {}", "is from {}", "is in {}"),
    *_fields("country", STRING, _of(w.COUNTRIES), "comes from {}", "is from {}"),
    *_fields("job occupation role", STRING, _of(w.JOBS), "works as a {}", "is a {}"),
    *_fields("company employer", STRING, _of(w.COMPANIES), "works at {}", "works for {}"),
    *_fields("email", STRING, email, "has the email {}", "can be reached at {}"),
    *_fields("item product", STRING, _of(w.THINGS, w.FRUIT), "buys a {}", "wants a {}"),
    *_fields("colour color favourite_colour", STRING, _of(w.COLOURS), "is {}", "likes {}"),
    *_fields("animal pet", STRING, _of(w.ANIMALS), "has a {}", "is a {}"),
    *_fields("language", STRING, _of(w.LANGUAGES), "speaks {}"),
    *_fields("hobby", STRING, _of(w.HOBBIES), "likes {}", "enjoys {}"),
    *_fields("day", STRING, _of(w.DAYS), "comes on {}"),
    *_fields("date due_date", STRING, date, "starts on {}", "is due on {}"),
    *_fields("street", STRING, street, "lives at {}"),
    *_fields("title subject", STRING, title, "is titled {}", "wrote {}"),
    *_fields("price cost total", NUMBER, _price, "costs {}", "pays {}"),
    *_fields("height weight rating", NUMBER, _decimal),
    *_fields("temperature distance", NUMBER, _decimal),
    *_fields("quantity count stock", INTEGER, _int(0, 99), "has {}"),
    *_fields("year birth_year", INTEGER, _int(1950, 2030), "is from {}"),
    *_fields("pages", INTEGER, _int(10, 900), "has {} pages"),
    *_fields("score points level", INTEGER, _int(0, 100), "has {} points", "scored {}"),
    *_fields("id order_id port room", INTEGER, _int(1, 9999)),
    *_fields("guests seats people", INTEGER, _int(1, 60), "has {} seats", "brings {} people"),
    *_fields("minutes duration hours", INTEGER, _int(1, 90), "takes {} minutes"),
    *_fields("active done member urgent paid in_stock married is_open available", BOOLEAN, _flag),
    *_fields("status state", {**STRING, "enum": w.STATES[:4]}, _of(w.STATES[:4]), "is {}"),
    *_fields("priority size", {**STRING, "enum": w.LEVELS}, _of(w.LEVELS)),
    *_fields("tags keywords", STRINGS, _list_of(_of(w.WORDS))),
    *_fields("hobbies interests", STRINGS, _list_of(_of(w.HOBBIES)), "likes {}", "enjoys {}"),
    *_fields("languages", STRINGS, _list_of(_of(w.LANGUAGES)), "speaks {}"),
    *_fields("friends", STRINGS, _list_of(person), "is a friend of {}"),
    *_fields("scores numbers", INTEGERS, _list_of(_int(0, 99))),
]
# Strings whose text nobody states: a model is to close them after a few words.
OPEN = [
    *_fields(
        "answer text summary description note reason message comment result value content response",
        STRING,
        phrase,
    ),
]
HELD_OUT_KEYS = (
    "nickname planet badge salary altitude verified reviewer sport cargo capital votes".split()
)
KINDS: tuple[tuple[Schema, Draw], ...] = (
    (STRING, phrase),
    (STRING, person),
    (STRING, lambda rng: rng.choice(w.WORDS)),
    (STRING, lambda rng: w.invented_word(rng)),
    (INTEGER, _int(0, 99)),
    (INTEGER, _int(0, 9999)),
    (NUMBER, _decimal),
    (BOOLEAN, _flag),
    (STRINGS, _list_of(_of(w.WORDS))),
)
THINGS: dict[str, str] = {
    "person": "name age city job email active hobbies",
    "user": "name age email active",
    "customer": "name city email order_id",
    "employee": "name age job company",
    "student": "name age score",
    "book": "title author year pages",
    "product": "item price colour in_stock tags",
    "order": "id item quantity price paid",
    "pet": "name animal age colour",
    "event": "title date city seats",
    "task": "title priority done due_date",
    "city": "city country",
    "character": "name age role",
}
BY_KEY = {f.key: f for f in [*PEOPLE, *STATED, *OPEN]}


def unknown_key(rng: Random) -> str:
    """A key that stands for all those not listed here."""
    if rng.random() < 0.5:
        return w.invented_word(rng)
    first, second = rng.choice(w.WORDS), rng.choice((*w.WORDS, *"name count id type code".split()))
    return f"{first}_{second}" if rng.random() < 0.7 else first + second.title()


def unknown_field(rng: Random, key: str = "") -> Field:
    schema, draw = rng.choice(KINDS)
    if rng.random() < 0.12:
        options = rng.sample(w.WORDS, rng.randint(2, 4))
        schema, draw = {**STRING, "enum": options}, _of(options)
    return Field(key or unknown_key(rng), schema, draw)


def nested_field(rng: Random) -> Field:
    """An object of one or two fields within an object, or a short list of such objects."""
    key, keys = rng.choice(
        (("address", "street city"), ("owner", "name age"), ("place", "city country"),
         ("author", "name"), ("order", "item quantity"))
    )  # fmt: skip
    inner = [BY_KEY[k] for k in keys.split()]
    if rng.random() < 0.25:
        schema = {"type": "array", "items": object_schema(rng, inner)}
        one = lambda rng: {f.key: f.draw(rng) for f in inner}  # noqa: E731
        return Field(key + "s", schema, lambda rng: [one(rng) for _ in range(rng.randint(1, 2))])
    return Field(key, object_schema(rng, inner), lambda rng: {f.key: f.draw(rng) for f in inner})


def object_schema(rng: Random, fields: list[Field]) -> Schema:
    """All fields required; open or closed to others."""
    schema: Schema = {
        "type": "object",
        "properties": {f.key: f.schema for f in fields},
        "required": [f.key for f in fields],
    }
    if rng.random() < 0.5:
        schema["additionalProperties"] = False
    return schema


def said(value: Any, rng: Random) -> str:
    """A value as a person would type it."""
    if isinstance(value, bool):
        return rng.choice(("true", "yes") if value else ("false", "no"))
    if isinstance(value, list):
        return w.listed([said(v, rng) for v in value], rng)
    if isinstance(value, dict):
        return ", ".join(f"{k} {said(v, rng)}" for k, v in value.items())
    return str(value)


def spoken(key: str) -> str:
    return key.replace("_", " ")


def clause(field: Field, value: Any, rng: Random) -> str:
    """What is said of the subject: "is 31 years old", "is not active", "has the code 7"."""
    if isinstance(value, bool):
        word = spoken(field.key).removeprefix("is ")
        return f"is {word}" if value else f"is not {word}"
    text = said(value, rng)
    if field.clauses and rng.random() < 0.8:
        return rng.choice(field.clauses).format(text)
    return rng.choice(("has the {} {}", "has {} {}")).format(spoken(field.key), text)


def statement(fields: list[Field], data: dict[str, Any], rng: Random) -> str:
    """All values in a sentence or two, in pairs, or in lines."""
    order = list(fields)
    if rng.random() < 0.25:
        rng.shuffle(order)
    r = rng.random()
    people = [f for f in order if f.draw is person]
    if people and len(order) > 1 and r < 0.5:
        subject = people[0]
        rest = [clause(f, data[f.key], rng) for f in order if f is not subject]
        name = data[subject.key]
        if len(rest) > 1 and rng.random() < 0.2:
            return f"{name} {rest[0]}. {name} {w.listed(rest[1:], rng)}."
        return f"{name} {w.listed(rest, rng)}."
    texts = [(f.key, said(data[f.key], rng)) for f in order]
    if r < 0.7:
        parts = [f"the {spoken(k)} is {v}" for k, v in texts]
        text = w.listed(parts, rng) + "."
        return text[0].upper() + text[1:]
    pair = rng.choice(("{}: {}", "{}={}", "{} {}", "{} is {}", "{} = {}"))
    return rng.choice((", ", ", ", "\n", "; ")).join(pair.format(k, v) for k, v in texts)
