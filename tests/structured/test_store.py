"""The store and the checker: nothing that a client writes stops either."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from quire.builtin import MODEL_DIR
from quire.decoding import GrammarSpec
from quire.sampling_params import StructuredOutputsParams
from quire.structured.base import Grammar, GrammarError
from quire.structured.checker import GrammarChecker
from quire.structured.null import NullGrammar
from quire.structured.spec import to_spec
from quire.structured.store import GrammarStore
from quire.text.tokenizer import Tokenizer
from tests.structured.conftest import Kit, lark

BOMB = "start: A\nA: " + " & ".join(f"/[a-z]*k{i}[a-z]*/" for i in range(50))
CHAIN = "start: a0\n" + "".join(f'a{i}: "y" a{i + 1}\n' for i in range(3800)) + 'a3800: "x"'


class Counted(NullGrammar):
    def __init__(self, num_bytes: int) -> None:
        super().__init__(32)
        self.num_bytes = num_bytes


class SlowCompiler:
    """Compiles a text "N" to a grammar of N bytes, once its gate is open."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.gates: dict[str, threading.Event] = {}

    def compile(self, spec: GrammarSpec) -> Grammar:
        self.compiled.append(spec.text)
        if spec.text in self.gates:
            self.gates[spec.text].wait(60)
        if spec.text == "bad":
            raise GrammarError("bad.")
        return Counted(int(spec.text))


def test_one_compile_for_all_who_ask() -> None:
    compiler = SlowCompiler()
    compiler.gates["7"] = threading.Event()
    store = GrammarStore(lambda: compiler)
    store.prepare(lark("7"))
    store.prepare(lark("7"))
    assert store.ready(lark("7")) is None
    compiler.gates["7"].set()
    store.wait(60)
    found = store.ready(lark("7"))
    assert isinstance(found, Counted) and store.grammar(lark("7")) is found
    assert compiler.compiled == ["7"]


def test_the_least_recently_used_go_when_the_cap_is_reached() -> None:
    compiler = SlowCompiler()
    store = GrammarStore(lambda: compiler, max_bytes=100)
    for text in ("40", "50", "40", "30"):
        store.grammar(lark(text))
        assert store.num_bytes <= 100
    assert compiler.compiled == ["40", "50", "30"]
    store.grammar(lark("40"))
    assert len(compiler.compiled) == 3
    store.grammar(lark("50"))  # it was the one to go
    assert len(compiler.compiled) == 4
    store.grammar(lark("1000"))
    assert store.num_bytes == 1000
    store.grammar(lark("1"))
    assert store.num_bytes == 1


def test_errors_are_answers_too() -> None:
    store = GrammarStore(SlowCompiler)
    store.prepare(lark("bad"))
    store.wait(60)
    assert isinstance(store.ready(lark("bad")), GrammarError)
    assert isinstance(store.ready(lark("bad")), GrammarError)
    with pytest.raises(GrammarError):
        store.grammar(lark("bad"))
    with pytest.raises(GrammarError, match="could not be compiled"):
        store.grammar(lark("no number"))


def test_a_grammar_that_takes_too_long_fails_alone() -> None:
    compiler = SlowCompiler()
    compiler.gates = {"1": threading.Event()}
    now = [0.0]
    store = GrammarStore(lambda: compiler, max_seconds=5.0, clock=lambda: now[0])
    store.prepare(lark("1"))
    while not compiler.compiled:  # the thread is stuck
        store.wait(0.01)
    store.prepare(lark("3"))
    assert store.ready(lark("1")) is None and store.ready(lark("3")) is None
    now[0] = 6.0
    assert isinstance(store.ready(lark("1")), GrammarError)
    assert isinstance(store.grammar(lark("3")), Counted)
    compiler.gates["1"].set()


def test_deep_grammars_do_not_overflow_the_stack(kit: Kit) -> None:
    refs = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1200)}
    deep = {"$ref": "#/$defs/d0", "$defs": refs | {"d1200": {"type": "string"}}}
    store = GrammarStore(lambda: kit.compiler)
    for params in (
        StructuredOutputsParams(grammar=CHAIN),
        StructuredOutputsParams(json=json.dumps(deep)),
    ):
        matcher = store.grammar(to_spec(params)).matcher()
        for _ in range(8):
            allowed = kit.allowed(matcher)
            assert allowed and matcher.accept(allowed[-1])


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    tokenizer = Tokenizer.from_directory(MODEL_DIR)
    checker = GrammarChecker(tokenizer, vocab_size=4096, eos_token_ids=[2], max_seconds=1.0)
    yield checker
    checker.close()


GOOD = [
    {"json_object": True},
    {"regex": "(a{0,1000}){0,1000}"},
    {"regex": ".{0,5000}x.{0,5000}"},
    {"grammar": CHAIN},
    {"grammar": 'root ::= "a" root?'},
    {"choice": [f"choice {i}" for i in range(3000)]},
]
BAD = [
    {"grammar": BOMB},
    {"grammar": "start: nobody"},
    {"grammar": '%import "/etc/passwd"\nstart: "a"'},
    {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    {"grammar": 'start: %json {"items":' + '{"items":' * 5000 + "}" * 5001},
    {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    {"regex": "(a"},
    {"regex": "(?=a)b"},
    {"regex": "(a)\\1"},
    {"json": {"type": "string", "pattern": "("}},
    {"json": {"type": "integer", "minimum": 5, "maximum": 4}},
    {"json": {"x-guidance": {"nonsense": []}, "type": "object"}},
    {"json": {"allOf": [{"type": "string", "pattern": f"k{i}"} for i in range(40)]}},
]


def test_the_checker_says_what_is_good_and_outlives_what_is_bad(checker: GrammarChecker) -> None:
    for params in BAD:
        with pytest.raises(GrammarError, match=r"cannot be used: .+\.") as caught:
            checker.check(to_spec(StructuredOutputsParams(**params)))
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
        assert caught.value.param == "structured_outputs"
    for params in GOOD:
        checker.check(to_spec(StructuredOutputsParams(**params)))


def test_a_bomb_is_remembered_and_does_not_hold_up_others(checker: GrammarChecker) -> None:
    bomb = to_spec(StructuredOutputsParams(grammar=BOMB.replace("k1", "q")))
    reasons: list[str] = []

    def try_bomb() -> None:
        try:
            checker.check(bomb)
        except GrammarError as error:
            reasons.append(error.reason)

    thread = threading.Thread(target=try_bomb)
    thread.start()
    checker.check(to_spec(StructuredOutputsParams(choice=["quick"])))
    assert thread.is_alive() or reasons
    thread.join()
    try_bomb()
    assert len(reasons) == 2 and reasons[0] == reasons[1] and "takes over 1 s" in reasons[0]
