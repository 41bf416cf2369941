"""Conversations, generated: the standard library, Quire's FAQ, small JSON, numbers, manners; and, from
`shapes.py` and `tools.py`, JSON under a schema and tool calls, all mixed.

Every generator takes a `random.Random` and gives a list of messages; nothing else is random. The
paraphrases in the `HELD_OUT_*` lists never reach the training text: the gates ask with those.
"""

import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from training import shapes, tools
from training.stdlib import Entry
from training.words import (
    CITIES,
    COLOURS,
    FRUIT,
    LEAD_IN,
    NAMES,
    THINGS,
    WORDS,
    Message,
    invented,
    listed,
    turn,
    vary,
)

FAQ_FILE = Path(__file__).with_name("faq.txt")

ASK: tuple[str, ...] = (
    "what does {} do?",
    "what does {} do in python?",
    "explain {}",
    "what is {}?",
    "what is {} for?",
    "how do I use {}?",
    "tell me about {}",
    "describe {}",
    "what's {}?",
    "can you explain {}?",
    "what does python's {} do?",
    "what is {} used for?",
    "I want to know about {}",
    "how does {} work?",
    "help me with {}",
    "{}",
    "{}?",
    "document {}",
    "please explain {}",
    "define {}",
    "show me the docs of {}",
    "what would I use {} for?",
    "when do I use {}?",
    "could you tell me what {} does?",
    "I don't understand {}",
    "in python, what is {}?",
    "what is the purpose of {}?",
    "give me a short description of {}",
    "what does the function {} do?",
    "explain {} to me",
    "what is {} in python?",
    "quick question: what does {} do?",
    "do you know {}?",
)
HELD_OUT_ASK: tuple[str, ...] = (
    "could you please describe what {} is for?",
    "hey, what does {} actually do?",
    "teach me about {}",
    "what can I do with {}?",
    "I forgot what {} does",
    "summarise {} for me",
    "please tell me what {} does",
    "what is the point of {}?",
)
ASK_MODULE: tuple[str, ...] = (
    "what is the {} module?",
    "what is the {} module for?",
    "what does the {} module do?",
    "explain the {} module",
    "what is {}?",
    "tell me about the {} module",
    "why use {}?",
    "what is the module {} good for?",
    "what can the {} module do?",
    "describe {}",
    "what does {} do?",
    "{}",
    "explain {}",
)
HELD_OUT_ASK_MODULE = ("teach me about the {} module", "please tell me what the {} module is for")
ASK_TERM: tuple[str, ...] = (
    "what is {}?",
    "explain {}",
    "what's {}?",
    "define {}",
    "tell me about {}",
    "{}",
    "what does {} mean?",
    "can you explain {}?",
    "describe {}",
    "please explain {}",
    "what is {} in Quire?",
    "I don't understand {}",
    "what do you mean by {}?",
    "{}?",
    "how would you explain {}?",
    "what is meant by {}?",
    "give me a short definition of {}",
)
HELD_OUT_ASK_TERM = ("teach me about {}", "please tell me what {} is", "hey, what is {}?")
# Words that change nothing: put anywhere into a question, they teach the model to look at the name.
FILLERS: tuple[str, ...] = tuple(
    "just really simply exactly quickly briefly honestly today again then well um er maybe kindly "
    "friend buddy sir mate everyone dear listen look wait right okay sure also still even only "
    "perhaps possibly basically generally normally usually typically roughly anyway question code "
    "docs beginner wondering curious trying learning hmm oh ah yes my our this that some about "
    "good little short long first last next help need want would should might can could".split()
)
SYSTEMS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are Quire's built-in model.",
    "Answer briefly.",
    "You are a helpful Python tutor.",
    "You answer questions about Python and Quire.",
    "You are a friendly assistant. Keep answers short.",
    "Be concise.",
)
EXAMPLE_ASK: tuple[str, ...] = (
    "show me an example",
    "an example, please",
    "can you give an example?",
    "example?",
    "give me an example of {}",
    "show me an example of {}",
    "how would I write {}?",
)
MODULE_ASK = ("which module is it in?", "how do I import it?", "where is it?", "what do I import?")
AGAIN_ASK = ("say that again", "repeat that", "once more, please", "can you repeat that?")
THANKS = ("thanks", "thank you", "thanks!", "thank you very much", "great, thanks", "cheers")
BYE = ("bye", "goodbye", "see you", "good night", "bye!")
GREETINGS = ("hi", "hello", "hey", "hi!", "hello!", "good morning", "hello there", "hi there")
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (GREETINGS, "Hello! Ask me about Python's standard library or about Quire."),
    (THANKS, "You are welcome!"),
    (BYE, "Goodbye!"),
    (
        ("how are you?", "how are you doing?", "how is it going?", "are you ok?"),
        "I am well, thank you. What would you like to know?",
    ),
    (
        ("ok", "I see", "good", "nice", "cool", "great", "yes", "understood"),
        "Good. What would you like to know next?",
    ),
    (
        ("no", "that is wrong", "you are wrong", "that's not right", "are you sure?"),
        "I may be wrong: I am a very small model. Please check the documentation.",
    ),
    (("test", "testing", "ping", "are you there?", "can you hear me?"), "I am here."),
)
TOPICS = (
    "the capital of France",
    "the weather",
    "the world cup",
    "football",
    "history",
    "cooking",
    "quantum physics",
    "the moon",
    "dogs",
    "politics",
    "music",
    "a good restaurant",
    "love",
    "the stock market",
    "medicine",
    "my homework",
    "the president",
    "movies",
    "cats",
    "tea",
    "Shakespeare",
    "the meaning of life",
    "Rust",
    "Java",
    "JavaScript",
    "C++",
    "Haskell",
    "Paris",
    "bicycles",
    "the Roman empire",
    "chemistry",
    "biology",
    "chess",
    "a bank account",
    "Mars",
    "numpy",
    "pandas",
    "Django",
    "Kubernetes",
    "Excel",
    "the sea",
    "gardening",
    "taxes",
    "trains",
)
OFF_TOPIC = (
    "what is {}?",
    "tell me about {}",
    "what do you think of {}?",
    "write a poem about {}",
    "who invented {}?",
    "explain {}",
    "write an essay on {}",
    "do you like {}?",
    "tell me a joke about {}",
    "how do I learn about {}?",
    "what is the best thing about {}?",
    "give me advice on {}",
    "where can I find {}?",
    "write a story about {}",
)
OFF_TOPIC_WHOLE = (
    "who won the world cup?",
    "what is the capital of France?",
    "tell me a joke",
    "sing a song",
    "what is the weather today?",
    "who is the president?",
    "what time is it?",
    "write me a poem",
    "translate hello into French",
    "what is the meaning of life?",
    "write a game",
    "who was Plato?",
    "how old is the universe?",
    "what should I eat?",
    "draw a cat",
    "recommend a book",
    "write a web server in Rust",
    "solve this equation",
    "what day is it?",
    "how tall is Everest?",
)
REFUSAL = "I only know Python's standard library and Quire itself."
UNKNOWN = (
    "I don't know {}. I only know common parts of Python's standard library, and Quire itself."
)


