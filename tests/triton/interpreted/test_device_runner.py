"""The runner for accelerators as the engine drives it, its device played by the CPU and its kernels
interpreted: the same tokens as the CPU's engine, whatever is overlapped, padded, recorded or preempted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from quire.config import EngineConfig, from_flat
from quire.engine.core import EngineCore
from quire.executor.base import Executor
from quire.kvcache import KVCacheManager
from quire.messages import AddAdapter, AddRequest, FinishReason, RequestUpdate
from quire.models.registry import resolve_spec
from quire.placement import Placement
from quire.runner.cpu import CPU
from quire.runner.device import CannotRecordError, HostDevice
from quire.runner.footprint import WorkerSpec
from quire.runner.gpu import GPU
from quire.runner.gpu_step import GPUBackend
from quire.runner.graphs import Graphs, StepShape, graph_sizes, mixed_rows, mixed_tokens
from quire.runner.worker import Worker
from quire.scheduler import Scheduler, SchedulerLimits
from quire.scheduler.invariants import check_invariants
from quire.weights.adapter import check_adapter
from tests.models.variants import build_reference, save
from tests.runner.drafting import COUNT, generate, nearly_right
from tests.scheduler.requests import add_request
from tests.triton.keys import Variants
from tests.weights.adapter_writer import write_adapter

MAX_LEN = 48
BLOCK_SIZE = 16
SEQS = 3
BUDGET = 24
# What attention leaves of padding is what the memory held: NumPy warns of sums that overflow.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

SIZES = {"max_num_seqs": SEQS, "max_num_batched_tokens": BUDGET, "block_size": BLOCK_SIZE}
NUM_BLOCKS = 5  # not enough for all who run at once: some are preempted


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build_reference(
        "qwen3", hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1
    )
    return save(model, tmp_path_factory.mktemp("tiny"))


class FaithfulDevice(HostDevice):
    """A GPU in what can go wrong by order. A download reads as late as it may, so that it finds what a later
    step has written there. A replay overwrites the results of all recordings, which share their
    memory, and must launch what was launched when it was recorded: same kernels, grids, numbers and
    shapes, the same memory wherever that outlives the step; a graph would not notice a difference. All of
    it was launched before, so that nothing is compiled while recording. Nor are there copies to or
    from the host. Whatever is launched or copied belongs to the device's own stream.
    """

    def __init__(self) -> None:
        self.recorded: list[list[Tensor]] = []
        """Results of each recording."""
        self.replays = 0
        self.inside = self.only_recording = False
        self.launches: list[str] = []
        """Of the last replay."""
        self.outside: list[str] = []
        """Launches that were no part of a replay."""
        self.lasting: list[Tensor] = []
        self.depth = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1

    def upload(self, target: Tensor, source: Tensor) -> None:
        assert not self.inside and self.depth
        super().upload(target, source)

    def download(self, tensors: Sequence[Tensor]) -> LateDownload:
        assert not self.inside and self.depth
        return LateDownload(tensors)

    def launched(self, name: str, grid: object, arguments: dict[str, Any]) -> None:
        assert self.depth, f"{name} would be launched on the caller's stream"
        launch = f"{name}{grid} { ({k: self._baked(v) for k, v in arguments.items()}) }"
        (self.launches if self.inside else self.outside).append(launch)

    def _baked(self, argument: object) -> object:
        """What a graph keeps of it."""
        if not isinstance(argument, Tensor):
            return argument
        memory = argument.untyped_storage().data_ptr()
        lasts = any(tensor.untyped_storage().data_ptr() == memory for tensor in self.lasting)
        place = argument.data_ptr() if lasts else None
        return (place, argument.dtype, argument.shape, argument.stride())

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]:
        self.only_recording = True
        kept, recorded = self._launch(work)
        self.only_recording = False
        assert set(recorded) <= set(self.outside), "not compiled yet"
        self.recorded.append(tensors_of(kept))

        def replay() -> Any:
            for result in (tensor for results in self.recorded for tensor in results):
                result.fill_(torch.nan if result.is_floating_point() else 1)
            self.replays += 1
            computed, launches = self._launch(work)
            assert launches == recorded
            for result, new in zip(tensors_of(kept), tensors_of(computed), strict=True):
                result.copy_(new)
            return kept

        return replay

    def _launch(self, work: Callable[[], Any]) -> tuple[Any, list[str]]:
        self.launches, self.inside = [], True
        computed = work()
        self.inside = False
        return computed, self.launches


def tensors_of(computed: Any) -> list[Tensor]:
    tokens = [] if computed.tokens is None else [computed.tokens.token_ids, computed.tokens.valid]
    return [computed.hidden, *tokens]


@dataclass
class LateDownload:
    tensors: Sequence[Tensor]

    def wait(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.tensors]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaithfulDevice]:
    device = FaithfulDevice()
    run_kernel = GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **named: Any) -> None:
        values = {**dict(zip(self.arg_names, arguments, strict=False)), **named}
        device.launched(self.fn.__name__, self.grid, values)
        if not device.only_recording:
            run_kernel(self, *arguments, **named)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    yield device
    assert not device.inside


@dataclass
class Outcome:
    tokens: dict[int, list[int]] = field(default_factory=dict)
    updates: list[RequestUpdate] = field(default_factory=list)


def spec_of(checkpoint: Path) -> WorkerSpec:
    return WorkerSpec(
        model=resolve_spec(json.loads((checkpoint / "config.json").read_text())),
        directory=checkpoint,
        dtype="float32",
        kv_cache_dtype="float32",
        device="cpu",
        max_model_len=MAX_LEN,
    )


def opened(config: EngineConfig, spec: WorkerSpec, platform: CPU | GPU) -> Worker:
    worker = Worker(config, spec, platform=platform)
    worker.load()
    worker.open_cache(NUM_BLOCKS * len(spec.model.kv.groups), MAX_LEN)
    # Who reads what nobody wrote is found out.
    worker.runner.kv_cache.storage.fill_(float("nan"))  # type: ignore[union-attr]
    return worker


def on_cpu(checkpoint: Path, **options: Any) -> Executor:
    config = from_flat({**SIZES, **options})
    return opened(config, spec_of(checkpoint), CPU(config, spec_of(checkpoint)))


def on_device(
    checkpoint: Path,
    device: FaithfulDevice,
    *,
    overlap: bool = True,
    eager: bool = False,
    seqs: int = SEQS,
    **options: Any,
) -> Worker:
    config = from_flat(
        {
            **SIZES,
            "async_scheduling": overlap,
            "enforce_eager": eager,
            "max_num_seqs": seqs,
            **options,
        }
    )
    gpu = GPU(config, spec_of(checkpoint), device)
    worker = opened(config, spec_of(checkpoint), gpu)
    backend = backend_of(worker)
    batch = backend._batch
    device.lasting = [
        *(worker.runner.kv_cache.storage, gpu.kernels._workspace, batch.packed, batch.token_ids),
        *(batch.input_ids, batch.positions, batch.slot_mapping, batch.block_table),
        *(batch.seat_blocks, backend._sampling._table),
    ]
    if worker.adapters is not None:
        device.lasting += [backend._slots, *worker.adapters.packed.tensors()]  # type: ignore[attr-defined]
    return worker


def backend_of(worker: Worker) -> GPUBackend:
    assert worker.runner is not None and isinstance(worker.runner.backend, GPUBackend)
    return worker.runner.backend


def core_of(
    executor: Executor, windows: Sequence[int | None] = (None,), adapters: int = 0
) -> EngineCore:
    limits = SchedulerLimits(
        max_num_seqs=SEQS,
        max_num_batched_tokens=BUDGET,
        max_model_len=MAX_LEN,
        max_adapters=adapters,
    )
    kv = KVCacheManager(
        NUM_BLOCKS * len(windows), BLOCK_SIZE, enable_prefix_caching=True, windows=windows,
        max_row_tokens=BUDGET,
    )  # fmt: skip
    return EngineCore(Scheduler(limits, kv), executor, max_adapters=2 * adapters, clock=lambda: 0.0)


def run(
    executor: Executor, requests: list[AddRequest], *, core: EngineCore | None = None
) -> Outcome:
    """All requests to their ends; the second half arrives when the first is under way."""
    core = core or core_of(executor)
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
        check_invariants(core.scheduler)
    assert not core.has_work
    return outcome


def request(request_id: int, prompt: range, max_tokens: int, **decoding: Any) -> AddRequest:
    return add_request(
        request_id,
        [3 + i % 190 for i in prompt],
        max_tokens=max_tokens,
        seed=100 + request_id,
        **decoding,
    )


REQUESTS = [
    request(1, range(30), 8),  # in two chunks
    request(2, range(50, 63), 8),
    request(3, range(33), 4),  # finds the first one's first block
]

SHORT = request(2, range(50, 63), 4)  # the second one, cut off


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Outcome:
    return run(on_cpu(checkpoint), REQUESTS)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_tokens_are_those_of_the_cpu(
    checkpoint: Path, expected: Outcome, device: FaithfulDevice, overlap: bool
) -> None:
    executor = on_device(checkpoint, device, overlap=overlap)
    if not overlap:
        assert run(executor, [SHORT]).tokens == {2: expected.tokens[2][:4]}
        return
    outcome = run(executor, REQUESTS)
    assert outcome.tokens == expected.tokens
    assert {k: len(v) for k, v in outcome.tokens.items()} == {1: 8, 2: 8, 3: 4}
    recorded = [shape.most_tokens for shape in backend_of(executor).graphs.recorded]
    assert min(recorded) == 1 and max(recorded) > 1, "no mixed steps, or no decoding"
    assert device.replays > 2 * len(recorded)
    preempted = [update.num_preemptions for update in outcome.updates if update.finish_reason]
    assert any(preempted), "the pool is too large to prove anything"


def test_eager_is_the_same(checkpoint: Path, expected: Outcome, device: FaithfulDevice) -> None:
    executor = on_device(checkpoint, device, eager=True)
    assert run(executor, [SHORT]).tokens == {2: expected.tokens[2][:4]}
    assert not executor.prepare() and not device.recorded
    executor.close()
    assert not executor.prepare()


def test_recording_when_idle(checkpoint: Path, expected: Outcome, device: FaithfulDevice) -> None:
    """It disturbs nothing that later steps read, and afterwards no decoding step is launched by parts."""
    executor = on_device(checkpoint, device)
    core = core_of(executor)
    runner, backend = executor.runner, backend_of(executor)
    batch, graphs = backend._batch, backend.graphs
    assert runner is not None
    assert core.prepare() and not batch.token_ids.any(), "a token of nobody's"
    run(executor, [request(9, range(7, 20), 2)], core=core)
    before = [tensor.clone() for tensor in (batch.token_ids, batch.seat_blocks)]
    cache = runner.kv_cache.storage.clone()
    done = 1
    while core.prepare():
        done += 1
    assert done == len(device.recorded) == len(graphs.recorded)
    assert {shape.rows for shape in graphs.recorded if shape.level == "filter"} == {1, 2, 3}
    assert set(graphs.uses) <= set(graphs.recorded), "those that came, first of all"
    assert torch.equal(cache.view(torch.int32), runner.kv_cache.storage.view(torch.int32))
    after = [batch.token_ids, batch.seat_blocks]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    outside = len(device.outside)
    assert run(executor, [SHORT], core=core).tokens == {2: expected.tokens[2][:4]}
    assert len(device.outside) == outside, "launches outside the graphs"
    replays = device.replays  # no graph has the level "draw", but one with "filter" has
    drawn = request(8, range(9), 3, temperature=0.9)
    assert len(run(executor, [drawn], core=core).tokens[8]) == 3
    assert device.replays == replays + 2 and len(device.recorded) == done


def test_without_memory_for_recordings(
    checkpoint: Path, expected: Outcome, device: FaithfulDevice, caplog: pytest.LogCaptureFixture
) -> None:
    def record(work: object) -> object:
        raise CannotRecordError("3 MiB are free")

    device.record = record  # type: ignore[method-assign, assignment]
    executor = on_device(checkpoint, device)
    assert run(executor, [SHORT]).tokens == {2: expected.tokens[2][:4]}
    assert not executor.prepare() and len(caplog.messages) == 1


def test_logits_that_are_no_numbers(checkpoint: Path, device: FaithfulDevice) -> None:
    executor = on_device(checkpoint, device)
    assert executor.runner is not None
    with torch.inference_mode():
        executor.runner.model._norm.weight.weight.fill_(torch.nan)
    (update,) = run(executor, [request(1, range(3), 2)]).updates
    assert update.finish_reason is FinishReason.ERROR and not update.new_token_ids


def test_sampling_penalties_logprobs_and_ends(checkpoint: Path, device: FaithfulDevice) -> None:
    every_token = frozenset(
        range(0, 199, 2)
    )  # so that a request ends early, in a step already overlapped
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "max_tokens": 4},
        {"temperature": 1.3, "max_tokens": 4, "logprobs": 2},
        {
            "repetition_penalty": 1.4,
            "presence_penalty": 0.6,
            "frequency_penalty": 0.3,
            "max_tokens": 5,
        },
        {"max_tokens": 8, "min_tokens": 3, "logprobs": -1, "end_token_ids": every_token},
    ]
    requests = [request(i, range(20 * i, 20 * i + 9), **kind) for i, kind in enumerate(kinds)]
    theirs = run(on_cpu(checkpoint), requests)
    ours = run(on_device(checkpoint, device), requests)
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


def test_each_group_of_layers_has_its_own_blocks(tmp_path: Path, device: FaithfulDevice) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    model = build_reference("qwen2-windows", num_key_value_heads=1, **sizes)
    folder = save(model, tmp_path)
    windows = spec_of(folder).model.kv.windows
    assert len(windows) == 2 and windows[0] is None
    requests = [request(1, range(30), 7), request(2, range(50, 63), 5)]
    theirs, ours = (
        run(executor, requests, core=core_of(executor, windows)).tokens
        for executor in (on_cpu(folder), on_device(folder, device))
    )
    assert ours == theirs and len(ours[1]) == 7


@pytest.mark.parametrize("eager", [True, False])
def test_drafts_change_no_token(checkpoint: Path, device: FaithfulDevice, eager: bool) -> None:
    """Nor do they need more memory than a step of as many rows: no more is sampled than there may be rows."""
    worker = on_device(checkpoint, device, eager=eager, seqs=8)
    plain = generate(worker)
    drafted = generate(worker, nearly_right(plain))
    for request, mine in plain.items():
        assert drafted[request].tokens == mine.tokens
        assert drafted[request].steps < mine.steps == COUNT
        assert len(drafted[request].logprobs) == len(mine.logprobs)


def test_graph_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(1000)[-4:] == [928, 960, 992, 1000] and graph_sizes(100)[-1] == 100
    assert graph_sizes(256)[-2:] == [240, 256] and graph_sizes(512)[-2:] == [480, 512]
    assert mixed_rows(3) == [3] and mixed_rows(100) == [4, 16, 64, 100]
    assert mixed_rows(256) == [4, 16, 64, 256] and mixed_rows(512) == [4, 16, 64, 256, 512]
    assert mixed_tokens(600_000_000, 8192) == [64, 128, 256, 512, 1024, 2048]
    assert mixed_tokens(8_000_000_000, 8192) == [64, 128, 256]
    assert mixed_tokens(1_000_000, 100) == [64, 100]
    assert mixed_tokens(70_000_000_000, 8192) == []


def test_adapters(
    checkpoint: Path, device: FaithfulDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three adapters at a time, in graphs, beside requests without one: the tokens of the CPU. No
    kernel is launched in a variant that was not launched at the start."""
    device.compiles, variants = True, Variants(monkeypatch)
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    spec = spec_of(checkpoint).model
    keys, messages = [], []
    for index in range(3):
        path = write_adapter(tmp_path / str(index), spec, ["_proj"], seed=index, rank=5 + index)
        keys.append(check_adapter(path, spec, max_rank=8).key(f"a{index}"))
        messages.append(AddAdapter(key=keys[-1], path=str(path)))
    requests = [
        add_request(
            i, [3 + i % 7] * (9 + i), max_tokens=5, seed=i, placement=Placement(adapter=key)
        )
        for i, key in enumerate([keys[0], None, keys[1], keys[0], keys[2]], 1)
    ]
    outcomes: list[dict[int, list[int]]] = []
    for executor in (on_cpu(checkpoint, **options), on_device(checkpoint, device, **options)):
        core, known = core_of(executor, adapters=2), set(variants.seen)
        for message in messages:
            core.handle(message)
        outcomes.append(run(executor, requests, core=core).tokens)
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) == 5
    assert known and not variants.since(known)
    assert any(shape.adapted for shape in backend_of(executor).graphs.recorded)


