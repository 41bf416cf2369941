"""`LLM` as its users meet it: prompts, parameters, outputs, errors, memory."""

from __future__ import annotations

import gc
import math
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from quire.builtin import MODEL_DIR
from quire.engine.llm import LLM
from quire.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    InvalidParameterError,
    MemoryFitError,
    PromptTooLongError,
    QuireError,
    UnsupportedModelError,
)
from quire.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from quire.scheduler.invariants import check_invariants
from tests.engine.checkpoints import VOCAB_SIZE, ServableCheckpoint, prompts, write_checkpoint

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 128,
    "num_gpu_blocks_override": 200,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(servable: Callable[[str], ServableCheckpoint]):
    with LLM(str(servable("llama").directory), **OPTIONS) as llm:
        yield llm
        scheduler = llm._core._core.scheduler
        check_invariants(scheduler)
        assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_usable, "a block leaked"


def test_nothing_is_collected_while_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_core(*args: object) -> None:
        assert not gc.isenabled()
        raise MemoryFitError("enough")

    monkeypatch.setattr("quire.engine.assemble.build_core", build_core)
    with pytest.raises(MemoryFitError, match="enough"):
        LLM()
    assert gc.isenabled()


def test_outputs_come_in_input_order_with_their_fields(llm: LLM) -> None:
    batch = ["one two three", [5, 6, 7], {"prompt_token_ids": [9]}, {"prompt": "x"}]
    params = [GREEDY.replace(max_tokens=n) for n in (9, 2, 12, 4)]
    outputs = llm.generate(batch, params)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 2, 12, 4]
    assert outputs[0].prompt == "one two three" and outputs[1].prompt is None
    assert outputs[1].prompt_token_ids == [5, 6, 7]
    for output in outputs:
        (completion,) = output.outputs
        assert output.finished and completion.finish_reason == "length"
        assert completion.stop_reason is None and completion.logprobs is None
        stats = output.metrics
        assert stats.num_generation_tokens == len(completion.token_ids)
        times = [stats.arrival_ts, stats.queued_ts, stats.scheduled_ts, stats.first_token_ts]
        assert times == sorted(times) and stats.last_token_ts >= stats.first_token_ts
        assert stats.first_token_latency == stats.first_token_ts - stats.arrival_ts
        decoded = llm.model.tokenizer.decode(completion.token_ids)
        assert completion.text == decoded


def test_one_prompt_of_ids_is_one_request(llm: LLM) -> None:
    assert len(llm.generate([1, 2, 3], GREEDY, use_tqdm=False)) == 1
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_chat_is_generate_over_the_template(llm: LLM) -> None:
    message = {"role": "user", "content": "hi"}
    (chat,) = llm.chat([message], GREEDY, use_tqdm=False)
    assert chat.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    (plain,) = llm.generate(chat.prompt_token_ids, GREEDY, use_tqdm=False)
    assert plain.outputs[0].token_ids == chat.outputs[0].token_ids
    assert len(llm.chat([[message], [message, message]], GREEDY, use_tqdm=False)) == 2