@dataclass(frozen=True, slots=True)
class FaqItem:
    """One answer and the ways to ask for it."""

    terms: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


def read_faq(path: Path = FAQ_FILE) -> list[FaqItem]:
    """The items of faq.txt, in order."""
    items = []
    for chunk in path.read_text().split("\n\n"):
        lines = [line for line in chunk.splitlines() if line and not line.startswith("#")]
        if lines:
            pick = {k: tuple(x[3:].strip() for x in lines if x[0] == k) for k in "TQA"}
            items.append(FaqItem(pick["T"], pick["Q"], pick["A"][0]))
    return items


def stdlib_answer(entry: Entry) -> str:
    """The answer expected for an entry: name, signature, text, and the example if there is one."""
    if entry.kind == "module":
        return f"`{entry.name}` is a module of Python's standard library. {entry.text}"
    answer = f"`{entry.name}{entry.signature}`: {entry.text}"
    if entry.example:
        answer += f" For example, `{entry.example[0]}` gives `{entry.example[1]}`."
    return answer


def _disturb(rng: Random, text: str, name: str) -> str:
    """Sometimes with fillers between the words, sometimes nothing but the name among fillers."""
    r = rng.random()
    if r < 0.6:
        return text
    if r < 0.7:
        words = [rng.choice(FILLERS) for _ in range(rng.randint(1, 4))] + [name]
        rng.shuffle(words)
        return " ".join(words)
    words = text.split(" ")
    for _ in range(rng.randint(1, 3)):
        words.insert(rng.randint(0, len(words)), rng.choice(FILLERS))
    return " ".join(words)


