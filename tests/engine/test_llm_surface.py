"""What vLLM's users find on `LLM` beside `generate` and `chat`: vectors, queues, metrics, sleep, keywords."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine.core_client import CoreProcess, InlineCore
from quire.engine.llm import LLM
from quire.errors import (
    ConfigError,
    EngineSleepingError,
    InvalidParameterError,
    MemoryFitError,
    QuireError,
)
from quire.metrics.reader import Counter, Gauge, Histogram
from quire.sampling_params import PoolingParams, SamplingParams, StructuredOutputsParams
from quire.scheduler.record_reader import read
from tests.engine import dying_core
from tests.engine.checkpoints import ServableCheckpoint

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 128,
    "num_gpu_blocks_override": 100,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def checkpoint(servable: Callable[[str], ServableCheckpoint]) -> ServableCheckpoint:
    return servable("llama")


@pytest.fixture(scope="module", params=["inline", "process"])
def llm(request: pytest.FixtureRequest, checkpoint: ServableCheckpoint):
    with LLM(
        str(checkpoint.directory), engine=request.param, disable_log_stats=False, **OPTIONS
    ) as llm:
        yield llm


def hidden(checkpoint: ServableCheckpoint, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        output = checkpoint.reference(torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[-1][0]


def test_vectors_are_the_models_hidden_states(llm: LLM, checkpoint: ServableCheckpoint) -> None:
    batch = [[5, 6, 7], [8, 9]]
    for output, ids in zip(llm.embed(batch, use_tqdm=False), batch, strict=True):
        expected = torch.nn.functional.normalize(hidden(checkpoint, ids)[-1], dim=0)
        assert output.prompt_token_ids == ids and output.finished
        assert torch.allclose(torch.tensor(output.outputs.embedding), expected, atol=1e-4)
    raw = PoolingParams(pooling="mean", normalize=False, dimensions=4)
    [encoded] = llm.encode([5, 6, 7], raw, use_tqdm=False)
    expected = hidden(checkpoint, [5, 6, 7]).mean(0)[:4]
    assert torch.allclose(torch.tensor(encoded.outputs.data), expected, atol=1e-3)


def test_scores_are_cosines(llm: LLM) -> None:
    one, same, other = llm.score("abc", ["abc", "abc", "xyz?"], use_tqdm=False)
    assert one.outputs.score == pytest.approx(1.0) == same.outputs.score
    assert other.outputs.score < 0.999
    [left, right] = llm.embed(["abc", "xyz?"], use_tqdm=False)
    by_hand = torch.dot(torch.tensor(left.outputs.embedding), torch.tensor(right.outputs.embedding))
    assert other.outputs.score == pytest.approx(by_hand.item(), abs=1e-5)
    pairs = llm.score(["abc", "xyz?"], ["abc", "xyz?"], use_tqdm=False)
    assert [pair.outputs.score for pair in pairs] == pytest.approx([1.0, 1.0])
    with pytest.raises(InvalidParameterError, match="2:3"):
        llm.score(["a", "b"], ["a", "b", "c"])


def test_enqueued_requests_wait_for_who_wants_them(llm: LLM) -> None:
    first = llm.enqueue(["one", "two"], GREEDY)
    second = llm.enqueue([5, 6], GREEDY.replace(max_tokens=2))
    [between] = llm.generate("between", GREEDY, use_tqdm=False)
    assert between.request_id not in (*first, *second)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == [*first, *second]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [6, 6, 2]
    assert llm.wait_for_completion(use_tqdm=False) == []


def sleep_state(llm: LLM) -> str:
    states = [m for m in llm.get_metrics() if m.name == "vllm:engine_sleep_state"]
    [name] = [m.labels["sleep_state"] for m in states if isinstance(m, Gauge) and m.value]
    return name


def test_it_sleeps_and_wakes(llm: LLM) -> None:
    prompt = list(
        range(40, 90)
    )  # three full blocks: what was cached before must not be found after
    [before] = llm.generate(prompt, GREEDY, use_tqdm=False)
    for level in (1, 2):
        llm.enqueue("abc", GREEDY)
        with pytest.raises(InvalidParameterError, match="wait_for_completion"):
            llm.sleep(level)
        llm.wait_for_completion(use_tqdm=False)
        llm.sleep(level)
        assert sleep_state(llm) == ["weights_offloaded", "discard_all"][level - 1]
        with pytest.raises(EngineSleepingError, match="wake_up"):
            llm.generate("abc", GREEDY, use_tqdm=False)
        llm.wake_up(tags=["weights", "kv_cache"])
        assert sleep_state(llm) == "awake"
        [after] = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert after.outputs[0].token_ids == before.outputs[0].token_ids
        assert after.num_cached_tokens == 0
    with pytest.raises(InvalidParameterError):
        llm.sleep(3)
    with pytest.raises(InvalidParameterError):
        llm.wake_up(tags=["gpu"])


def test_a_wake_up_without_memory_raises_and_may_be_tried_again(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(llm._core, InlineCore):
        pytest.skip("the executor is in another process")

    def too_little() -> None:
        raise MemoryFitError("Free 2 GB.")

    llm.sleep()
    monkeypatch.setattr(llm._core._core.executor, "wake_up", too_little)
    with pytest.raises(MemoryFitError, match="Free 2 GB"):
        llm.wake_up()
    monkeypatch.undo()
    with pytest.raises(EngineSleepingError):
        llm.generate("abc", GREEDY, use_tqdm=False)
    llm.wake_up()
    assert llm.generate("abc", GREEDY, use_tqdm=False)[0].finished


def test_control_calls_keep_the_outputs_of_queued_requests(llm: LLM) -> None:
    """Those that come in before the answer."""
    one_token = SamplingParams(max_tokens=1)
    core = llm._core
    assert core is not None
    llm.enqueue([1, 2, 3], one_token)
    if isinstance(core, CoreProcess):
        assert core.socket.poll(10_000), "the output is there"
    else:
        core._answers.append(core._core.step())
    llm.wake_up()
    llm.reset_prefix_cache()
    [output] = llm.wait_for_completion(use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1


def test_the_prefix_cache_can_be_emptied(llm: LLM) -> None:
    def cached() -> int | None:
        return llm.generate([3] * 40, GREEDY, use_tqdm=False)[0].num_cached_tokens

    cached()
    assert cached()
    assert llm.reset_prefix_cache() is True
    assert cached() == 0


def test_metrics_are_values(checkpoint: ServableCheckpoint) -> None:
    with LLM(str(checkpoint.directory), disable_log_stats=False, **OPTIONS) as llm:
        llm.generate([[1, 2, 3], [4, 5, 6]], GREEDY, use_tqdm=False)
        metrics = {m.name: m for m in llm.get_metrics() if m.name.startswith("vllm:")}
    name = {"model_name": str(checkpoint.directory), "engine": "0"}
    assert metrics["vllm:prompt_tokens"] == Counter("vllm:prompt_tokens", name, 6)
    assert metrics["vllm:generation_tokens"] == Counter("vllm:generation_tokens", name, 12)
    assert metrics["vllm:num_requests_running"] == Gauge("vllm:num_requests_running", name, 0.0)
    sizes = metrics["vllm:request_generation_tokens"]
    assert isinstance(sizes, Histogram)
    assert (sizes.count, sizes.sum, sizes.labels) == (2, 12.0, name)
    assert sizes.buckets["5.0"] == 0 and sizes.buckets["10.0"] == 2 == sizes.buckets["+Inf"]
    with (
        LLM(str(checkpoint.directory), **OPTIONS) as quiet,
        pytest.raises(ConfigError, match="disable_log_stats"),
    ):
        quiet.get_metrics()


def test_a_bad_grammar_is_told_before_anything_runs(llm: LLM) -> None:
    bad = StructuredOutputsParams(regex="(")
    with pytest.raises(InvalidParameterError) as raised:
        llm.generate(["fine", "not"], [GREEDY, GREEDY.replace(structured_outputs=bad)])
    assert raised.value.param == "structured_outputs"
    good = GREEDY.replace(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    [output] = llm.generate("abc", good, use_tqdm=False)
    assert output.outputs[0].text in ("yes", "no")


def test_templates_get_the_tools(checkpoint: ServableCheckpoint) -> None:
    template = (
        "{{ messages[0].content }} {% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    )
    with LLM(str(checkpoint.directory), chat_template=template, **OPTIONS) as llm:
        question = [{"role": "user", "content": "hi"}]
        [output] = llm.chat(question, GREEDY, tools=TOOLS, use_tqdm=False)
        assert output.prompt == "hi look_up"
        [output] = llm.chat(question, GREEDY, use_tqdm=False)
        assert output.prompt == "hi "


def test_what_is_not_there_is_refused_by_name(llm: LLM) -> None:
    for call, param in (
        (lambda: llm.generate("a", GREEDY, lora_request="x"), "lora_request"),
        (lambda: llm.embed("a", lora_request="x"), "lora_request"),
        (lambda: llm.generate("a", GREEDY, tokenization_kwargs={"x": 1}), "tokenization_kwargs"),
        (lambda: llm.encode("a", pooling_task="classify"), "pooling_task"),
        (lambda: llm.embed(["a", "b"], pooling_params=[PoolingParams()]), "pooling_params"),
        (lambda: llm.embed("a", pooling_params=PoolingParams(dimensions=10**6)), "dimensions"),
    ):
        with pytest.raises(InvalidParameterError) as raised:
            call()
        assert raised.value.param == param


def test_vllms_keywords_pass_where_they_ask_for_nothing(
    checkpoint: ServableCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    vllms: dict[str, Any] = {
        "runner": "auto",
        "tensor_parallel_size": 1,
        "trust_remote_code": True,
        "quantization": None,
        "logits_processors": [],
        "task": "generate",
        "preemption_mode": "swap",
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
    }
    with caplog.at_level(logging.WARNING), LLM(str(checkpoint.directory), **vllms, **OPTIONS):
        assert "preemption_mode has no effect" in caplog.text
    with LLM(str(checkpoint.directory), swap_space=0.01, **OPTIONS) as llm:
        assert llm.generate("a b c", use_tqdm=False)[0].outputs
    for wrong, remedy in (
        ({"swap_space": 10**5}, "--swap-space .* or less"),
        ({"tensor_parallel_size": 0}, "at least 1"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size"),
        ({"task": "classify"}, "classifies"),
        ({"logits_processors": ["my.module"]}, "logit_bias"),
        ({"max_model_length": 5}, "max_model_len"),
    ):
        with pytest.raises(ConfigError, match=remedy):
            LLM(str(checkpoint.directory), **{**OPTIONS, **wrong})


def test_the_record_of_decisions_is_read_from_the_core(llm: LLM) -> None:
    before = max((0, *read(llm.records()[0]).arrivals))
    llm.generate(["Hello", "there"], GREEDY)
    history = read(llm.records()[0])
    ends = {i: end for i, end in history.ends.items() if i > before}
    assert [end.num_output_tokens for end in ends.values()] == [6, 6]
    assert ends.keys() == {i for i in history.arrivals if i > before}


def test_without_a_record(checkpoint: ServableCheckpoint) -> None:
    with LLM(str(checkpoint.directory), decision_record_bytes=0, **OPTIONS) as llm:
        llm.generate(["Hello"], GREEDY)
        assert llm.records() == []


def test_a_core_that_fails_leaves_its_record(
    checkpoint: ServableCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in dying_core.environment(tmp_path, "error").items():
        monkeypatch.setenv(name, text)
    options = {**OPTIONS, "decision_record_dir": str(tmp_path)}
    with LLM(str(checkpoint.directory), engine="process", **options) as llm:
        with pytest.raises(QuireError):
            llm.generate({"prompt_token_ids": [dying_core.MARK] * dying_core.TIMES}, GREEDY)
    found = [read(path.read_bytes()) for path in tmp_path.glob("quire-record-*.bin")]
    assert found and all(history.arrivals and history.steps for history in found)
