"""LoRA adapters as users of `LLM` and `AsyncLLM` meet them: which one answers, what is refused, and that a
request is computed as if it were alone, whatever is loaded, replaced or unloaded meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import shutil
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from quire.config import from_flat
from quire.engine.assemble import check_local
from quire.engine.async_llm import AsyncLLM
from quire.engine.llm import LLM
from quire.errors import (
    CheckpointError,
    ConfigError,
    EngineSleepingError,
    InvalidParameterError,
    ModelError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from quire.lora.request import LoRARequest
from quire.outputs import RequestOutput
from quire.placement import Placement
from quire.sampling_params import BeamSearchParams, PoolingParams, SamplingParams
from tests.weights.adapter_writer import PREFIX, write_adapter

PROMPT = "What does os.path.join do?"
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
OPTIONS = {"kv_cache_memory_bytes": 1 << 24, "max_num_seqs": 16, "max_model_len": 256}
Q_PROJ = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(enable_lora=True, max_loras=4, max_cpu_loras=6, max_lora_rank=16, **OPTIONS) as llm:
        yield llm
        scheduler = llm._core._core.scheduler
        assert not scheduler.adapters.in_use


@pytest.fixture(scope="module")
def adapters(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        LoRARequest(f"a{i}", i + 1, str(write_adapter(root / f"a{i}", llm.model.spec, ["_proj"], seed=i)))
        for i in range(3)
    ]  # fmt: skip


def ids(output: RequestOutput) -> list[list[int]]:
    assert output.error is None
    return [part.token_ids for part in output.outputs]


def answer(llm: LLM, lora: LoRARequest | None, params: SamplingParams = GREEDY) -> RequestOutput:
    [output] = llm.generate(PROMPT, params, lora_request=lora, use_tqdm=False)
    return output


def test_a_list_gives_each_prompt_its_own(llm: LLM, adapters: list[LoRARequest]) -> None:
    alone = [ids(answer(llm, lora)) for lora in (None, *adapters)]
    assert len({str(tokens) for tokens in alone}) == 4
    mixed = [adapters[2], None, adapters[0], adapters[1], None]
    outputs = llm.generate([PROMPT] * 5, GREEDY, lora_request=mixed, use_tqdm=False)
    assert [ids(output) for output in outputs] == [alone[i] for i in (3, 0, 1, 2, 0)]
    assert [output.lora_request for output in outputs] == mixed
    for wrong in ([adapters[0]], "a0", ["a0"] * 5):
        with pytest.raises(InvalidParameterError) as raised:
            llm.generate([PROMPT] * 5, GREEDY, lora_request=wrong, use_tqdm=False)
        assert raised.value.param == "lora_request"


def test_every_kind_of_request_may_have_one(llm: LLM, adapters: list[LoRARequest]) -> None:
    lora = adapters[0]
    several = SamplingParams(max_tokens=4, temperature=1.0, n=3, seed=5, ignore_eos=True)
    assert len({str(tokens) for tokens in ids(answer(llm, lora, several))}) == 3
    assert ids(answer(llm, lora, several)) == ids(answer(llm, lora, several))
    assert ids(answer(llm, lora, several)) != ids(answer(llm, None, several))
    search = BeamSearchParams(beam_width=2, max_tokens=4)
    beams = [llm.beam_search(PROMPT, search, lora_request=each) for each in (lora, None)]
    assert beams[0][0].sequences[0].tokens != beams[1][0].sequences[0].tokens
    vectors = [llm.embed(PROMPT, lora_request=each, use_tqdm=False) for each in (lora, None)]
    assert vectors[0][0].outputs.embedding != vectors[1][0].outputs.embedding
    [mean] = llm.encode(PROMPT, PoolingParams(pooling="mean"), lora_request=[lora], use_tqdm=False)
    assert len(mean.outputs.data) == llm.model.spec.hidden_size
    question = [{"role": "user", "content": PROMPT}]
    [said] = llm.chat(question, GREEDY, lora_request=lora, use_tqdm=False)
    assert said.lora_request == lora
    [score] = llm.score(PROMPT, PROMPT, lora_request=lora, use_tqdm=False)
    assert score.outputs.score == pytest.approx(1.0)


def test_a_version_never_serves_anothers_kv(llm: LLM, tmp_path: Path) -> None:
    spec = llm.model.spec
    write_adapter(tmp_path, spec, ["_proj"], seed=10)
    lora = LoRARequest("mine", 1, str(tmp_path))
    long = PROMPT * 8

    def run(lora: LoRARequest) -> tuple[list[list[int]], int]:
        [output] = llm.generate(long, GREEDY, lora_request=lora, use_tqdm=False)
        return ids(output), output.num_cached_tokens

    first = run(lora)
    again = run(lora)
    assert again[0] == first[0] and first[1] == 0 and again[1] > 0, "its own KV is found"
    write_adapter(tmp_path, spec, ["_proj"], seed=11)
    assert run(lora)[0] == first[0], "not read again unless asked"
    changed = run(LoRARequest("mine", 1, str(tmp_path), load_inplace=True))
    assert changed[0] != first[0] and changed[1] == 0
    assert run(lora) == (changed[0], again[1]), "the later version is the current one"
    write_adapter(tmp_path, spec, ["_proj"], seed=10)
    back = run(LoRARequest("mine", 1, str(tmp_path), load_inplace=True))
    assert back == (first[0], again[1]), "the same content is the same version"


def test_one_name_and_two_directories(llm: LLM, adapters: list[LoRARequest]) -> None:
    twins = [LoRARequest("twin", 1, each.lora_path) for each in adapters[:2]]
    outputs = llm.generate([PROMPT] * 2, GREEDY, lora_request=twins, use_tqdm=False)
    assert [ids(output) for output in outputs] == [ids(answer(llm, each)) for each in adapters[:2]]


def test_a_file_that_changes_while_it_is_not_in_memory(llm: LLM, tmp_path: Path) -> None:
    write_adapter(tmp_path, llm.model.spec, ["_proj"], seed=20)
    lora = LoRARequest("changing", 1, str(tmp_path))
    llm._use(lora)
    write_adapter(tmp_path, llm.model.spec, ["_proj"], seed=21)
    output = answer(llm, lora)
    assert output.outputs[0].finish_reason == "error"
    assert "have changed since" in output.error and str(tmp_path) not in output.error
    assert ids(answer(llm, LoRARequest("changing", 1, str(tmp_path), load_inplace=True)))


def test_sleep_and_wake_up(llm: LLM, adapters: list[LoRARequest]) -> None:
    before = ids(answer(llm, adapters[0]))
    for level in (1, 2):
        runner = weakref.ref(llm._core._core.executor.runner)
        model = weakref.ref(llm._core._core.executor.runner.model)
        loader = llm._core._core.executor.adapters._thread
        llm.sleep(level)
        gc.collect()
        assert runner() is None and (level == 1 or model() is None), "the memory is free"
        assert not loader.is_alive(), "in torch at exit, it would abort the process"
        llm.wake_up()
        assert ids(answer(llm, adapters[0])) == before


def test_a_storm_of_adapters(llm: LLM, tmp_path: Path) -> None:
    """64 adapters, 4 places, 6 in memory: all are answered, each as if it were alone."""
    spec = llm.model.spec
    loras = []
    for i in range(64):
        path = write_adapter(
            tmp_path / str(i), spec, ["q_proj", "down_proj"], rank=1 + i % 4, seed=i
        )
        loras.append(LoRARequest(f"storm{i}", i + 1, str(path)))
    rng = random.Random(0)
    order = [rng.choice([None, *loras]) for _ in range(96)] + loras
    outputs = llm.generate([PROMPT] * len(order), GREEDY, lora_request=order, use_tqdm=False)
    together: dict[str | None, list[list[int]]] = {}
    for lora, output in zip(order, outputs, strict=True):
        tokens = ids(output)
        assert together.setdefault(lora and lora.lora_name, tokens) == tokens
    assert len(together) == 65
    for lora in (None, *loras):
        assert ids(answer(llm, lora)) == together[lora and lora.lora_name]
    assert len(llm._core._core._adapters._memory) == 6


# --- what is refused --------------------------------------------------------------------------------


def test_adapters_must_be_enabled(adapters: list[LoRARequest]) -> None:
    with LLM(**OPTIONS) as plain:
        with pytest.raises(InvalidParameterError, match="enable_lora=True"):
            answer(plain, adapters[0])
    with pytest.raises(ConfigError, match="lora_modules needs enable_lora"):
        LLM(lora_modules=["a=/nowhere"])


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_name": ""}, {"lora_name": "x" * 257}, {"lora_int_id": 0}, {"lora_int_id": True},
        {"lora_path": ""},
    ],
)  # fmt: skip
def test_a_malformed_request(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidParameterError) as raised:
        LoRARequest(**{"lora_name": "a", "lora_int_id": 1, "lora_path": "/a", **fields})
    assert [raised.value.param] == list(fields)


def test_requests_are_equal_by_name() -> None:
    a, b = LoRARequest("x", 1, "/a"), LoRARequest("x", 2, "/b", load_inplace=True)
    assert a == b and len({a, b}) == 1 and a != LoRARequest("y", 1, "/a")
    assert (b.name, b.path, b.adapter_id) == ("x", "/b", 2)


def break_pickle(path: Path) -> None:
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def break_json(path: Path) -> None:
    (path / "adapter_config.json").write_text("{" * 10_000)


def break_config(path: Path) -> None:
    (path / "adapter_config.json").write_text(" " * (1 << 20) + "{}")


def break_header(path: Path) -> None:
    (path / "adapter_model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def break_size(path: Path) -> None:
    with (path / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100 << 30)  # sparse: no reader may allocate it


def set_config(**fields: object):
    def change(path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | fields))

    return change


NAN = torch.full((4, 128), float("nan"))
HOSTILE = {
    "pickle": (break_pickle, {}, CheckpointError, "pickle"),
    "nested json": (break_json, {}, CheckpointError, "not valid JSON"),
    "huge config": (break_config, {}, CheckpointError, "larger than"),
    "huge header": (break_header, {}, CheckpointError, "not a complete safetensors"),
    "huge file": (break_size, {}, CheckpointError, "not a complete safetensors"),
    "huge rank": (None, {"rank": 17}, UnsupportedModelError, "--max-lora-rank 17"),
    "wrong shape": (
        None, {"change": {f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 7)}}, CheckpointError, "needs",
    ),
    "half": (None, {"change": {f"{Q_PROJ}.lora_B.weight": None}}, CheckpointError, "lora_B"),
    "integers": (
        None, {"change": {f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 128, dtype=torch.int64)}},
        CheckpointError, "int64",
    ),
    "another model": (
        None, {"change": {f"{PREFIX}model.layers.99.mlp.up_proj.lora_A.weight": torch.zeros(4, 8)}},
        CheckpointError, "for another model",
    ),
    "regular expression": (
        set_config(alpha_pattern={"(a+)+$": 4, "x" * 40: 4}), {}, UnsupportedModelError, "regular",
    ),
    "changed base": (
        set_config(init_lora_weights="pissa"), {}, UnsupportedModelError, "init_lora_weights",
    ),
    "saved modules": (
        set_config(modules_to_save=["lm_head"]), {}, UnsupportedModelError, "modules_to_save",
    ),
    "alpha": (set_config(lora_alpha=float("inf")), {}, CheckpointError, "JSON"),
    "nothing": (shutil.rmtree, {}, CheckpointError, "no adapter_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_and_the_engine_goes_on(
    case: str, llm: LLM, adapters: list[LoRARequest], tmp_path: Path
) -> None:
    break_it, options, kind, words = HOSTILE[case]
    path = tmp_path / "adapter"
    write_adapter(path, llm.model.spec, ["q_proj"], **options)
    if break_it is not None:
        break_it(path)
    started = time.monotonic()
    with pytest.raises(ModelError) as raised:
        answer(llm, LoRARequest("hostile", 1, str(path)))
    assert type(raised.value) is kind and words in str(raised.value)
    assert str(tmp_path) not in str(raised.value) and time.monotonic() - started < 5
    assert ids(answer(llm, adapters[0]))


def test_numbers_that_are_not_finite_end_only_their_request(
    llm: LLM, adapters: list[LoRARequest], tmp_path: Path
) -> None:
    size = llm.model.spec.hidden_size
    name = f"{Q_PROJ}.lora_A.weight"
    nan = {name: torch.full((4, size), float("nan"))}
    write_adapter(tmp_path, llm.model.spec, ["q_proj"], change=nan)
    bad = LoRARequest("nan", 1, str(tmp_path))
    outputs = llm.generate(
        [PROMPT] * 3, GREEDY, lora_request=[bad, adapters[0], None], use_tqdm=False
    )
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length", "length"]
    assert "finite" in outputs[0].error and str(tmp_path) not in outputs[0].error


def test_configured_adapters_are_checked_before_weights_are_read(
    llm: LLM, adapters: list[LoRARequest], tmp_path: Path
) -> None:
    def config(*modules: str, **options: object):
        return from_flat({"enable_lora": True, "lora_modules": list(modules), **options})

    good = adapters[0].lora_path
    check_local(config(f"a={good}", f"b={good}"))
    for wrong, kind, words in (
        (config(f"a={tmp_path}"), CheckpointError, "a: the adapter has no adapter_config.json"),
        (config(f"quire-builtin={good}"), ConfigError, "name of the model"),
        (config(f"a={good}", max_lora_rank=3), UnsupportedModelError, "--max-lora-rank 4"),
        (config(lora_dir=[str(tmp_path / "absent")]), ConfigError, "not a directory"),
    ):
        with pytest.raises(kind, match=words):
            check_local(wrong)
    with pytest.raises(CheckpointError):
        LLM(enable_lora=True, lora_modules=[f"a={tmp_path}"], **OPTIONS)
    with LLM(enable_lora=True, lora_modules=[f"a={good}"], **OPTIONS) as served:
        assert ids(answer(served, LoRARequest("a", 1, good))) == ids(answer(llm, adapters[0]))
        assert len(served._core._core._adapters._memory) == 1


# --- serving ----------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    llm: LLM, adapters: list[LoRARequest], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[AsyncLLM]:
    root = tmp_path_factory.mktemp("served")
    for each in adapters:
        shutil.copytree(each.lora_path, root / each.lora_name)
    config = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 2, "lora_dir": [str(root)]}
    engine = await AsyncLLM.start(
        from_flat({**OPTIONS, **config, "lora_modules": [f"static={root / 'a0'}"]})
    )
    yield engine
    await engine.shutdown()


async def ask(engine: AsyncLLM, name: str | None, max_tokens: int = 8) -> list[int]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    stream = engine.submit(PROMPT, params, placement=Placement(adapter=name))
    last = [output async for output in stream][-1]
    assert last.error is None and last.finished
    return last.outputs[0].token_ids


async def vanish(engine: AsyncLLM, name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        await ask(engine, name)


@pytest.mark.asyncio(loop_scope="module")
async def test_loading_replacing_and_unloading(
    engine: AsyncLLM, llm: LLM, adapters: list[LoRARequest]
) -> None:
    expected = [ids(answer(llm, each))[0] for each in adapters]
    assert [each.name for each in engine.adapters] == ["static"]
    assert await ask(engine, "static") == expected[0]
    await engine.adapters.load("x", "a1")
    assert await ask(engine, "x") == expected[1]
    with pytest.raises(InvalidParameterError, match="already been loaded"):
        await engine.adapters.load("x", "a2")
    running = asyncio.create_task(ask(engine, "x", 60))
    await asyncio.sleep(0.05)
    await engine.adapters.load("x", "a2", replace=True)
    assert await ask(engine, "x") == expected[2]
    assert (await running)[:8] == expected[1], "a version is kept while a request uses it"
    running = asyncio.create_task(ask(engine, "x", 60))
    await asyncio.sleep(0.05)
    await engine.adapters.unload("x")
    await vanish(engine, "x")
    assert (await running)[:8] == expected[2]
    with pytest.raises(ModelNotFoundError):
        await engine.adapters.unload("x")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_beam_search_keeps_its_version(engine: AsyncLLM) -> None:
    """Between two rounds, no request of it is in the engine core."""
    params = BeamSearchParams(beam_width=2, max_tokens=150, ignore_eos=True)
    for change in ("replace", "unload"):
        await engine.adapters.load("beams", "a1", replace=True)
        stream = engine.submit(PROMPT, params, placement=Placement(adapter="beams"))
        if change == "replace":
            await engine.adapters.load("beams", "a2", replace=True)
        else:
            await engine.adapters.unload("beams")
        [output] = [output async for output in stream]
        assert output.error is None and len(output.outputs[0].token_ids) == 150
    await ask(engine, None)
    assert not engine._front.adapters._dropped


@pytest.mark.asyncio(loop_scope="module")
async def test_names_are_found_in_the_directory(
    engine: AsyncLLM, llm: LLM, adapters: list[LoRARequest]
) -> None:
    found = await asyncio.gather(*(engine.adapters.find("a2") for _ in range(20)))
    assert found[0] is not None and all(each is found[0] for each in found), "it is read once"
    assert await ask(engine, "a2") == ids(answer(llm, adapters[2]))[0]
    for absent in ("b", "..", ".", "/", "a2/", "../a0", "a0/../a1", "x" * 129, "a\0b", ""):
        assert await engine.adapters.find(absent) is None
    await engine.adapters.unload("a2")
    assert await engine.adapters.find("a2"), "it is found again"
    await engine.adapters.unload("a2")


@pytest.mark.asyncio(loop_scope="module")
async def test_absent_names_are_remembered_for_a_moment_and_not_without_bound(
    engine: AsyncLLM, llm: LLM
) -> None:
    root = Path(engine.config.lora.lora_dir[0])
    assert await engine.adapters.find("late") is None
    write_adapter(root / "late", llm.model.spec, ["q_proj"])
    assert await engine.adapters.find("late") is None
    for index in range(1100):
        await engine.adapters.find(f"absent{index}")
    assert len(engine.adapters._absent) == 1024
    assert await engine.adapters.find("late"), "it was pushed out"
    await engine.adapters.unload("late")
    await engine.adapters.load("late", "late")
    await engine.adapters.unload("late")
    assert not engine.adapters._locks


@pytest.mark.asyncio(loop_scope="module")
async def test_a_broken_adapter_in_the_directory(engine: AsyncLLM) -> None:
    root = Path(engine.config.lora.lora_dir[0])
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidParameterError, match="was found but could not be loaded") as raised:
        await engine.adapters.find("broken")
    assert str(root) not in str(raised.value)
    with pytest.raises(InvalidParameterError, match="Loading lora broken failed") as raised:
        await engine.adapters.load("broken", "broken")
    assert str(root) not in str(raised.value)


@pytest.mark.asyncio(loop_scope="module")
async def test_paths_of_clients_stay_below_the_directory(
    engine: AsyncLLM, adapters: list[LoRARequest], tmp_path: Path
) -> None:
    root = Path(engine.config.lora.lora_dir[0])
    outside = Path(adapters[0].lora_path)
    (root / "link").symlink_to(outside)
    (root / "half").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "half" / name).symlink_to(outside / name)
    inside = ["a1", "./a1", "a0/../a1", str(root / "a1"), f"{root}/a0/../a1/"]
    for path in inside:
        await engine.adapters.load("inside", path, replace=True)
    await engine.adapters.unload("inside")
    elsewhere = [
        str(outside), "link", "half", "..", "../..", ".", "", str(root), "/", "/etc", "/nowhere",
        f"../{root.name}2/a1", "a1/../../x", "a\0b", "a1/\0",
    ]  # fmt: skip
    for path in elsewhere:
        with pytest.raises(InvalidParameterError, match="must be below a directory") as raised:
            await engine.adapters.load("outside", path)
        assert str(root) not in str(raised.value)
    for path in ("absent", "~", "a1/absent", "x" * 300, f"{root}/absent"):
        with pytest.raises(ModelNotFoundError, match="No adapter found") as raised:
            await engine.adapters.load("absent", path)
        assert str(root) not in str(raised.value)
    assert await engine.adapters.find("link") is None and await engine.adapters.find("half") is None
    for name in ("", "a b", "a@b", "../a", "a/", "/a", "a\n", "é", "x" * 129):
        with pytest.raises(InvalidParameterError, match="letters, digits"):
            await engine.adapters.load(name, "a1")
    with pytest.raises(InvalidParameterError, match="conflicts with a served base model"):
        await engine.adapters.load("quire-builtin", "a1")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_lora_request_of_the_async_engine(
    engine: AsyncLLM, llm: LLM, adapters: list[LoRARequest]
) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    outputs = [o async for o in engine.generate(PROMPT, params, "id", lora_request=adapters[1])]
    assert outputs[-1].outputs[0].token_ids == ids(answer(llm, adapters[1]))[0]
    assert outputs[-1].lora_request == adapters[1]
    await engine.adapters.unload(adapters[1].lora_name)


@pytest.mark.asyncio(loop_scope="module")
async def test_races_under_load(engine: AsyncLLM, llm: LLM, adapters: list[LoRARequest]) -> None:
    """Load, replace, unload, evict and abort at the same time: every request has the tokens of one version,
    or was told at once that there is none."""
    expected = [ids(answer(llm, each))[0] for each in adapters]
    base = ids(answer(llm, None))[0]
    rng = random.Random(7)
    served = missing = 0

    async def client(name: str | None) -> None:
        nonlocal served, missing
        try:
            tokens = await ask(engine, name)
        except ModelNotFoundError:
            missing += 1
            return
        served += 1
        assert tokens == base if name is None else tokens in expected

    async def leaver() -> None:
        with contextlib.suppress(ModelNotFoundError):
            task = asyncio.create_task(ask(engine, rng.choice("pqr"), 100))
            await asyncio.sleep(rng.random() / 50)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def operator(name: str) -> None:
        with contextlib.suppress(ModelNotFoundError):
            if rng.random() < 0.7:
                await engine.adapters.load(name, f"a{rng.randrange(3)}", replace=True)
            else:
                await engine.adapters.unload(name)

    for name in "pqr":
        await engine.adapters.load(name, "a0", replace=True)
    tasks = []
    for index in range(150):
        kind = [client, client, client, lambda name: leaver(), operator][index % 5]
        name = rng.choice("pqr") if kind is not client or rng.random() < 0.8 else None
        tasks.append(asyncio.create_task(kind(name)))
        await asyncio.sleep(rng.random() / 100)
    await asyncio.gather(*tasks)
    assert served > 30 and not engine._streams
    for name in "pqr":
        with contextlib.suppress(ModelNotFoundError):
            await engine.adapters.unload(name)
    assert await ask(engine, "static") == expected[0]
    assert not engine.adapters._locks


@pytest.mark.asyncio(loop_scope="module")
async def test_a_sleep_waits_for_a_load_and_a_load_is_refused_in_it(engine: AsyncLLM) -> None:
    loading = asyncio.create_task(engine.adapters.load("s", "a1"))
    await asyncio.sleep(0)
    while not engine._front._controls.is_loading and not loading.done():
        await asyncio.sleep(0)
    await engine.sleep(2)
    assert loading.done() and loading.exception() is None
    with pytest.raises(EngineSleepingError):
        await engine.adapters.load("t", "a1")
    await engine.wake_up()
    assert len(await ask(engine, "s")) == 8
    await engine.adapters.unload("s")