def _mention(rng: Random, entry: Entry, unique: frozenset[str]) -> str:
    """The name as a person would type it: with backticks, parentheses, or unqualified."""
    name = entry.name
    leaf = name.rpartition(".")[2]
    r = rng.random()
    if leaf in unique and r < 0.22:
        name = leaf
    if entry.kind in ("function", "method") and rng.random() < 0.22:
        name += "()"
    r = rng.random()
    return f"`{name}`" if r < 0.15 else f'"{name}"' if r < 0.18 else name


SHARES: dict[str, float] = {
    "stdlib": 0.43,
    "quire": 0.13,
    "json": 0.05,
    "shape": 0.14,
    "tool": 0.09,
    "unknown": 0.035,
    "off_topic": 0.02,
    "small_talk": 0.035,
    "exercises": 0.07,
}
# For a model that knows the rest already and learns JSON and tools.
FINE_TUNE_SHARES: dict[str, float] = {
    "stdlib": 0.25,
    "quire": 0.10,
    "json": 0.05,
    "shape": 0.34,
    "tool": 0.14,
    "unknown": 0.03,
    "off_topic": 0.02,
    "small_talk": 0.03,
    "exercises": 0.04,
}


class Generators:
    """The generators over one table and one FAQ, drawn with fixed shares."""

    def __init__(
        self,
        table: list[Entry],
        faq: list[FaqItem],
        unlisted: list[str],
        shares: Mapping[str, float] = SHARES,
    ) -> None:
        self.table, self.faq, self.unlisted = table, faq, unlisted
        self.weights = [3.0 if e.popular else 0.7 if e.kind == "module" else 1.0 for e in table]
        leaves = [e.name.rpartition(".")[2] for e in table]
        terms = {t.lower() for item in faq for t in item.terms}
        self.unique = frozenset(
            x for x in leaves if leaves.count(x) == 1 and x.lower() not in terms
        )
        self.kinds: dict[str, Callable[[Random], list[Message]]] = {
            "stdlib": self.stdlib,
            "quire": self.about_quire,
            "json": make_json,
            "shape": self.shape,
            "tool": self.tool,
            "unknown": self.unknown,
            "off_topic": off_topic,
            "small_talk": small_talk,
            "exercises": exercises,
        }
        self.shares = shares

    def stdlib(self, rng: Random) -> list[Message]:
        entry = rng.choices(self.table, self.weights)[0]
        templates = ASK_MODULE if entry.kind == "module" else ASK
        name = _mention(rng, entry, self.unique)
        question = vary(rng, _disturb(rng, rng.choice(templates).format(name), name))
        out = turn(question, stdlib_answer(entry))
        r = rng.random()
        if r < 0.05 and entry.example:
            ask = rng.choice(EXAMPLE_ASK).format(entry.name)
            out += turn(vary(rng, ask), f"`{entry.example[0]}` gives `{entry.example[1]}`.")
        elif 0.05 < r < 0.10 and entry.kind != "module":
            where = f"`{entry.module}`: `import {entry.module}`" if entry.module else ""
            said = f"It is in {where}." if where else "It is built in: nothing to import."
            out += turn(vary(rng, rng.choice(MODULE_ASK)), said)
        elif 0.10 < r < 0.13:
            out += turn(vary(rng, rng.choice(AGAIN_ASK)), out[1]["content"])
        return out

    def about_quire(self, rng: Random) -> list[Message]:
        item = rng.choice(self.faq)
        asks = [*item.questions, *item.terms, *item.terms]
        chosen = rng.randrange(len(asks))
        text = asks[chosen]
        if chosen >= len(item.questions):
            text = _disturb(rng, rng.choice(ASK_TERM).format(text), text)
        return turn(vary(rng, text), item.answer)

    def unknown(self, rng: Random) -> list[Message]:
        if rng.random() < 0.5:
            name = rng.choice(self.unlisted)
        else:
            name = f"{rng.choice(self.table).module or 'sys'}.{invented(rng)}"
            name = invented(rng) if rng.random() < 0.3 else name
        call = "()" if rng.random() < 0.2 else ""
        question = _disturb(rng, rng.choice(ASK).format(name + call), name + call)
        return turn(vary(rng, question), UNKNOWN.format(name))

    def plain(self, rng: Random) -> list[Message]:
        """Any exchange of words."""
        kinds: tuple[Callable[[Random], list[Message]], ...] = (
            self.stdlib, self.stdlib, self.about_quire, self.unknown, off_topic, small_talk, exercises,
        )  # fmt: skip
        return rng.choice(kinds)(rng)

    def shape(self, rng: Random) -> list[Message]:
        """A short JSON object that a schema may be asking for."""
        r = rng.random()
        if r < 0.6:
            return shapes.stated(rng).messages
        if r < 0.82:
            return shapes.to_invent(rng).messages
        return shapes.unasked(rng, self.plain(rng)[0]["content"]).messages

    def tool(self, rng: Random) -> list[Message]:
        """Tools on offer: mostly one is called."""
        r = rng.random()
        if r < 0.75:
            return tools.tool_call(rng)
        if r < 0.85:
            return tools.forced_call(rng, self.plain(rng)[0]["content"])
        return tools.no_call(rng, self.plain)

    def conversation(self, rng: Random) -> list[Message]:
        """One to four exchanges, sometimes under a system prompt."""
        kinds = [self.kinds[name] for name in self.shares]
        shares = list(self.shares.values())
        first = rng.choices(kinds, shares)[0]
        messages = first(rng)
        if messages[0]["role"] != "system" or rng.random() < 0.4:
            if messages[0]["role"] != "system" and rng.random() < 0.2:
                messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
            for _ in range(rng.choices((0, 1, 2, 3), (0.55, 0.22, 0.14, 0.09))[0]):
                more = rng.choices(kinds, shares)[0](rng)
                if more[0]["role"] != "system":
                    messages += more
        return messages


