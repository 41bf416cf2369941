"""W6 of the comparison: its requests, its measures, and a replay."""

from __future__ import annotations

import asyncio

import pytest
from bench.peers import agents
from bench.peers.client import Reply
from bench.peers.servers import Server
from bench.peers.workloads import MODELS, NUM_SPECIAL_TOKENS, WARM_UP
from tests.bench.conftest import in_thread

from quire.bench.agents import schedule
from quire.bench.null_server import NullOptions, serve_null

VOCAB = 32000
SERVER = Server(["null"], session_field="slot")


def test_every_session_fits_and_all_fit_at_once() -> None:
    sessions = schedule(agents.FULL, seed=0)
    last = agents.FULL.turns - 1
    for model in MODELS.values():
        room = agents.with_room(model)
        lengths = [s.prompt_len(last) + s.turns[last].output_len for s in sessions]
        assert max(lengths) <= room.max_model_len == room.slot_tokens
        assert len(sessions) * room.max_model_len <= room.kv_cache_tokens
        assert room.server_slots == len(sessions)


def test_requests_are_new_at_each_repeat_and_the_same_for_every_server() -> None:
    session = schedule(agents.SMOKE, seed=0)[1]
    bodies = [agents.body(SERVER, session, 1, VOCAB, repeat) for repeat in (WARM_UP, 0, 0, 1)]
    assert bodies[1] == bodies[2]
    assert len({tuple(body["prompt"][:16]) for body in bodies}) == 3  # type: ignore[index]
    prompt = bodies[1]["prompt"]
    assert isinstance(prompt, list) and len(prompt) == session.prompt_len(1)
    assert min(prompt) >= NUM_SPECIAL_TOKENS and max(prompt) < VOCAB
    assert (bodies[1]["max_tokens"], bodies[1]["slot"]) == (session.turns[1].output_len, 1)
    assert "slot" not in agents.body(Server(["null"]), session, 1, VOCAB, 0)


def test_a_session_keeps_its_prefix_and_shares_the_system_prompt() -> None:
    first, second = schedule(agents.SMOKE, seed=0)
    prompts = [agents.prompt_ids(first, turn, VOCAB, 0) for turn in range(2)]
    shared = first.shared_len(1)
    assert prompts[1][:shared] == prompts[0][:shared]
    other = agents.prompt_ids(second, 0, VOCAB, 0)
    system = agents.SMOKE.system_len
    assert other[:system] == prompts[0][:system] and other[system:] != prompts[0][system:]


def test_measures() -> None:
    """Seconds per token from when a turn was due: 0.1, 0.05 and 0.06."""
    turns = [
        agents.TurnTimes(0.0, Reply(0.1, [0.3, 1.0], num_tokens=10, prompt_tokens=100)),
        agents.TurnTimes(1.0, Reply(1.0, [1.1, 1.2], 4, prompt_tokens=100, cached_tokens=50)),
        agents.TurnTimes(2.0, Reply(2.1, [2.2, 2.6], 10, prompt_tokens=200, cached_tokens=150)),
    ]
    found = agents.summarize(turns, 2.5)
    assert found.interactivity == pytest.approx(1 / (0.06 + 0.8 * 0.04))
    assert found.ttft_p50 == pytest.approx(200) and found.ttft_p99 == pytest.approx(298)
    assert found.latency_p50 == pytest.approx(600)
    assert found.cached_share == 0.5 and found.seconds == 2.5


def test_a_replay_has_every_turn() -> None:
    with in_thread(lambda ready: serve_null(NullOptions(), on_ready=ready)) as url:
        port = int(url.rpartition(":")[2])
        found = asyncio.run(agents.replay(port, SERVER, VOCAB, 0, agents.SMOKE))
    turns = agents.SMOKE.turns
    assert found.seconds >= (turns - 1) * agents.SMOKE.think_time
    assert 0 < found.ttft_p50 <= found.latency_p50 and found.interactivity > 0


def test_an_answer_of_another_length_fails() -> None:
    options = NullOptions(chunks=3)
    with in_thread(lambda ready: serve_null(options, on_ready=ready)) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(RuntimeError, match="a turn got 3 tokens for"):
            asyncio.run(agents.replay(port, SERVER, VOCAB, 0, agents.SMOKE))
