"""Whatever a request asks for, KV that was loaded changes nothing of its answer; and nothing is left of loads
and saves."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quire import LLM, SamplingParams
from quire.lora.request import LoRARequest
from quire.messages import AbortRequests
from quire.models.registry import resolve_spec
from quire.placement import Placement
from quire.sampling_params import BeamSearchParams
from quire.scheduler.invariants import check_invariants
from tests.engine.checkpoints import ServableCheckpoint
from tests.engine.test_compose import STRUCTURED, said
from tests.engine.test_exactness import SAMPLED, SCHEDULES, make_llm
from tests.scheduler.requests import add_request
from tests.weights.adapter_writer import write_adapter

Servable = Callable[[str], ServableCheckpoint]
pytestmark = pytest.mark.usefixtures("loads_pay")
OPTIONS = {"dtype": "bfloat16", "max_logprobs": -1}
LORA = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 3, "max_lora_rank": 8}
TINY = {**SCHEDULES["tiny pool"], "kv_write_policy": "write_through"}
TEXTS = [[(7 * i + 3 * j * j + 11 * i * j) % 300 for j in range(60 + 17 * i)] for i in range(6)]
"""Each has a block of its own at the beginning."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3)


def store_of(llm: LLM) -> Any:
    return llm._core._core.executor.store  # type: ignore[union-attr]


def loaded(llm: LLM) -> int:
    counts = store_of(llm).counts
    return sum(count for key, count in counts.items() if key.startswith("loaded"))


def forget(llm: LLM) -> None:
    """The cache loses everything, and the stores nothing."""
    llm.generate([TEXTS[0][:1]], GREEDY.replace(max_tokens=1, logprobs=None), use_tqdm=False)
    llm._core._core.scheduler.kv.reset_cache()  # type: ignore[union-attr]


def disk(path: Path) -> dict[str, Any]:
    return {"kv_disk_path": str(path), "kv_disk_size": 0.05}


def asked(llm: LLM, texts: Sequence[Any], params: Any, **options: Any) -> list[Any]:
    return [said(each) for each in llm.generate(texts, params, use_tqdm=False, **options)]