def off_topic(rng: Random) -> list[Message]:
    if rng.random() < 0.4:
        return turn(vary(rng, rng.choice(OFF_TOPIC_WHOLE)), REFUSAL)
    return turn(vary(rng, rng.choice(OFF_TOPIC).format(rng.choice(TOPICS))), REFUSAL)


def small_talk(rng: Random) -> list[Message]:
    asks, answer = rng.choice(SMALL_TALK)
    return turn(vary(rng, rng.choice(asks)), answer)


def _value(rng: Random, key: str) -> str | int | float | bool:
    numbers = {
        "age": (1, 99),
        "quantity": (1, 50),
        "year": (1950, 2030),
        "count": (0, 99),
        "score": (0, 100),
        "pages": (10, 900),
        "id": (1, 9999),
        "port": (1000, 9999),
    }
    if key in numbers:
        return rng.randint(*numbers[key])
    if key == "name":
        return rng.choice(NAMES) if rng.random() < 0.6 else invented(rng).replace("_", "").title()
    if key == "price":
        return rng.randint(1, 99) + rng.choice((0.5, 0.25, 0.99, 0.95))
    if key in ("active", "done", "member"):
        return rng.random() < 0.5
    return rng.choice({"city": CITIES, "colour": COLOURS, "fruit": FRUIT}.get(key, THINGS))


JSON_KEYS = (
    "name",
    "age",
    "city",
    "item",
    "price",
    "quantity",
    "colour",
    "year",
    "active",
    "count",
    "score",
    "pages",
    "id",
    "fruit",
    "done",
    "member",
    "title",
    "port",
)
JSON_ASK = (
    "give me JSON with {keys} for {values}",
    "write JSON with {keys}: {values}",
    "make a JSON object with {keys} for {values}",
    "JSON with {keys} for {values}",
    "return a JSON object with the keys {keys} and the values {values}",
    "turn this into JSON with {keys}: {values}",
    "json please, {keys}: {values}",
    "I need JSON with {keys} for {values}",
    "create JSON with {keys} for {values}",
)
HELD_OUT_JSON_ASK = (
    "could you give me JSON with {keys} for {values}?",
    "please produce a JSON object with {keys} for {values}",
)


