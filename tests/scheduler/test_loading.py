"""When a request starts a load, how often, and how long it waits."""

from __future__ import annotations

from quire.prefix_report import MissReason
from quire.scheduler import WaitReason
from tests.scheduler.fake_executor import expected_output
from tests.scheduler.test_transfers import PROMPT, Engine


def test_nothing_is_loaded_for_a_request_that_waits_by_cost() -> None:
    engine = Engine(num_blocks=1 + 20, saves="used")
    engine.step_seconds = 0.01
    engine.serve(1, PROMPT)
    engine.forget()
    engine.scheduler.worth.least_steps = 4.0
    engine.scheduler.worth.resume_seconds = lambda num_tokens: 1e6
    for request_id in (2, 3):
        engine.add(request_id, [50 + request_id] * 8, max_tokens=30)
    for _ in range(8):
        engine.step()
    engine.add(4, PROMPT)
    engine.step()
    assert engine.waits(4) is WaitReason.COST and not engine.loads()
    engine.run()
    assert len(engine.loads()) == 1 and engine.starts(4)[0] == 20
    assert engine.tokens[4] == expected_output(PROMPT, 0, 2)


def test_a_request_that_has_waited_for_a_load_is_not_kept_waiting_by_cost() -> None:
    engine = Engine(num_blocks=1 + 20, saves="used", late=3)
    engine.serve(1, PROMPT)
    engine.forget()
    engine.scheduler.worth.least_steps = 4.0
    for request_id in (2, 3):
        engine.add(request_id, [50 + request_id] * 8, max_tokens=30)
    for _ in range(8):
        engine.step()
    engine.delay_next_load()
    engine.add(4, PROMPT)
    engine.step()
    assert engine.waits(4) is WaitReason.LOAD
    engine.scheduler.worth.resume_seconds = lambda num_tokens: 1e6
    for _ in range(4):
        engine.step()
    assert engine.starts(4) == [20, 21] or engine.starts(4) == [20]
    engine.run()


def test_what_is_evicted_before_there_is_a_seat_is_loaded_once_more() -> None:
    engine = Engine(num_blocks=1 + 22, saves="used", late=3)
    engine.serve(1, PROMPT)
    engine.forget()
    engine.delay_next_load()
    engine.add(2, [50] * 6, max_tokens=30)
    engine.add(4, PROMPT)
    engine.step()
    for request_id in (5, 6, 7):  # they take the seats, and leave the blocks
        engine.add(request_id, [50 + request_id] * 3, max_tokens=2 + 3 * request_id - 10)
    for _ in range(4):
        engine.step()
    assert engine.waits(4) is WaitReason.SEAT and len(engine.loads()) == 1
    engine.forget()
    engine.run()
    assert len(engine.loads()) == 2 and engine.starts(4)[0] == 20
    assert engine.tokens[4] == expected_output(PROMPT, 0, 2)


def test_a_request_loads_twice_at_most() -> None:
    engine = Engine(num_blocks=1 + 22, saves="used")
    engine.serve(1, PROMPT)
    engine.forget()
    engine.add(4, PROMPT)
    steps = 0
    while not engine.starts(4) and steps < 20:
        steps += 1
        engine.step()
        engine.forget()  # as soon as it is loaded
    assert len(engine.loads()) == 2 and engine.starts(4)[0] == 0
    engine.run()


def test_it_waits_for_another_requests_load_no_longer_than_it_would_compute() -> None:
    engine = Engine(num_blocks=60, saves="used", late=12)
    engine.step_seconds = 2.2
    engine.serve(1, PROMPT)
    engine.forget()
    engine.delay_next_load()
    engine.add(9, [50], max_tokens=30)
    engine.add(2, PROMPT)
    engine.add(3, [*PROMPT[:9], 70])
    engine.step()
    assert [engine.waits(r) for r in (2, 3)] == [WaitReason.LOAD] * 2
    engine.step()
    assert engine.starts(3)[:1] == [0], "two blocks are computed in 0.8 s"
    assert engine.waits(2) is WaitReason.LOAD
    engine.run()
    assert engine.firsts[3].prefix.reason is MissReason.LOAD_LATE
    assert engine.starts(2)[0] == 20 and engine.tokens[2] == expected_output(PROMPT, 0, 2)


def test_a_preempted_request_does_not_end_if_its_load_fails() -> None:
    engine = Engine(num_blocks=1 + 12, saves="all", fails_with_loads=True)
    engine.executor.drops = 2
    engine.add(2, [50] * 22, max_tokens=16)
    engine.add(3, [51] * 14, max_tokens=16)
    engine.executor.failing = True
    while not engine.loads():
        engine.step()
        engine.scheduler.loading.transfers._next_id = 3
    assert engine.scheduler.requests[3].num_preemptions
    engine.run()
    assert engine.tokens[3] == expected_output([51] * 14, 0, 16) and not engine.ends[3].error