class Counted(HostDevice):
    """Returns a number for each graph."""

    recorded = 0

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded += 1
        number = self.recorded
        return lambda: number


def test_under_a_load_a_larger_graph_is_used_before_one_is_captured() -> None:
    device, eager = Counted(), "eager"
    graphs = Graphs(
        device, lambda shape: eager,  # type: ignore[arg-type, return-value]
        max_num_seqs=512, max_num_batched_tokens=8192, num_weights=600_000_000, eager=False,
    )  # fmt: skip

    def decode(rows: int, level: Any = "greedy") -> object:
        return graphs.compute(StepShape(rows, rows, rows, 1, level))

    assert [decode(40) for _ in range(4)] == [eager, eager, 1, 1]
    assert [decode(rows) for rows in (33, 12, 10)] == [1] * 3 and device.recorded == 1
    assert [decode(9) for _ in range(5)] == [1] * 5, "a graph of 40 rows does for 10 and more"
    assert [decode(8) for _ in range(3)] == [eager, eager, 2], "five times the rows are too many"
    assert decode(40, "draw") == eager, "greedy is no superset of it"
    mixed = StepShape(3, 70, 3, 60, "greedy")
    assert [graphs.compute(mixed) for _ in range(3)] == [eager, eager, 3]
    assert graphs.compute(mixed._replace(tokens=40, most_tokens=20)) == 3
    assert graphs.next() is not None, "its own size is still wanted, when there is time"