def test_stop_token_ends_and_is_named(llm: LLM) -> None:
    (free,) = llm.generate("abc", GREEDY, use_tqdm=False)
    tokens = free.outputs[0].token_ids
    stop = tokens[4]
    first = tokens.index(stop)
    (stopped,) = llm.generate("abc", GREEDY.replace(stop_token_ids=[stop]), use_tqdm=False)
    (completion,) = stopped.outputs
    assert completion.token_ids == tokens[: first + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text == llm.model.tokenizer.decode(tokens[:first])
    params = GREEDY.replace(stop_token_ids=[stop], min_tokens=first + 2)
    (later,) = llm.generate("abc", params, use_tqdm=False)
    assert len(later.outputs[0].token_ids) >= first + 2
    assert stop not in later.outputs[0].token_ids[: first + 1]


def test_stop_string_cuts_text_and_tokens(llm: LLM) -> None:
    (free,) = llm.generate("abc", GREEDY, use_tqdm=False)
    text = free.outputs[0].text
    stop = text[3:5]
    at = text.index(stop)
    for include in (False, True):
        params = GREEDY.replace(stop=[stop], include_stop_str_in_output=include)
        (stopped,) = llm.generate("abc", params, use_tqdm=False)
        (completion,) = stopped.outputs
        assert completion.text == text[: at + (len(stop) if include else 0)]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert len(completion.token_ids) < len(free.outputs[0].token_ids)


def test_eos_ends_unless_ignored(servable: Callable[[str], ServableCheckpoint]) -> None:
    checkpoint = servable("llama")
    with LLM(str(checkpoint.directory), **OPTIONS) as llm:
        (free,) = llm.generate([7, 8], GREEDY, use_tqdm=False)
        eos = free.outputs[0].token_ids[3]
    override = {"eos_token_id": eos}
    with LLM(str(checkpoint.directory), override_generation_config=override, **OPTIONS) as llm:
        (ended,) = llm.generate([7, 8], GREEDY.replace(ignore_eos=False), use_tqdm=False)
        (completion,) = ended.outputs
        first = free.outputs[0].token_ids.index(eos)
        assert completion.token_ids == free.outputs[0].token_ids[: first + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        (ignored,) = llm.generate([7, 8], GREEDY, use_tqdm=False)
        assert ignored.outputs[0].token_ids == free.outputs[0].token_ids


def test_logprobs_hold_the_chosen_and_the_top(llm: LLM) -> None:
    (output,) = llm.generate("abc", GREEDY.replace(logprobs=3), use_tqdm=False)
    (completion,) = output.outputs
    assert completion.logprobs is not None and len(completion.logprobs) == 12
    total = 0.0
    for token, position in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(position) == 3 and position[token].rank == 1
        values = [entry.logprob for entry in position.values()]
        assert values == sorted(values, reverse=True)
        assert position[token].decoded_token == llm.model.tokenizer.decode_token(token)
        total += position[token].logprob
    assert completion.cumulative_logprob == pytest.approx(total)
    (chosen,) = llm.generate(
        "abc", SamplingParams(temperature=2.0, seed=3, logprobs=0, max_tokens=5), use_tqdm=False
    )
    for token, position in zip(
        chosen.outputs[0].token_ids, chosen.outputs[0].logprobs, strict=True
    ):
        assert list(position) == [token]


def test_seed_fixes_the_output_and_company_does_not_change_it(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=10, ignore_eos=True)
    (first,) = llm.generate("abc", params, use_tqdm=False)
    others = [params.replace(seed=seed) for seed in range(8)]
    crowd = llm.generate(["abc"] * 8, others, use_tqdm=False)
    assert crowd[5].outputs[0].token_ids == first.outputs[0].token_ids
    assert len({tuple(o.outputs[0].token_ids) for o in crowd}) > 4


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_likeliest_token_alone_is_greedy_whatever_the_seed(kernels: str) -> None:
    """In bfloat16 several logits often tie for the largest: the built-in model's do."""
    questions = ["Write a poem.", "Tell me a story about the sea.", "What is a cat?"]
    with LLM(str(MODEL_DIR), kernels=kernels, max_model_len=256, max_num_seqs=16) as llm:

        def texts(**fields: Any) -> list[str]:
            params = SamplingParams(max_tokens=24, ignore_eos=True, **fields)
            return [
                output.outputs[0].text for output in llm.generate(questions, params, use_tqdm=False)
            ]

        greedy = texts(temperature=0.0)
        for seed in range(4 if kernels == "reference" else 20):
            assert texts(temperature=1.0, top_k=1, seed=seed) == greedy
        assert texts(temperature=2.0, top_k=1, top_p=0.5, seed=1) == greedy


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], GREEDY, None),
        ("", GREEDY, "prompt"),
        ([1, VOCAB_SIZE], GREEDY, "prompt"),
        ([1, -1], GREEDY, "prompt"),
        ([1, True], GREEDY, "prompt"),
        ({"prompt_token_ids": [1, "a"]}, GREEDY, "prompt"),
        ({"text": "a"}, GREEDY, "prompt"),
        ({"prompt": "a", "cache_salt": ""}, GREEDY, "cache_salt"),
        ("\ud800", GREEDY, None),
        ([1] * 128, GREEDY, "input_tokens"),
        ([1] * 120, GREEDY, "max_tokens"),
        ([1] * 120, SamplingParams(max_tokens=None, min_tokens=9), "min_tokens"),
        ([1], GREEDY.replace(logprobs=21), "logprobs"),
        ([1], GREEDY.replace(logprobs=-1), "logprobs"),
        ([1], GREEDY.replace(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
        (
            [1],
            GREEDY.replace(allowed_token_ids=[3], stop_token_ids=[3], min_tokens=1),
            "allowed_token_ids",
        ),
    ],
)
def test_bad_requests_are_typed_and_harm_nobody(
    llm: LLM, prompt: Any, params: SamplingParams, param: str | None
) -> None:
    if prompt == []:
        prompt = {"prompt_token_ids": []}
    with pytest.raises(InvalidParameterError) as raised:
        llm.generate(["fine", prompt], params, use_tqdm=False)
    if param is not None:
        assert raised.value.param == param
    assert not llm._core._core.scheduler.requests
    assert len(llm.generate("fine", GREEDY, use_tqdm=False)) == 1


