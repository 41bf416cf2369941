"""Every parameter on the path for accelerators, its device played by the CPU and its kernels interpreted:
what the CPU's engine answers, in one batch of all kinds, some of them preempted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from quire.config import EngineConfig
from quire.engine.llm import LLM
from quire.executor import inline
from quire.messages import StepResult, TokenLogprobs
from quire.outputs import RequestOutput
from quire.runner.device import HostDevice
from quire.runner.footprint import WorkerSpec
from quire.runner.gpu import GPU
from quire.runner.gpu_step import GPUBackend
from quire.runner.runner import Runner, RunningStep
from quire.runner.worker import Worker
from quire.sampling_params import PoolingParams, SamplingParams, StructuredOutputsParams
from quire.scheduler.invariants import check_invariants
from quire.text.parsing.base import ThinkingTokens
from tests.engine.checkpoints import ServableCheckpoint, prompts, write_checkpoint
from tests.triton.keys import Variants

# What attention leaves of padding is what the memory held: NumPy warns of sums that overflow.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

MAX_TOKENS = 7
FORCED = " is a letter of the alphabet"
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 24,
    "max_model_len": 64,
    "num_gpu_blocks_override": 1 + 8,  # fewer than eight requests need in the end
    "watermark": 0.0,
    "max_logprobs": -1,
}


def sampling(**fields: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True, "seed": 1, **fields}
    )


def structured(regex: str, **fields: Any) -> SamplingParams:
    rules = StructuredOutputsParams(regex=regex)
    return sampling(structured_outputs=rules, max_tokens=40, ignore_eos=False, **fields)


MIX: dict[str, SamplingParams | PoolingParams] = {
    # First, since a preempted request computes forced tokens as any others.
    "forced": structured(
        f"(alpha|beta){FORCED}[ -~]{{10}}", frequency_penalty=1.0, presence_penalty=1.0
    ),
    "free": sampling(),
    "bias": sampling(logit_bias={70: 3.0, 80: 2.0, 90: -100.0}, repetition_penalty=1.5),
    "more biases": sampling(logit_bias=dict.fromkeys(range(100, 120), 2.0), logprobs=1),
    "allowed": sampling(
        allowed_token_ids=[66, 67, 70], presence_penalty=1.0, logprob_token_ids=[7, 66, 9]
    ),
    "bad words": sampling(bad_words=[*"abcdefghijklmnop", "th"], temperature=1.5),
    "stepped": structured("(yes|no)!{3}", logprobs=2, logprob_token_ids=[5]),
    "drawn": structured("[a-f]{4}[0-9]", temperature=1.0, top_p=0.9, min_tokens=9),
    "none left": structured("(yes|no)", allowed_token_ids=[66]),
    "thinking": sampling(thinking_token_budget=3),
    "all logprobs": sampling(logprobs=-1, max_tokens=2, logprob_token_ids=[1, 2]),
    "prompt": sampling(prompt_logprobs=2, logprob_token_ids=[11], max_tokens=3),
    "prompt only": sampling(prompt_logprobs=0, max_tokens=0),
    "last": PoolingParams(),
    "mean": PoolingParams(pooling="mean", normalize=False),
}
THINKING = ThinkingTokens(start=[], end=[60, 61], inside=True)
PROMPTS = dict(zip(MIX, prompts(len(MIX), longest=24, seed=5), strict=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> ServableCheckpoint:
    return write_checkpoint(
        "llama", tmp_path_factory.mktemp("tiny"), hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip


def answers(llm: LLM, names: list[str]) -> dict[str, RequestOutput]:
    read = llm._front.read

    def thinking(prompt: Any, params: Any, **options: Any) -> Any:
        thinks = getattr(params, "thinking_token_budget", None) is not None
        return read(prompt, params, thinking=THINKING if thinks else None, **options)

    llm._front.read = thinking  # type: ignore[method-assign]
    ids = llm._submit([PROMPTS[name] for name in names], [MIX[name] for name in names])
    llm._front.read = read  # type: ignore[method-assign]
    outputs = llm._wait(ids, use_tqdm=False)
    check_invariants(llm._core._core.scheduler)  # type: ignore[union-attr]
    return dict(zip(names, outputs, strict=True))


@pytest.fixture(scope="module")
def expected(checkpoint: ServableCheckpoint) -> dict[str, RequestOutput]:
    with LLM(str(checkpoint.directory), **OPTIONS) as llm:
        return answers(llm, list(MIX))


class CompilingDevice(HostDevice):
    compiles = True


def on_device(config: EngineConfig, spec: WorkerSpec, grammars: Any) -> Worker:
    return Worker(config, spec, grammars=grammars, platform=GPU(config, spec, CompilingDevice()))


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> Variants:
    return Variants(monkeypatch)


@pytest.fixture
def device_llm(
    checkpoint: ServableCheckpoint, variants: Variants, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LLM]:
    """No request needs a kernel in a variant that was not launched at the start."""
    monkeypatch.setattr(inline, "inline_executor", on_device)
    with LLM(str(checkpoint.directory), **OPTIONS) as llm:
        known = set(variants.seen)
        yield llm
    assert not variants.since(known)


def runner_of(llm: LLM) -> Runner | None:
    runner = llm._core._core.executor.runner  # type: ignore[union-attr]
    assert runner is None or isinstance(runner.backend, GPUBackend)
    return runner


def close(ours: Any, theirs: Any) -> None:
    """Equal, but for the last digits of numbers."""
    if isinstance(theirs, float):
        assert math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=1e-4)
    elif isinstance(theirs, TokenLogprobs):
        close([getattr(ours, name) for name in theirs.__struct_fields__],
              [getattr(theirs, name) for name in theirs.__struct_fields__])  # fmt: skip
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            close(ours[key], value)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            close(one, other)
    elif hasattr(theirs, "logprob"):
        close(ours.logprob, theirs.logprob)
        assert ours.rank == theirs.rank
    else:
        assert ours == theirs


def test_every_parameter_is_honoured_as_on_the_cpu(
    device_llm: LLM, expected: dict[str, RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, lengths = RunningStep.result, [0]

    def noted(step: RunningStep) -> StepResult:
        found = result(step)
        lengths.extend(len(row.token_ids) for row in found.sampled)
        return found

    monkeypatch.setattr(RunningStep, "result", noted)
    found = answers(device_llm, list(MIX))
    for name, theirs in expected.items():
        ours = found[name]
        assert ours.error == theirs.error, name
        close(ours.embedding, theirs.embedding)
        close(ours.prompt_logprobs, theirs.prompt_logprobs)
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert one.token_ids == other.token_ids, name
            assert one.finish_reason == other.finish_reason, name
            close(one.logprobs, other.logprobs)
    runner = runner_of(device_llm)
    assert runner is not None and runner.backend.graphs.recorded, (
        "nothing was recorded beside all this"
    )
    assert sum(output.metrics.num_preemptions for output in found.values()) > 0
    # That the parameters did something at all:
    tokens = {name: output.outputs[0].token_ids for name, output in found.items() if output.outputs}
    assert set(tokens["allowed"]) <= {66, 67, 70} and len(set(tokens["allowed"])) > 1
    assert tokens["thinking"][3:5] == THINKING.end != tokens["thinking"][:2]
    assert FORCED in found["forced"].outputs[0].text
    assert max(lengths) > 5, "no tokens were forced"
    assert found["drawn"].outputs[0].finish_reason == "stop"
    assert found["none left"].outputs[0].finish_reason == "error"
    assert len(found["all logprobs"].outputs[0].logprobs[0]) == 320
    assert found["mean"].embedding and found["last"].embedding


def test_sleeping_gives_the_memory_back_and_changes_nothing(
    device_llm: LLM, expected: dict[str, RequestOutput]
) -> None:
    names = ["prompt only", "stepped"]
    for level in (1, 2):
        runner = runner_of(device_llm)
        model = None if runner is None else runner.model
        runner = None
        device_llm.sleep(level)
        assert runner_of(device_llm) is None
        device_llm.wake_up()
        woken = runner_of(device_llm)
        assert woken is not None and (woken.model is model) == (level == 1)
        del woken
    for name, output in answers(device_llm, names).items():
        assert [o.token_ids for o in output.outputs] == [
            o.token_ids for o in expected[name].outputs
        ]
        close(output.prompt_logprobs, expected[name].prompt_logprobs)


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logprobs", "processed_logits"])
def test_other_kinds_of_logprobs(
    checkpoint: ServableCheckpoint, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {
        "plain": sampling(logprobs=3, max_tokens=2),
        "filtered": sampling(logprobs=4, max_tokens=2, temperature=0.7, top_p=0.6, min_p=0.01),
        "edited": sampling(
            logprobs=30, max_tokens=2, temperature=0.7, top_k=20, logit_bias={7: 2.0, 9: -3.0}
        ),
        "whole": sampling(
            logprobs=-1, max_tokens=2, temperature=0.7, top_k=20, logit_bias={7: 2.0, 9: -3.0}
        ),
        "asked": sampling(
            max_tokens=2, logprob_token_ids=[7, 9], logit_bias={9: 5.0}, presence_penalty=1.0
        ),
    }
    found = []
    for place in ("cpu", "device"):
        if place == "device":
            monkeypatch.setattr(inline, "inline_executor", on_device)
        with LLM(str(checkpoint.directory), **OPTIONS, logprobs_mode=mode) as llm:
            same = [[5, 6]] * len(wanted)
            found.append(llm.generate(same, list(wanted.values()), use_tqdm=False))
    for theirs, ours in zip(*found, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        close(ours.outputs[0].logprobs, theirs.outputs[0].logprobs)
