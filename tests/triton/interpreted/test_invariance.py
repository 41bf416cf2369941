"""`--batch-invariant` through the whole engine: a request's tokens and the log-probabilities of its whole
vocabulary are the same bits alone and in company, however its prompt was cut, found or computed again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from quire.attention.base import KVCache
from quire.engine.core import EngineCore
from quire.executor.device import DeviceExecutor
from quire.kernels.triton import backend
from quire.kernels.triton.backend import TritonKernels
from quire.kvcache import KVCacheManager
from quire.messages import AddRequest, RequestUpdate, TokenLogprobs
from quire.models.decoder import DecoderModel
from quire.models.loader import load_model
from quire.models.registry import resolve_spec
from quire.runner.device import HostDevice
from quire.runner.device_runner import DeviceRunner
from quire.scheduler import Scheduler, SchedulerLimits
from quire.weights.source import open_source
from tests.models.variants import build_reference, save
from tests.scheduler.requests import add_request

BLOCK_SIZE = 16
MAX_LEN = 64
OUTPUT = 4
Build = Callable[[], tuple[DecoderModel, TritonKernels]]
Results = dict[int, list[TokenLogprobs]]


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of rows of padding


@pytest.fixture(scope="module", autouse=True)
def uninitialized_is_nan() -> Iterator[None]:
    """So that rows of padding spoil whatever listens to them, and the tests do the same every time."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    model = build_reference("llama-attention-bias", num_attention_heads=2, num_key_value_heads=1)
    folder = save(model, tmp_path_factory.mktemp("tiny"))
    return lambda: load(folder)


def load(folder: Path) -> tuple[DecoderModel, TritonKernels]:
    spec = resolve_spec(json.loads((folder / "config.json").read_text()))
    kernels = TritonKernels(torch.device("cpu"), batch_invariant=True)
    options = {"dtype": torch.float32, "kernels": kernels, "max_model_len": MAX_LEN}
    return load_model(spec, open_source(folder), **options), kernels


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
        self, build: Build, requests: Sequence[AddRequest]
    ) -> tuple[Results, dict[int, list[RequestUpdate]]]:
        model, kernels = build()
        sizes = {
            "max_num_seqs": self.seqs,
            "max_num_batched_tokens": self.budget,
            "max_model_len": MAX_LEN,
        }
        spec = model.spec
        cache = KVCache(
            num_layers=spec.num_layers,
            num_blocks=self.blocks,
            num_kv_heads=spec.heads.num_kv_heads,
            head_dim=spec.heads.head_dim,
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            kernels=kernels,
        )
        runner = DeviceRunner(model, cache, kernels, HostDevice(), eager=self.eager, **sizes)
        pool = KVCacheManager(self.blocks, BLOCK_SIZE, enable_prefix_caching=True)
        executor = DeviceExecutor(runner, overlap=self.overlap)
        core = EngineCore(Scheduler(SchedulerLimits(**sizes), pool), executor, clock=lambda: 0.0)
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
def alone(build: Build) -> Results:
    return {r.request_id: Schedule().run(build, [r])[0][r.request_id] for r in (GREEDY, SAMPLED)}


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
def test_the_bits_are_those_of_the_request_alone(build: Build, alone: Results, name: str) -> None:
    schedule, requests = CASES[name]
    found, updates = schedule.run(build, requests)
    for request_id in alone.keys() & found.keys():
        assert len(alone[request_id]) == OUTPUT
        assert found[request_id] == alone[request_id]
    cached = max(update.num_cached_tokens or 0 for update in updates[GREEDY.request_id])
    assert (cached > 0) == name.startswith("found")
    assert (updates[GREEDY.request_id][-1].num_preemptions > 0) == (name == "preempted")


def test_products_by_pytorch_would_be_seen(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """All else is as with the switch on."""
    monkeypatch.setattr(backend, "matmul", F.linear)
    (one, _), (batch, _) = (Schedule().run(build, requests) for requests in ([GREEDY], BATCH))
    assert one[GREEDY.request_id] != batch[GREEDY.request_id]
