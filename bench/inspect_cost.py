"""What it costs an engine core to show its state to the dashboard: the time between two steps that it takes.

    python -m bench.inspect_cost

No model runs. Nine of ten blocks are held, in random order, as after hours of use. Medians of 31 looks.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import msgspec

from quire.decoding import Decoding
from quire.kvcache import KVCacheManager
from quire.kvcache.block_map import block_map
from quire.messages import AddRequest, SampledRow, StepResult
from quire.scheduler import Scheduler, SchedulerLimits
from quire.scheduler.state import scheduler_state

BLOCK_SIZE = 16
SHAPES = (
    (1_000, 64, 64), (16_384, 64, 64), (16_384, 256, 256), (100_000, 64, 64), (100_000, 256, 256),
)  # fmt: skip
"""Blocks, running requests, waiting requests."""


def busy_scheduler(num_blocks: int, running: int, waiting: int) -> Scheduler:
    draw = random.Random(1)
    kv = KVCacheManager(num_blocks + 1, BLOCK_SIZE, enable_prefix_caching=True)
    blocks = kv.pool.allocate(num_blocks)
    draw.shuffle(blocks)
    kv.pool.release(blocks)
    length = num_blocks * BLOCK_SIZE * 9 // 10 // running
    limits = SchedulerLimits(running, max(8192, num_blocks * BLOCK_SIZE), length + 64)
    scheduler = Scheduler(limits, kv)
    for request_id in range(running + waiting):
        prompt = [draw.randrange(1000) for _ in range(length)]
        scheduler.add_request(
            AddRequest(
                request_id=request_id, prompt_token_ids=prompt, decoding=Decoding(max_tokens=32)
            )
        )
    while len(scheduler.running) < running:
        plan = scheduler.schedule()
        sampled = [
            SampledRow(request_id=row.request_id, token_ids=[1]) for row in plan.rows if row.samples
        ]
        scheduler.update(plan, StepResult(step_id=plan.step_id, sampled=sampled))
    return scheduler


def microseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(31):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(times)


def main() -> None:
    for num_blocks, running, waiting in SHAPES:
        scheduler = busy_scheduler(num_blocks, running, waiting)
        state = scheduler_state(scheduler, 0.0)
        encode = msgspec.msgpack.Encoder().encode
        ids = [request.request_id for request in scheduler.running]
        whole = microseconds(lambda: scheduler_state(scheduler, 0.0))  # noqa: B023 (called at once)
        mapped = microseconds(lambda: block_map(scheduler.kv, ids))  # noqa: B023
        encoded = microseconds(lambda: encode(state))  # noqa: B023
        print(
            f"{num_blocks:,} blocks, {running} + {waiting} requests: {whole:,.0f} us, of which the map "
            f"{mapped:,.0f}; to encode {encoded:,.0f} us, {len(encode(state)):,} bytes"
        )


if __name__ == "__main__":
    main()
