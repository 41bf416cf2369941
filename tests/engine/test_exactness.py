"""The promise: a request's tokens, and the logits behind them bit for bit, do not depend on how it was
scheduled, and greedy tokens are transformers'."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.engine.core_client import InlineCore
from quire.engine.llm import LLM
from quire.models.registry import resolve_spec
from quire.outputs import RequestOutput
from quire.sampling.sampler import Sampler
from quire.sampling_params import SamplingParams
from tests.engine.checkpoints import ServableCheckpoint, prompts, write_tokenizer
from tests.models.variants import LOGITS_ONLY, VARIANTS

NEW_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
BASE: dict[str, Any] = {"max_num_seqs": 32, "max_num_batched_tokens": 2048, "max_model_len": 256}
SCHEDULES: dict[str, dict[str, Any]] = {
    "budget 16": {"max_num_seqs": 16, "max_num_batched_tokens": 16},
    "budget 64": {"max_num_batched_tokens": 64},
    "budget 2048": {},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_batched_tokens": 100},
    # 32 requests of up to 184 tokens, and room for 320: everyone but the first is preempted.
    "tiny pool": {"num_gpu_blocks_override": 20, "watermark": 0.0},
}

Logits = dict[tuple[tuple[int, ...], int], torch.Tensor]


class Recorder:
    """Stands before the sampler and keeps every row of logits, by (prompt, position)."""

    def __init__(self, llm: LLM) -> None:
        assert isinstance(llm._core, InlineCore)
        executor = llm._core._core.executor
        runner = getattr(
            executor, "_worker", executor
        ).runner  # of several ranks, the one that samples
        self._seats = runner.seats
        self._sampler: Sampler = runner.backend._sampler
        self.logits: Logits = {}
        runner.backend._sampler = self

    def sample(
        self, logits: torch.Tensor, table: Any, seats: Any, positions: Any, *rest: Any
    ) -> Any:
        for seat, position, values in zip(seats, positions.tolist(), logits, strict=True):
            count = self._seats.num_prompt_tokens[seat]
            prompt = tuple(self._seats.token_ids[seat, :count].tolist())
            self.logits[prompt, position] = values.clone()
        return self._sampler.sample(logits, table, seats, positions, *rest)


def make_llm(checkpoint: ServableCheckpoint, **options: Any) -> LLM:
    """num_gpu_blocks_override: for each group of layers."""
    if (count := options.get("num_gpu_blocks_override")) is not None:
        config = json.loads((checkpoint.directory / "config.json").read_text())
        groups = resolve_spec(config).kv.groups
        options = {**options, "num_gpu_blocks_override": 1 + count * len(groups)}
    return LLM(str(checkpoint.directory), **{**BASE, **options})


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def assert_same_bits(left: Logits, right: Logits) -> None:
    assert left.keys() == right.keys()
    for key, values in left.items():
        assert torch.equal(values, right[key]), f"logits differ at position {key[1]}"


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in LOGITS_ONLY])
def test_every_schedule_gives_transformers_tokens_and_the_same_logits(
    name: str, servable: Callable[[str], ServableCheckpoint]
) -> None:
    checkpoint = servable(name)
    batch = prompts(32)
    with make_llm(checkpoint) as llm:
        recorder = Recorder(llm)
        alone = [llm.generate(p, GREEDY, use_tqdm=False)[0] for p in batch]
        expected = recorder.logits
        llm.reset_prefix_cache()
    for prompt, output in list(zip(batch, alone, strict=True))[:3]:
        assert output.outputs[0].token_ids == checkpoint.greedy(prompt, NEW_TOKENS)

    for label, options in SCHEDULES.items():
        with make_llm(checkpoint, **options) as llm:
            recorder = Recorder(llm)
            cold = llm.generate(batch, GREEDY, use_tqdm=False)
            assert tokens_of(cold) == tokens_of(alone), label
            assert_same_bits(recorder.logits, expected)
            preemptions = sum(output.metrics.num_preemptions for output in cold)
            assert (preemptions > 0) == (label == "tiny pool"), label
            recorder.logits = {}
            warm = llm.generate(batch, GREEDY, use_tqdm=False)
            assert tokens_of(warm) == tokens_of(alone), label
            assert_same_bits(recorder.logits, expected)
            if label == "budget 2048":
                # Everything but the last block's remainder, and the token to sample from, is found.
                for prompt, output in zip(batch, warm, strict=True):
                    whole = len(prompt) - len(prompt) % 16
                    assert output.num_cached_tokens == min(whole, len(prompt) - 1)


SAMPLED = SamplingParams(
    temperature=1.0, top_p=0.95, top_k=50, seed=11, max_tokens=24, ignore_eos=True,
    presence_penalty=0.4, repetition_penalty=1.1,
)  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_parallel_samples_equal_separate_requests_whatever_the_schedule(
    name: str, servable: Callable[[str], ServableCheckpoint]
) -> None:
    checkpoint = servable(name)
    batch = prompts(6, seed=5)
    separate = []
    with make_llm(checkpoint) as llm:
        for prompt in batch:
            one_by_one = [
                llm.generate(prompt, SAMPLED.replace(seed=11 + i), use_tqdm=False) for i in range(4)
            ]
            separate.append([outputs[0].outputs[0].token_ids for outputs in one_by_one])
        assert len({tuple(tokens) for tokens in separate[0]}) > 1, "the seeds should differ"
    for label, options in SCHEDULES.items():
        with make_llm(checkpoint, **options) as llm:
            together = llm.generate(batch, SAMPLED.replace(n=4), use_tqdm=False)
            found = [[s.token_ids for s in output.outputs] for output in together]
            assert found == separate, label


def test_siblings_share_the_prompt_and_copy_only_its_partial_block(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    with make_llm(servable("llama"), enable_prefix_caching=False) as llm:
        core = llm._core._core
        copies = []
        schedule = core.scheduler.schedule

        def spying_schedule() -> Any:
            plan = schedule()
            copies.extend(plan.copies)
            return plan

        core.scheduler.schedule = spying_schedule
        (output,) = llm.generate(
            [list(range(100))], SAMPLED.replace(n=5, max_tokens=4), use_tqdm=False
        )
        assert len(output.outputs) == 5
        assert len(copies) == 4  # 99 tokens: six whole blocks shared, three slots copied
        assert len({source for source, _ in copies}) == 1


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_process_engine_gives_the_same_tokens(
    name: str, servable: Callable[[str], ServableCheckpoint]
) -> None:
    checkpoint = servable(name)
    batch = prompts(12, seed=2)
    with make_llm(checkpoint) as llm:
        greedy = tokens_of(llm.generate(batch, GREEDY, use_tqdm=False))
        sampled = tokens_of(llm.generate(batch, SAMPLED, use_tqdm=False))
    with make_llm(checkpoint, engine="process") as llm:
        assert tokens_of(llm.generate(batch, GREEDY, use_tqdm=False)) == greedy
        assert tokens_of(llm.generate(batch, SAMPLED, use_tqdm=False)) == sampled


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-windows", "qwen3"])
def test_half_precision_is_as_invariant(
    name: str, dtype: str, servable: Callable[[str], ServableCheckpoint]
) -> None:
    checkpoint = servable(name)
    batch = prompts(16, seed=3)
    with make_llm(checkpoint, dtype=dtype) as llm:
        recorder = Recorder(llm)
        alone = [llm.generate(p, GREEDY, use_tqdm=False)[0] for p in batch]
        expected = recorder.logits
    for options in SCHEDULES.values():
        with make_llm(checkpoint, dtype=dtype, **options) as llm:
            recorder = Recorder(llm)
            assert tokens_of(llm.generate(batch, GREEDY, use_tqdm=False)) == tokens_of(alone)
            assert_same_bits(recorder.logits, expected)


def test_the_reference_kernels_give_the_same_greedy_tokens(
    servable: Callable[[str], ServableCheckpoint],
) -> None:
    checkpoint = servable("llama")
    batch = prompts(8, seed=4)
    with make_llm(checkpoint) as native, make_llm(checkpoint, kernels="reference") as reference:
        assert tokens_of(native.generate(batch, GREEDY, use_tqdm=False)) == tokens_of(
            reference.generate(batch, GREEDY, use_tqdm=False)
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_real_widths_and_two_threads_change_nothing(dtype: str, tmp_path: Path) -> None:
    """The sizes at which matrix libraries switch algorithms, with dummy weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": 4000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2,
        "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": dtype, "eos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tokenizer(tmp_path)
    batch = prompts(12, longest=150, seed=8)
    params = GREEDY.replace(max_tokens=6)
    options: dict[str, Any] = {**BASE, "load_format": "dummy"}
    with LLM(str(tmp_path), **options, cpu_threads=1) as llm:
        recorder = Recorder(llm)
        for prompt in batch:
            llm.generate(prompt, params, use_tqdm=False)
        expected = recorder.logits
    for threads, budget in ((2, 2048), (2, 50), (1, 2048)):
        changed = {**options, "max_num_batched_tokens": budget, "cpu_threads": threads}
        with LLM(str(tmp_path), **changed) as llm:
            recorder = Recorder(llm)
            llm.generate(batch, params, use_tqdm=False)
            assert_same_bits(recorder.logits, expected)
