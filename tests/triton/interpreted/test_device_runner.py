"""The runner for accelerators as the engine drives it, its device played by the CPU and its kernels
interpreted: the same tokens as the CPU's engine, whatever is overlapped, padded, recorded or preempted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from quire.attention.base import KVCache
from quire.engine.core import EngineCore
from quire.executor.base import Executor
from quire.executor.device import DeviceExecutor
from quire.executor.inline import InlineExecutor
from quire.kernels.base import create_kernels
from quire.kernels.triton.backend import TritonKernels
from quire.kvcache import KVCacheManager
from quire.messages import AddRequest, RequestUpdate
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.runner.device import HostDevice
from quire.runner.device_runner import DeviceRunner, graph_sizes
from quire.runner.model_runner import ModelRunner
from quire.sampling_params import SamplingParams
from quire.scheduler import Scheduler, SchedulerLimits
from tests.models.variants import build_reference, save

MAX_LEN = 48
BLOCK_SIZE = 16
SEQS = 3
BUDGET = 24
NUM_BLOCKS = 5  # not enough for all who run at once: some are preempted
Result = TypeVar("Result")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build_reference(
        "qwen3", hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1
    )
    return save(model, tmp_path_factory.mktemp("tiny"))


class RecordingDevice(HostDevice):
    """As a graph does: the memory of the recording stays, and what the step reads is in it."""

    def __init__(self) -> None:
        self.recordings = 0
        self.replays = 0

    def record(self, work: Callable[[], Result]) -> Callable[[], Result]:
        self.recordings += 1

        def replay() -> Result:
            self.replays += 1
            return work()

        return replay


@dataclass
class Outcome:
    tokens: dict[int, list[int]] = field(default_factory=dict)
    updates: list[RequestUpdate] = field(default_factory=list)


def model_of(checkpoint: Path, kernels: object) -> object:
    spec = resolve_spec(json.loads((checkpoint / "config.json").read_text()))
    return load_model(
        spec,
        checkpoint,
        dtype=torch.float32,
        kernels=kernels,
        max_model_len=MAX_LEN,  # type: ignore[arg-type]
    )


def cache_of(model: object, kernels: object) -> KVCache:
    spec = model.spec  # type: ignore[attr-defined]
    cache = KVCache(
        num_layers=spec.num_layers,
        num_blocks=NUM_BLOCKS,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=BLOCK_SIZE,
        dtype=torch.float32,
        kernels=kernels,  # type: ignore[arg-type]
    )
    cache.storage.fill_(float("nan"))  # who reads what nobody wrote is found out
    return cache


def on_cpu(checkpoint: Path) -> Executor:
    kernels = create_kernels()
    model = model_of(checkpoint, kernels)
    return InlineExecutor(
        ModelRunner(
            model,  # type: ignore[arg-type]
            cache_of(model, kernels),
            kernels,
            max_num_seqs=SEQS,
            max_model_len=MAX_LEN,
        )
    )


def on_device(checkpoint: Path, *, overlap: bool, eager: bool = False) -> DeviceExecutor:
    kernels = TritonKernels(torch.device("cpu"))
    model = model_of(checkpoint, kernels)
    runner = DeviceRunner(
        model,  # type: ignore[arg-type]
        cache_of(model, kernels),
        kernels,
        RecordingDevice(),
        max_num_seqs=SEQS,
        max_num_batched_tokens=BUDGET,
        max_model_len=MAX_LEN,
        eager=eager,
    )
    return DeviceExecutor(runner, overlap=overlap)


def run(executor: Executor, requests: list[AddRequest]) -> Outcome:
    """All requests to their ends; the second half arrives when the first is under way."""
    limits = SchedulerLimits(
        max_num_seqs=SEQS, max_num_batched_tokens=BUDGET, max_model_len=MAX_LEN
    )
    kv = KVCacheManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=True)
    core = EngineCore(Scheduler(limits, kv), executor, clock=lambda: 0.0)
    outcome = Outcome()
    early = -(-len(requests) // 2)
    late = requests[early:]
    for request in requests[:early]:
        core.handle(request)
    for step in range(400):
        if step == 3:
            for request in late:
                core.handle(request)
        if step > 3 and not core.has_work:
            break
        for update in core.step().updates:
            outcome.tokens.setdefault(update.request_id, []).extend(update.new_token_ids)
            outcome.updates.append(update)
        core.scheduler.check_invariants()
    assert not core.has_work
    return outcome


def request(
    request_id: int, prompt: range, params: SamplingParams, *, eos: tuple[int, ...] = ()
) -> AddRequest:
    return AddRequest(
        request_id=request_id,
        prompt_token_ids=[3 + i % 190 for i in prompt],
        params=params,
        seed=100 + request_id,
        max_tokens=params.max_tokens or 1,
        eos_token_ids=list(eos),
    )


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


REQUESTS = [
    request(1, range(30), greedy(8)),  # in two chunks
    request(2, range(50, 63), greedy(8)),
    request(3, range(33), greedy(4)),  # finds the first one's first block
]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Outcome:
    return run(on_cpu(checkpoint), REQUESTS)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_tokens_are_those_of_the_cpu(checkpoint: Path, expected: Outcome, overlap: bool) -> None:
    executor = on_device(checkpoint, overlap=overlap)
    outcome = run(executor, REQUESTS)
    assert outcome.tokens == expected.tokens
    assert {k: len(v) for k, v in outcome.tokens.items()} == {1: 8, 2: 8, 3: 4}
    assert executor.runner is not None
    device = executor.runner._device
    assert isinstance(device, RecordingDevice)
    assert device.replays > 2
    preempted = [update.num_preemptions for update in outcome.updates if update.finish_reason]
    assert any(preempted), "the pool is too large to prove anything"


def test_eager_is_the_same(checkpoint: Path, expected: Outcome) -> None:
    executor = on_device(checkpoint, overlap=True, eager=True)
    assert run(executor, REQUESTS[1:2]).tokens == {2: expected.tokens[2]}
    assert executor.runner is not None and not executor.runner._recorded


def test_sampling_penalties_logprobs_and_ends(checkpoint: Path) -> None:
    kinds = [
        SamplingParams(temperature=0.9, top_p=0.8, top_k=20, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=1.3, max_tokens=4, logprobs=2, ignore_eos=True),
        SamplingParams(
            temperature=0.0,
            repetition_penalty=1.4,
            presence_penalty=0.6,
            frequency_penalty=0.3,
            max_tokens=5,
            ignore_eos=True,
        ),
        SamplingParams(temperature=0.0, max_tokens=8, min_tokens=3, logprobs=-1),
    ]
    every_token = tuple(
        range(0, 199, 2)
    )  # so that a request ends early, in a step already overlapped
    requests = [
        request(i, range(20 * i, 20 * i + 9), params, eos=every_token if params.min_tokens else ())
        for i, params in enumerate(kinds)
    ]
    theirs = run(on_cpu(checkpoint), requests)
    ours = run(on_device(checkpoint, overlap=True), requests)
    assert ours.tokens == theirs.tokens
    assert len(ours.tokens[3]) < 8

    def logprobs(outcome: Outcome) -> list[tuple[int, list[int], int, torch.Tensor]]:
        return [
            (entry.token_id, entry.top_ids, entry.rank, torch.tensor(entry.top_logprobs))
            for request_id in (1, 3)
            for update in outcome.updates
            if update.request_id == request_id
            for entry in update.logprobs or ()
        ]

    pairs = list(zip(logprobs(ours), logprobs(theirs), strict=True))
    assert len(pairs) == len(ours.tokens[1]) + len(ours.tokens[3])
    for mine, other in pairs:
        assert mine[0] == other[0] and mine[2] == other[2] and mine[1][:2] == other[1][:2]
        torch.testing.assert_close(mine[3], other[3], atol=1e-4, rtol=1e-4)


def test_graph_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(1000)[-1] == 256 and graph_sizes(100)[-1] == 100