@pytest.fixture(scope="module")
def adapters(servable: Servable, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    config = json.loads((servable("llama").directory / "config.json").read_text())
    root, spec = tmp_path_factory.mktemp("adapters"), resolve_spec(config)
    return [write_adapter(root / f"a{i}", spec, ["_proj"], seed=i) for i in range(2)]


@pytest.fixture(scope="module")
def plain(servable: Servable) -> Iterator[LLM]:
    with make_llm(servable("llama"), **OPTIONS, **LORA) as llm:
        yield llm


@pytest.fixture(scope="module", params=["memory", "disk, drafts"])
def moving(
    request: pytest.FixtureRequest, servable: Servable, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    how: dict[str, Any] = {"swap_space": 0.05}
    if request.param != "memory":
        how = disk(tmp_path_factory.mktemp("kv"))
        how["speculative_config"] = {"method": "ngram", "num_speculative_tokens": 2}
    with make_llm(servable("llama"), **OPTIONS, **LORA, **TINY, **how) as llm:
        yield llm


ASKED: dict[str, SamplingParams | list[SamplingParams]] = {
    "greedy": GREEDY,
    "sampled": SAMPLED.replace(max_tokens=6, logprobs=2),
    "n": SAMPLED.replace(n=3, max_tokens=6),
    "prompt logprobs": GREEDY.replace(prompt_logprobs=2),
    "prompt logprobs from a start": GREEDY.replace(prompt_logprobs=2, prompt_logprob_start=50),
    "bias": SAMPLED.replace(max_tokens=6, logit_bias={7: 5.0, 9: -100.0}, min_p=0.01),
    "grammars": [
        SamplingParams(temperature=1.0, seed=3, max_tokens=12, structured_outputs=STRUCTURED[i % 4])
        for i in range(len(TEXTS))
    ],
    "not from the cache": GREEDY.replace(skip_reading_prefix_cache=True),
}


@pytest.mark.parametrize("what", ASKED)
def test_no_parameter_notices(plain: LLM, moving: LLM, what: str) -> None:
    params = ASKED[what]
    expected, before = asked(plain, TEXTS, params), loaded(moving)
    for _ in range(2):
        assert asked(moving, TEXTS, params) == expected
        forget(moving)
    reads = not what.startswith(("prompt", "not"))  # those are computed
    assert reads == (loaded(moving) > before)


def test_beams(plain: LLM, moving: LLM) -> None:
    beams, found = BeamSearchParams(3, 6, ignore_eos=True), []
    before = loaded(moving)
    for llm in (plain, moving, moving):
        outputs = llm.beam_search(TEXTS[:2], beams)
        found.append([output.sequences for output in outputs])
        if llm is moving:
            forget(moving)
    assert found[0] == found[1] == found[2] and loaded(moving) > before


def test_a_salt_keeps_kv_apart_in_stores_too(plain: LLM, moving: LLM) -> None:
    def ask(llm: LLM, salt: str) -> Any:
        prompt = {"prompt_token_ids": TEXTS[2], "cache_salt": salt}
        (output,) = llm.generate([prompt], GREEDY, use_tqdm=False)
        return said(output), output.num_cached_tokens

    expected = said(plain.generate([TEXTS[2]], GREEDY, use_tqdm=False)[0])
    asked(moving, [TEXTS[2]], GREEDY)
    found = []
    for salt in ("one", "two", "one", "two"):
        forget(moving)
        found.append(ask(moving, salt))
    assert found == [(expected, 0), (expected, 0), (expected, 80), (expected, 80)]


def test_adapters_that_change_under_their_name(
    plain: LLM, moving: LLM, adapters: list[Path], tmp_path: Path
) -> None:
    """A version is known by its content: what one has computed is never another's, and still there when its
    files are back."""
    path, answers = tmp_path / "adapter", []

    def ask(llm: LLM, version: int) -> tuple[Any, int]:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(adapters[version], path)
        request = LoRARequest("mine", 1, str(path), load_inplace=True)
        (output,) = llm.generate([TEXTS[1]], GREEDY, lora_request=request, use_tqdm=False)
        return said(output), output.num_cached_tokens

    expected = [ask(plain, version)[0] for version in (0, 1)]
    assert expected[0] != expected[1]
    for version in (0, 1, 0, 1):
        answers.append(ask(moving, version))
        forget(moving)
    assert [answer for answer, _ in answers] == expected * 2
    assert [cached > 0 for _, cached in answers] == [False, False, True, True]


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_forgets_what_other_weights_computed(
    level: int, servable: Servable, tmp_path: Path
) -> None:
    """With level 2, the weights are read again on waking, and may be others."""
    directory = tmp_path / "model"
    shutil.copytree(servable("llama").directory, directory)
    checkpoint = ServableCheckpoint("llama", directory, servable("llama").reference)
    options = {**OPTIONS, **TINY, "swap_space": 0.05, **disk(tmp_path / "kv")}
    with make_llm(checkpoint, **options) as llm:
        old = asked(llm, TEXTS, GREEDY)
        llm.sleep(level)
        (file,) = directory.glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in tensors if "k_proj" in name)
        tensors[name] = -tensors[name]
        save_file(tensors, tmp_path / "new", metadata={"format": "pt"})
        os.replace(tmp_path / "new", file)
        llm.wake_up()
        assert not any(map(len, store_of(llm).tiers))
        outputs = llm.generate(TEXTS, GREEDY, use_tqdm=False)
        assert sum(output.num_cached_tokens for output in outputs) == 0
        assert ([said(output) for output in outputs] == old) == (level == 1)
        before = loaded(llm)
        forget(llm)
        again = asked(llm, TEXTS, GREEDY)
        assert again == [said(output) for output in outputs] and loaded(llm) > before
    with make_llm(checkpoint, **OPTIONS) as fresh:
        assert (asked(fresh, TEXTS, GREEDY) == again) == (level == 2)
    with make_llm(
        checkpoint, **options
    ) as llm:  # what is on the disk is of the weights that wrote it
        outputs = llm.generate(TEXTS, GREEDY, use_tqdm=False)
        assert ([said(output) for output in outputs] == again) == (level == 2)
        cached = sum(output.num_cached_tokens for output in outputs)
        assert (cached > 0) == (level == 2)


def test_copies_of_the_engine_share_a_path(plain: LLM, servable: Servable, tmp_path: Path) -> None:
    expected, found = asked(plain, TEXTS, GREEDY), []
    options = {**OPTIONS, **TINY, "data_parallel_size": 2, **disk(tmp_path / "kv")}
    while len(found) < 2 or (not found[-1] and len(found) < 9):  # they may have changed places
        with make_llm(servable("llama"), **options) as llm:
            outputs = llm.generate(TEXTS, GREEDY, use_tqdm=False)
            assert [said(output) for output in outputs] == expected
            found.append(sum(output.num_cached_tokens for output in outputs))
            assert asked(llm, TEXTS, GREEDY) == expected
    assert found[0] == 0 and found[-1] > 0


def state() -> tuple[int, int]:
    return len(threading.enumerate()), len(os.listdir("/proc/self/fd"))


def resident() -> int:
    gc.collect()
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_thousands_of_requests_leave_nothing(servable: Servable, tmp_path: Path) -> None:
    """Short ones of few prefixes, with lower and lower priorities, a third of them aborted at any moment."""
    rng, size = random.Random(1), 200
    options = {
        **TINY,
        "swap_space": 0.001,
        **disk(tmp_path / "kv"),
        "scheduling_policy": "priority",
    }
    checkpoint = servable("llama")
    before = state()
    with make_llm(checkpoint, **options) as llm:
        core, store, seen = llm._core._core, store_of(llm), []
        for turn in range(10):
            ids = list(range(turn * size + 1, (turn + 1) * size + 1))
            coming, present = list(ids), set[int]()
            while coming or core.has_work:
                for _ in range(min(len(coming), rng.randrange(6))):
                    number = coming.pop()
                    prefix, own = rng.randrange(40), rng.randrange(300)
                    text = [(prefix * 7 + i * i) % 300 for i in range(rng.randrange(1, 70))]
                    place = Placement(priority=rng.randrange(10))
                    message = add_request(number, [*text, own], max_tokens=2, placement=place)
                    assert core.handle(message) is None
                    present.add(number)
                core.step()
                if present and rng.random() < 0.3:
                    core.handle(AbortRequests([present.pop()]))
            check_invariants(core.scheduler)
            assert core.scheduler.kv.num_free == core.scheduler.kv.num_usable
            wait_saved(store)
            loading = core.scheduler.loading
            kept = (loading._waits_for, loading._found, loading._loaded, loading._sources)
            under_way = (loading.transfers._under_way, loading.transfers._owner, store._under_way)
            assert not any(map(len, (*kept, loading._num_loads, *under_way, store._results)))
            seen.append((*state(), resident()))
        assert loaded(llm) > 500
        for tier in store.tiers:
            assert tier.num_bytes <= tier.capacity
        assert seen[-1][:2] == seen[2][:2]
        assert seen[-1][2] < seen[2][2] + (16 << 20)
    assert state()[0] <= before[0]


def test_an_engine_may_be_closed_while_blocks_move(servable: Servable, tmp_path: Path) -> None:
    options = {**TINY, "swap_space": 0.05, **disk(tmp_path / "kv")}
    text, checkpoint = TEXTS[5], servable("llama")
    for steps in (1, 2, 3, 20):
        before = set(threading.enumerate())
        llm = make_llm(checkpoint, **options)
        core, store = llm._core._core, store_of(llm)
        for number in range(1, 5):
            core.handle(add_request(number, text[: 20 * number], max_tokens=4))
        for _ in range(steps):
            core.step()
        if steps == 20:
            core.scheduler.kv.reset_cache()
            wait_saved(store)  # else it is loaded from there at once
            never = threading.Event()
            store.tiers[0].get = lambda *rest: never.wait(0.2)  # noqa: B023
            core.handle(add_request(9, text, max_tokens=4))
            core.step()
            assert store.is_loading
            core.executor.execute = fail  # the engine fails, and is closed
            with pytest.raises(RuntimeError, match="of the test"):
                core.step()
        llm.close()
        llm.close()
        store.close()
        left = set(threading.enumerate()) - before
        assert not [each for each in left if not each.name.startswith("tqdm")]


def wait_saved(store: Any) -> None:
    until = time.monotonic() + 30
    while len(store._staging):
        assert time.monotonic() < until
        time.sleep(0.001)


def fail(plan: object) -> Any:
    raise RuntimeError("of the test")