def make_json(rng: Random, asks: tuple[str, ...] = JSON_ASK) -> list[Message]:
    """An object of one to four named values, or a list of words."""
    if rng.random() < 0.2:
        items = rng.sample(WORDS, rng.randint(2, 4))
        ask = rng.choice(
            ("give me a JSON list of {}", "JSON array with {}", "make a JSON list: {}")
        )
        return turn(vary(rng, ask.format(listed(items, rng))), json.dumps(items))
    keys = rng.sample(JSON_KEYS, rng.choices((1, 2, 3, 4), (1, 4, 3, 1))[0])
    if "name" not in keys and rng.random() < 0.4:
        keys[0] = "name"
    data = {key: _value(rng, key) for key in keys}
    shown = [str(v).lower() if isinstance(v, bool) else str(v) for v in data.values()]
    ask = rng.choice(asks)
    if asks is JSON_ASK and rng.random() < 0.3:
        pairs = [f"{k} {v}" for k, v in zip(data, shown, strict=True)]
        ask, shown = (
            rng.choice(
                ("give me JSON with {values}", "JSON: {values}", "make a JSON object with {values}")
            ),
            pairs,
        )
    text = ask.format(keys=listed(keys, rng), values=", ".join(shown))
    return turn(vary(rng, text), json.dumps(data))


def exercises(rng: Random) -> list[Message]:
    """Copying, counting and small sums."""
    kind = rng.randrange(7)
    if kind == 0:
        most = 10 if rng.random() < 0.7 else 20
        a, b = rng.randint(0, most), rng.randint(0, most)
        ask = rng.choice(("what is {} + {}?", "{} + {}", "add {} and {}", "{} plus {}", "{}+{}"))
        return turn(vary(rng, ask.format(a, b)), f"{a} + {b} = {a + b}")
    if kind == 1:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        ask = rng.choice(("what is {} * {}?", "{} times {}", "multiply {} and {}", "{} * {}"))
        return turn(vary(rng, ask.format(a, b)), f"{a} * {b} = {a * b}")
    if kind == 2:
        a = rng.randint(0, 20)
        b = rng.randint(0, a)
        ask = rng.choice(("what is {} - {}?", "{} minus {}", "{} - {}"))
        return turn(vary(rng, ask.format(a, b)), f"{a} - {b} = {a - b}")
    if kind == 3:
        n, start = rng.randint(2, 12), rng.choice((1, 1, 1, rng.randint(1, 50)))
        ask = rng.choice(("count from {} to {}", "count {} to {}", "list the numbers {} to {}"))
        numbers = ", ".join(map(str, range(start, start + n)))
        return turn(vary(rng, ask.format(start, start + n - 1)), numbers)
    if kind == 4:
        text = " ".join(
            rng.choice(WORDS) if rng.random() < 0.6 else invented(rng)
            for _ in range(rng.randint(1, 6))
        )
        ask = rng.choice(("say {}", "repeat: {}", "repeat after me: {}", "write {}", "copy {}"))
        return turn(rng.choice(LEAD_IN) + ask.format(text), text)
    if kind == 5:
        lists = (
            ("days of the week", "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
            (
                "months",
                "January, February, March, April, May, June, July, August, September, "
                "October, November, December",
            ),
            ("letters of the alphabet", ", ".join(string.ascii_lowercase)),
        )
        name, answer = rng.choice(lists)
        ask = rng.choice(("list the {}", "what are the {}?", "name the {}", "give me the {}"))
        return turn(vary(rng, ask.format(name)), answer)
    items = rng.sample(WORDS, rng.randint(2, 5))
    ask = rng.choice(("sort these words: {}", "put in order: {}", "make a list of {}"))
    ordered = items if "list" in ask else sorted(items)
    return turn(vary(rng, ask.format(", ".join(items))), "\n".join(f"- {x}" for x in ordered))
