"""A pipeline's adapters: the answers of one device while versions are loaded, replaced and unloaded beside
plans in flight."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from quire.decoding import Decoding
from quire.engine.core import EngineCore
from quire.engine.llm import LLM
from quire.executor.adapters import PlanOrder, RankAdapters
from quire.lora.request import LoRARequest
from quire.messages import (
    AbortRequests,
    AddAdapter,
    AddRequest,
    Control,
    DropAdapter,
    LoadAdapter,
    RequestUpdate,
)
from quire.placement import Placement
from quire.sampling_params import SamplingParams
from quire.weights.adapter import check_adapter
from tests.engine.checkpoints import ServableCheckpoint, prompts
from tests.engine.test_compose import said
from tests.engine.test_exactness import make_llm
from tests.executor.test_workers import OPTIONS, executor_of
from tests.weights.adapter_writer import PREFIX, write_adapter

Servable = Callable[[str], ServableCheckpoint]
LORA = {**OPTIONS, "enable_lora": True, "max_loras": 2, "max_cpu_loras": 3, "max_logprobs": 5}
LAYOUTS = {
    "two stages": {"pipeline_parallel_size": 2},
    "two stages of two": {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
}
COUNT = 5
PROMPTS = prompts(4, longest=90, seed=4)
IDS = itertools.count()
SHORT = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=2)


class Driver:
    """An engine core and what it has said, by request."""

    def __init__(self, llm: LLM, adapters: list[Path]) -> None:
        assert llm._core is not None
        core = llm._core._core
        assert isinstance(core, EngineCore)
        self.core, self.llm = core, llm
        self.keys = {
            check_adapter(path, llm.model.spec, max_rank=64).key(path.name): path
            for path in adapters
        }
        self.known: set[str] = set()
        self.said: dict[int, tuple[list[int], list[object]]] = {}
        self.ended: dict[int, str | None] = {}
        self.asked: dict[int, tuple[int, str | None]] = {}

    def add(self, prompt: int, key: str | None) -> int:
        if key is not None:
            self.register(key)
        number = next(IDS)
        self.asked[number], self.said[number] = (prompt, key), ([], [])
        decoding = Decoding(
            max_tokens=12,
            temperature=0.0 if prompt % 2 else 1.0,
            seed=prompt,
            logprobs=2,
            prompt_logprobs=1 if prompt == 3 else None,
        )
        message = AddRequest(
            request_id=number,
            prompt_token_ids=PROMPTS[prompt],
            decoding=decoding,
            placement=Placement(adapter=key),
        )
        answer = self.core.handle(message)
        assert answer is None
        return number

    def register(self, key: str) -> None:
        if key not in self.known:
            self.known.add(key)
            assert self.core.handle(AddAdapter(key, str(self.keys[key]))) is None

    def unload(self, key: str) -> None:
        if key in self.known:
            self.known.discard(key)
            self.core.handle(DropAdapter(key))

    def abort(self, *numbers: int) -> None:
        self._take(self.core.handle(AbortRequests(list(numbers))).updates)  # type: ignore[union-attr]
        for number in numbers:
            self.asked.pop(number, None)

    def step(self) -> None:
        self._take(self.core.step().updates)

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while self.core.has_work:
            self.step()
            assert time.monotonic() < deadline, "a request waits forever"

    def is_admitted(self, number: int) -> bool:
        """By a plan in flight."""
        plans = [plan for plan, _ in self.core._in_flight]
        return any(each.request_id == number for plan in plans for each in plan.admitted)

    def in_memory(self, key: str) -> None:
        """Load it now."""
        self.register(key)
        self.core.handle(Control(next(IDS), LoadAdapter(key)))
        for _ in range(10_000):
            if key in self.core._adapters._memory:
                return
            self.core._adapters.wait(0.05)
            self.step()
        raise AssertionError("it is not loaded")

    def _take(self, updates: list[RequestUpdate]) -> None:
        for update in updates:
            if update.request_id in self.said:
                tokens, others = self.said[update.request_id]
                tokens += update.new_token_ids
                others += [*(update.logprobs or ()), update.prompt_logprobs]
                if update.finish_reason is not None:
                    self.ended[update.request_id] = update.error


@pytest.fixture(scope="module")
def one(
    servable: Servable, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LLM, list[Path]]]:
    """One device, and adapters for its model: also of embedding and head."""
    with make_llm(servable("qwen3"), **LORA) as llm:
        root, spec = tmp_path_factory.mktemp("adapters"), llm.model.spec
        ends = ["_proj", "embed_tokens", "lm_head"]
        yield llm, [write_adapter(root / f"a{i}", spec, ends, seed=i) for i in range(COUNT)]


@pytest.fixture(scope="module", params=LAYOUTS)
def many(request: pytest.FixtureRequest, servable: Servable) -> Iterator[LLM]:
    with make_llm(servable("qwen3"), **LAYOUTS[request.param], **LORA) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(one: tuple[LLM, list[Path]]) -> dict[tuple[int, str | None], Any]:
    """What one device says to each request alone."""
    driver, found = Driver(*one), {}
    for prompt, key in itertools.product(range(len(PROMPTS)), (None, *driver.keys)):
        number = driver.add(prompt, key)
        driver.run()
        found[prompt, key] = without_chunks(driver.said[number])
    assert len({str(tokens) for tokens, _ in found.values()}) == len(found)
    return found


def without_chunks(said: tuple[list[int], list[object]]) -> tuple[list[int], list[object]]:
    """Logprobs of a prompt come with its chunks, which are not the same in every schedule."""
    tokens, others = said
    prompt = [entry for each in others if hasattr(each, "entries") for entry in each.entries]
    return tokens, [each for each in others if hasattr(each, "rank")] + prompt


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 3), st.integers(0, COUNT)),
        st.tuples(st.just("add"), st.integers(0, 3), st.integers(1, COUNT)),
        st.tuples(st.just("abort"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("unload"), st.integers(1, COUNT), st.just(0)),
        st.tuples(st.just("leave"), st.integers(1, COUNT), st.just(0)),
        st.tuples(st.just("load"), st.integers(1, COUNT), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
    ),
    min_size=8,
    max_size=40,
)


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.generate],  # an engine that has failed cannot be asked again
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(ACTIONS)
def test_whatever_happens_beside_plans_in_flight(
    one: tuple[LLM, list[Path]],
    many: LLM,
    expected: dict[tuple[int, str | None], Any],
    actions: list[tuple[str, int, int]],
) -> None:
    driver = Driver(many, one[1])
    keys = [None, *driver.keys]
    for kind, first, second in actions:
        if kind == "add":
            driver.add(first, keys[second])
        elif kind == "abort":
            running = [number for number in driver.asked if number not in driver.ended]
            driver.abort(*running[-1 - first :][:1])
        elif kind == "unload":
            driver.unload(keys[first] or "")
        elif kind == "leave":  # while the first plan is in flight, if another is
            key = keys[first] or ""
            driver.in_memory(key)
            number = driver.add(1, key)
            driver.step()
            driver.abort(number)
            driver.unload(key)
        elif kind == "load":
            driver.in_memory(keys[first] or "")
        else:
            for _ in range(first):
                driver.step()
    driver.run()
    for number, asked in driver.asked.items():
        assert driver.ended[number] is None
        assert without_chunks(driver.said[number]) == expected[asked]
    for key in [*driver.known]:
        driver.unload(key)
    is_empty(many)


def is_empty(llm: LLM) -> None:
    executor = executor_of(llm)
    table = executor._worker.adapters
    assert table is not None and not llm._core._core.scheduler.adapters.in_use
    llm._core._core.step()  # with the last releases
    assert not table._entries and not any(table._slots) and not executor._order._later


def test_an_adapter_that_is_dropped_while_its_first_plan_is_in_flight(
    one: tuple[LLM, list[Path]], many: LLM, expected: dict[tuple[int, str | None], Any]
) -> None:
    """Its request was aborted; then the same version is loaded again."""
    driver = Driver(many, one[1])
    for key in [*driver.keys][:2]:
        driver.in_memory(key)
        base = driver.add(0, None)
        driver.step()
        while not driver.said[base][0]:
            driver.step()
        number = driver.add(1, key)
        while not driver.is_admitted(number):
            driver.step()
        driver.abort(number)
        driver.unload(key)
        assert executor_of(many)._order.holds(key)
        again = driver.add(1, key)
        driver.run()
        for each in (base, again):
            assert without_chunks(driver.said[each]) == expected[driver.asked[each]]
        driver.unload(key)
    is_empty(many)


def test_sleep_drops_them(one: tuple[LLM, list[Path]], many: LLM) -> None:
    adapters = [LoRARequest(path.name, i + 1, str(path)) for i, path in enumerate(one[1])]
    found = []
    for llm in (one[0], many):
        for level in (1, 2):
            outputs = llm.generate(
                [PROMPTS[1]] * (COUNT + 1), SHORT, lora_request=[None, *adapters], use_tqdm=False
            )
            found.append([said(each) for each in outputs])
            llm.sleep(level)
            llm.wake_up()
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_an_adapter_that_one_stage_cannot_load(
    name: str, one: tuple[LLM, list[Path]], many: LLM, tmp_path: Path
) -> None:
    """Of the base that was saved with it only the first stage, or the last, has the weights."""
    spec = many.model.spec
    base = {f"{PREFIX}{name}.base_layer.weight": torch.zeros(spec.vocab_size, spec.hidden_size)}
    bad = write_adapter(tmp_path / "bad", spec, ["q_proj", name], change=base)
    paths = [bad, one[1][0]]
    adapters = [LoRARequest(f"{name}{i}", i + 1, str(path)) for i, path in enumerate(paths)]
    outputs = many.generate([PROMPTS[1]] * 2, SHORT, lora_request=adapters, use_tqdm=False)
    assert [each.outputs[0].finish_reason for each in outputs] == ["error", "length"]
    assert "differs from the model's" in (outputs[0].error or "")


def test_calls_wait_for_the_plans_before_them() -> None:
    said: list[str] = []
    own: Any = SimpleNamespace(
        load=lambda key, path: said.append(f"load {key}"),
        drop=lambda key: said.append(f"drop {key}"),
    )
    others: Any = SimpleNamespace(send=lambda message: None, watch=None, ranks=[])
    order = PlanOrder()
    store = RankAdapters(own, others, order)
    store.drop("a")
    order.sent()
    order.sent()
    store.load("b", Path("/b"))
    store.drop("c")
    assert said == ["drop a", "load b"]
    order.started()
    store.load("c", Path("/c"))
    order.sent()
    store.drop("d")
    assert said == ["drop a", "load b"]
    order.started()
    assert said[2:] == ["drop c", "load c"]
    order.started()
    assert said[4:] == ["drop d"]