def test_too_long_names_both_numbers(llm: LLM) -> None:
    with pytest.raises(PromptTooLongError, match=r"128 tokens.*200 input tokens"):
        llm.generate([1] * 200, GREEDY, use_tqdm=False)


def test_lists_of_unequal_length_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidParameterError):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    with pytest.raises(InvalidParameterError):
        llm.generate(["a", "b"], GREEDY, priority=[1], use_tqdm=False)


def test_nan_logits_end_that_request_alone(llm: LLM) -> None:
    backend = llm._core._core.executor.runner.backend
    plain = backend._pass

    class Poisoned:
        def forward(self, rows):
            logits = plain.forward(rows)
            logits[0, 3] = math.nan
            return logits

    backend._pass = Poisoned()
    try:
        bad, good = llm.generate([[1, 2], [3, 4]], GREEDY.replace(max_tokens=1), use_tqdm=False)
    finally:
        backend._pass = plain
    assert bad.outputs[0].finish_reason == "error" and "NaN" in (bad.error or "")
    assert good.outputs[0].finish_reason == "length"


def test_an_interrupted_generate_leaves_nothing_behind(llm: LLM, monkeypatch) -> None:
    core = llm._core
    receive, calls = core.receive, []

    def interrupted():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return receive()

    monkeypatch.setattr(core, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert not llm._front.is_busy and not llm._core._core.scheduler.requests
    assert len(llm.generate("fine", GREEDY, use_tqdm=False)) == 1


def test_kv_waste_stays_under_four_percent(servable: Callable[[str], ServableCheckpoint]) -> None:
    """Slots allocated and not used, over a mixed workload, time-weighted: the paper's figure."""
    checkpoint = servable("llama")
    options = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "max_model_len": 1024}
    with LLM(
        str(checkpoint.directory),
        hf_overrides={"max_position_embeddings": 1024},
        num_gpu_blocks_override=700,
        **options,
    ) as llm:
        batch = prompts(40, longest=600, seed=9)
        params = [GREEDY.replace(max_tokens=16 + 5 * i) for i in range(40)]
        allocated = used = 0
        take = llm._front.take

        def watching(message):
            nonlocal allocated, used
            effects = take(message)
            allocated += llm.stats.kv_slots_allocated
            used += llm.stats.kv_slots_used
            return effects

        llm._front.take = watching  # type: ignore[method-assign]
        llm.generate(batch, params, use_tqdm=False)
    waste = 1 - used / allocated
    print(f"KV waste {waste:.2%}")
    assert 0 < waste < 0.04


