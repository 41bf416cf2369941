"""`--batch-invariant` through the whole engine: a request's tokens and the log-probabilities of its whole
vocabulary are the same bits alone and in company, however its prompt was cut, found or computed again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from quire.config import from_flat
from quire.engine.core import EngineCore
from quire.kernels.triton import backend
from quire.kvcache import KVCacheManager
from quire.messages import AddRequest, RequestUpdate, TokenLogprobs
from quire.models.registry import resolve_spec
from quire.runner.device import HostDevice
from quire.runner.footprint import WorkerSpec
from quire.runner.gpu import GPU
from quire.runner.worker import Worker
from quire.scheduler import Scheduler, SchedulerLimits
from tests.models.variants import build_reference, save
from tests.scheduler.requests import add_request

BLOCK_SIZE = 16
MAX_LEN = 64
OUTPUT = 4
Results = dict[int, list[TokenLogprobs]]


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of rows of padding


@pytest.fixture(scope="module", autouse=True)
def uninitialized_is_nan() -> Iterator[None]:
    """So that rows of padding spoil whatever listens to them, and the tests do the same every time."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    model = build_reference("llama-attention-bias", num_attention_heads=2, num_key_value_heads=1)
    folder = save(model, tmp_path_factory.mktemp("tiny"))
    return WorkerSpec(
        model=resolve_spec(json.loads((folder / "config.json").read_text())),
        directory=folder,
        dtype="float32",
        kv_cache_dtype="float32",
        device="cpu",
        max_model_len=MAX_LEN,
    )


@dataclass(frozen=True)
class Schedule:
    """How requests come to be computed. arrival: before which step those after the first come."""

    seqs: int = 5
    budget: int = 64
    blocks: int = 30
    arrival: int = 0
    overlap: bool = True
    eager: bool = False

    def run(
        self, spec: WorkerSpec, requests: Sequence[AddRequest]
    ) -> tuple[Results, dict[int, list[RequestUpdate]]]:
        sizes = {
            "max_num_seqs": self.seqs,
            "max_num_batched_tokens": self.budget,
        }
        config = from_flat({
            **sizes, "block_size": BLOCK_SIZE, "batch_invariant": True,
            "async_scheduling": self.overlap, "enforce_eager": self.eager,
        })  # fmt: skip
        executor = Worker(config, spec, platform=GPU(config, spec, HostDevice()))
        executor.load()
        executor.open_cache(self.blocks, MAX_LEN)
        pool = KVCacheManager(self.blocks, BLOCK_SIZE, enable_prefix_caching=True)
        limits = SchedulerLimits(max_model_len=MAX_LEN, **sizes)
        core = EngineCore(Scheduler(limits, pool), executor, clock=lambda: 0.0)
        updates: dict[int, list[RequestUpdate]] = {}
        waiting = list(requests)
        for step in range(200):
            while waiting and (step >= self.arrival or len(waiting) == len(requests)):
                core.handle(waiting.pop(0))
            for update in core.step().updates:
                updates.setdefault(update.request_id, []).append(update)
            if not waiting and not core.has_work:
                break
        assert not core.has_work
        found = {
            request_id: [entry for update in mine for entry in update.logprobs or ()]
            for request_id, mine in updates.items()
        }
        return found, updates


def request(request_id: int, prompt: range, **decoding: float) -> AddRequest:
    return add_request(
        request_id,
        [3 + 7 * i % 190 for i in prompt],
        seed=100 + request_id,
        max_tokens=OUTPUT,
        **{"logprobs": -1, **decoding},
    )


GREEDY = request(1, range(31), temperature=0.0)
SAMPLED = request(2, range(20, 38), temperature=0.9, top_p=0.9, logprobs=20)
TWIN = request(3, range(31), temperature=1.0)
"""Of GREEDY's prompt."""
OTHERS = [request(4, range(100, 101), temperature=0.0), request(0, range(90, 121), temperature=0.0)]
BATCH = [OTHERS[0], GREEDY, SAMPLED]


@pytest.fixture(scope="module")
def alone(spec: WorkerSpec) -> Results:
    return {r.request_id: Schedule().run(spec, [r])[0][r.request_id] for r in (GREEDY, SAMPLED)}


CASES = {
    "in a batch, padded": (Schedule(), BATCH),
    "in chunks, without overlap and graphs": (
        Schedule(budget=11, overlap=False, eager=True),
        BATCH,
    ),
    "found in the cache, beside a later prompt": (Schedule(arrival=2), [TWIN, GREEDY, SAMPLED]),
    "preempted": (Schedule(blocks=5), [OTHERS[1], GREEDY]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_of_the_request_alone(
    spec: WorkerSpec, alone: Results, name: str
) -> None:
    schedule, requests = CASES[name]
    found, updates = schedule.run(spec, requests)
    for request_id in alone.keys() & found.keys():
        assert len(alone[request_id]) == OUTPUT
        assert found[request_id] == alone[request_id]
    cached = [update.prefix.cached for update in updates[GREEDY.request_id] if update.prefix]
    assert any(cached) == name.startswith("found")
    assert (updates[GREEDY.request_id][-1].num_preemptions > 0) == (name == "preempted")


def test_products_by_pytorch_would_be_seen(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else is as with the switch on."""
    monkeypatch.setattr(backend, "matmul", F.linear)
    (one, _), (batch, _) = (Schedule().run(spec, requests) for requests in ([GREEDY], BATCH))
    assert one[GREEDY.request_id] != batch[GREEDY.request_id]