def test_creating_and_closing_does_not_leak(servable: Callable[[str], ServableCheckpoint]) -> None:
    directory = str(servable("llama").directory)
    process = psutil.Process()

    def once() -> None:
        with LLM(directory, **OPTIONS) as llm:
            llm.generate("abc", GREEDY, use_tqdm=False)

    once()
    gc.collect()
    before = process.memory_info().rss
    for _ in range(20):
        once()
    gc.collect()
    assert process.memory_info().rss - before < 40 * 2**20


def test_a_closed_llm_says_so(servable: Callable[[str], ServableCheckpoint]) -> None:
    llm = LLM(str(servable("llama").directory), **OPTIONS)
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("a", GREEDY, use_tqdm=False)


def test_two_engines_live_in_one_process(servable: Callable[[str], ServableCheckpoint]) -> None:
    directory = str(servable("qwen3").directory)
    with LLM(directory, **OPTIONS) as one, LLM(directory, **OPTIONS) as two:
        assert (
            one.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
            == two.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        )


@pytest.mark.parametrize("engine", ["inline", "process"])
def test_models_that_cannot_be_served_are_typed_errors(engine: str, tmp_path: Path) -> None:
    def fails(kind: type[QuireError], match: str, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            LLM(**{"model": str(tmp_path), **OPTIONS, **options}, engine=engine)

    fails(CheckpointError, "config.json")
    write_checkpoint("llama", tmp_path)
    fails(
        UnsupportedModelError, "FooForCausalLM", hf_overrides={"architectures": ["FooForCausalLM"]}
    )
    fails(ConfigError, "max_num_seqz.*max_num_seqs", max_num_seqz=3)
    fails(ConfigError, "exceeds the 256 positions", max_model_len=512)
    fails(
        MemoryFitError,
        "--max-model-len.*--kv-cache-memory-bytes",
        num_gpu_blocks_override=None,
        kv_cache_memory_bytes=40_000,
    )
    fails(ConfigError, "chunked", enable_chunked_prefill=False)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    fails(CheckpointError, "safetensors")
    weights.unlink()
    fails(CheckpointError, "safetensors")
    weights.write_bytes(whole)
    (tmp_path / "tokenizer.json").unlink()
    fails(CheckpointError, "tokenizer")


def test_max_model_len_auto_fits_memory(servable: Callable[[str], ServableCheckpoint]) -> None:
    options = {**OPTIONS, "max_model_len": -1, "num_gpu_blocks_override": 1 + 5}
    with LLM(str(servable("llama").directory), **options) as llm:
        assert llm.model.max_model_len == 80
        (output,) = llm.generate([1] * 60, GREEDY.replace(max_tokens=None), use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 20


def test_priority_policy_serves_lower_values_first(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    options = {**OPTIONS, "max_num_seqs": 1, "scheduling_policy": "priority"}
    with LLM(str(servable("llama").directory), **options) as llm:
        outputs = llm.generate(
            [[1], [2], [3]], GREEDY.replace(max_tokens=3), priority=[5, 1, 3], use_tqdm=False
        )
        order = sorted(range(3), key=lambda i: outputs[i].metrics.first_token_ts)
        assert order == [1, 2, 0]


def test_output_kind_is_the_callers_in_streams_only(llm: LLM) -> None:
    params = GREEDY.replace(output_kind=RequestOutputKind.DELTA)
    (output,) = llm.generate("abc", params, use_tqdm=False)
    assert output.finished and len(output.outputs[0].token_ids) == 12


def test_a_fault_in_one_requests_text_ends_that_request_alone(llm: LLM, monkeypatch) -> None:
    from quire.text.detokenizer import IncrementalDetokenizer

    push = IncrementalDetokenizer.push
    broken: list[IncrementalDetokenizer] = []

    def faulty(self, token_ids, *, final=False):
        broken[:] = broken or [self]
        if self is broken[0]:
            raise RuntimeError("a bug in text handling")
        return push(self, token_ids, final=final)

    monkeypatch.setattr(IncrementalDetokenizer, "push", faulty)
    bad, good = llm.generate(["abc", "abd"], GREEDY, use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error" and "RuntimeError" not in (bad.error or "")
    assert good.outputs[0].finish_reason == "length" and good.outputs[0].text
    assert not llm._front.is_busy and not llm._core._core.scheduler.requests


@pytest.mark.parametrize("where", ["execute", "handle"])
def test_ctrl_c_leaves_the_engine_and_its_prefix_cache_right(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    prompt = list(range(20, 80))
    llm.reset_prefix_cache()
    [right] = llm.generate(prompt, GREEDY, use_tqdm=False)
    llm.reset_prefix_cache()
    core = llm._core._core
    owner = core.executor if where == "execute" else core
    original = getattr(owner, where)
    pressed = []

    def press_first(argument: object) -> object:
        if not pressed:
            pressed.append(1)
            signal.raise_signal(signal.SIGINT)
        return original(argument)

    monkeypatch.setattr(owner, where, press_first)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([prompt, [1, 2, 3]], GREEDY, use_tqdm=False)
    assert not llm._front.is_busy
    [again] = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert again.outputs[0].token_ids == right.outputs[0].token_ids
    assert not core.scheduler.requests


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda llm: llm.generate(5), "prompts must be text, token ids.* got int"),
        (lambda llm: llm.generate("x", {"temperature": 0}), r"SamplingParams\(\.\.\.\).* got dict"),
        (lambda llm: llm.generate("x", 5), r"SamplingParams\(\.\.\.\).* got int"),
        (lambda llm: llm.embed(None), "prompts must be text, token ids.* got NoneType"),
        (
            lambda llm: SamplingParams(structured_outputs={"schema": {}}),
            "structured_outputs may hold json, .* got 'schema'",
        ),
        (
            lambda llm: SamplingParams(structured_outputs="json"),
            "structured_outputs must be .* got 'json'",
        ),
    ],
)
def test_what_a_notebook_cell_gets_wrong_is_named(
    llm: LLM, call: Callable[[LLM], object], complaint: str
) -> None:
    with pytest.raises(InvalidParameterError, match=complaint):
        call(llm)


def test_structured_outputs_may_be_a_dictionary_as_over_http() -> None:
    params = SamplingParams(structured_outputs={"choice": ["yes", "no"]})
    assert params.structured_outputs == StructuredOutputsParams(choice=["yes", "no"])


def test_a_notebook_without_widgets_gets_a_bar_of_text_and_no_warning(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    kernel = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    for name in ("ipywidgets", "tqdm.auto", "tqdm.autonotebook", "tqdm.notebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    llm.generate(["x", "y"], GREEDY)
    llm.embed(["x"])
    told = capfd.readouterr().err
    assert "2/2" in told and "output tok/s" in told
    assert not re.search(r"(?<!\d)0\.0 output tok/s", told)  # vectors have no output tokens
    assert "IProgress" not in told


def test_the_processes_of_a_forgotten_llm_end(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    before = set(psutil.Process().children())
    llm = LLM(str(servable("llama").directory), engine="process", **OPTIONS)
    choice = SamplingParams(structured_outputs={"choice": ["yes"]}, max_tokens=2)
    llm.generate("x", choice, use_tqdm=False)
    assert len(set(psutil.Process().children()) - before) == 2  # the core, and who tries grammars
    del llm
    gc.collect()
    assert set(psutil.Process().children()) == before
