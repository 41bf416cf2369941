"""The agents of W6: the schedule, its contents, the figure, and sessions that wait for their answers."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.bench.agents import AgentShape, Piece, Session, Turn, interactivity, schedule
from quire.bench.client import Exchange, HttpPool
from quire.bench.datasets.agents import AgentContents
from quire.bench.load import LoadResult, Script, run_sessions
from quire.bench.null_server import NullOptions, serve_null
from quire.text import Tokenizer
from tests.bench.conftest import in_thread, read_request, rude_server

SMALL = AgentShape(
    sessions=2, turns=4, system_len=300, tool_len=(5, 9), output_len=(3, 6), edit_share=0.4
)
EDITED = Session(
    number=3,
    system_len=100,
    start=0.0,
    turns=(
        Turn(10, 2, None),
        Turn(20, 3, None),
        Turn(30, 4, 1),
        Turn(40, 5, None),
        Turn(50, 6, 0),
    ),
)

# --- the schedule ---------------------------------------------------------------------------------


def test_w6_is_what_the_issue_asks_for() -> None:
    sessions = schedule(AgentShape(), 0)
    assert [len(session.turns) for session in sessions] == [12] * 8
    turns = [turn for session in sessions for turn in session.turns]
    assert all(100 <= turn.tool_len <= 600 and 20 <= turn.output_len <= 120 for turn in turns)
    assert all(session.prompt(0)[0] == Piece("system", "system", 1500) for session in sessions)
    assert all(0 <= session.start <= 1 for session in sessions)
    longest = max(session.prompt_len(11) + session.turns[11].output_len for session in sessions)
    assert 6500 < longest <= 8192


@given(seed=st.integers(0, 2**32), share=st.floats(0, 1), turns=st.integers(1, 9))
def test_the_seed_decides_and_edits_are_of_earlier_turns(
    seed: int, share: float, turns: int
) -> None:
    shape = AgentShape(sessions=3, turns=turns, edit_share=share)
    sessions = schedule(shape, seed)
    assert sessions == schedule(shape, seed) != schedule(shape, seed + 1)
    for session in sessions:
        edits = [
            (at, turn.edits) for at, turn in enumerate(session.turns) if turn.edits is not None
        ]
        assert len(edits) == round(share * (turns - 1))
        assert all(0 <= edited < at for at, edited in edits)


def test_a_prompt_grows_by_an_answer_and_a_tool_result() -> None:
    for session in [*schedule(AgentShape(), 1), EDITED]:
        lengths = [session.prompt_len(turn) for turn in range(len(session.turns))]
        assert lengths[0] == session.system_len + session.turns[0].tool_len
        grown = [late - early for early, late in pairwise(lengths)]
        added = [a.output_len + b.tool_len for a, b in pairwise(session.turns)]
        assert grown == added


def test_an_edit_cuts_the_shared_prefix_at_what_it_replaces() -> None:
    assert [EDITED.shared_len(turn) for turn in range(5)] == [
        0,
        110,  # the whole prompt before
        100 + 10 + 2,  # tool result 1 is replaced
        112 + 20 + 3 + 30,  # the whole prompt before, with its replacement
        100,  # the first tool result is replaced
    ]


def test_a_replaced_message_stays_replaced() -> None:
    def second_tool_result(turn: int) -> str:
        return EDITED.prompt(turn)[3].name

    assert second_tool_result(1) != second_tool_result(2)
    assert second_tool_result(2) == second_tool_result(3) == second_tool_result(4)


def test_sessions_share_the_system_prompt_only() -> None:
    first, second = schedule(SMALL, 0)
    shared = {p.name for p in first.prompt(3)} & {p.name for p in second.prompt(3)}
    assert shared == {"system"}


# --- the figure -----------------------------------------------------------------------------------


def test_interactivity_is_the_slow_tenth() -> None:
    """Seconds per token 0.01, 0.02 ... 0.11: the ninth decile is 0.10."""
    turns = [(0.01 * step * 50, 50) for step in range(1, 12)]
    assert interactivity(turns) == pytest.approx(1 / 0.10)
    assert interactivity(turns[::-1]) == pytest.approx(1 / 0.10)
    assert interactivity([(2.0, 10), (1.0, 10)]) == pytest.approx(1 / 0.19)
    assert interactivity([(3.0, 6)]) == 2.0
    assert interactivity([]) == 0.0


# --- contents -------------------------------------------------------------------------------------


def test_token_ids_have_the_lengths_and_the_shared_prefix_of_the_schedule(
    tokenizer: Tokenizer,
) -> None:
    contents = AgentContents(tokenizer, 5)
    prompts = [contents.token_ids(EDITED, turn) for turn in range(5)]
    assert [len(ids) for ids in prompts] == [EDITED.prompt_len(turn) for turn in range(5)]
    for turn in range(1, 5):
        shared = EDITED.shared_len(turn)
        assert prompts[turn][:shared] == prompts[turn - 1][:shared]
        assert prompts[turn][: shared + 8] != prompts[turn - 1][: shared + 8]
    assert contents.token_ids(EDITED, 4) == prompts[4]
    assert AgentContents(tokenizer, 6).token_ids(EDITED, 0)[:8] != prompts[0][:8]


def test_messages_are_the_schedule_with_the_servers_answers(tokenizer: Tokenizer) -> None:
    session = schedule(SMALL, 0)[1]
    contents = AgentContents(tokenizer, 0)
    messages = contents.messages(session, 2, ["first", "second"])
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    assert [message["role"] for message in messages] == roles
    assert [messages[2]["content"], messages[4]["content"]] == ["first", "second"]
    for piece, message in zip(session.prompt(2), messages, strict=True):
        if piece.role != "answer":
            ids = tokenizer.encode(message["content"], add_special_tokens=False)
            assert len(ids) == piece.num_tokens
    text = contents.text(session, 2, ["first", "second"])
    assert text == "".join(message["content"] for message in messages)


def test_the_system_prompt_has_tool_schemas(tokenizer: Tokenizer) -> None:
    session = schedule(SMALL, 0)[0]
    *schemas, words = AgentContents(tokenizer, 0).messages(session, 0, [])[0]["content"].split("\n")
    tools = [json.loads(schema)["function"] for schema in schemas]
    assert len(tools) > 1 and len({tool["name"] for tool in tools}) == len(tools)
    assert all(tool["parameters"]["required"] for tool in tools)
    assert "{" not in words


# --- sessions -------------------------------------------------------------------------------------


def run(url: str, scripts: list[Script], think_time: float = 0.0) -> LoadResult:
    async def main() -> LoadResult:
        pool = HttpPool(url)
        result = await run_sessions(pool, scripts, think_time=think_time)
        pool.close()
        return result

    return asyncio.run(main())


def script(url: str, seen: list[tuple[int, list[str]]], start: float = 0.0) -> Script:
    def request(turn: int, answers: list[str]) -> bytes:
        seen.append((turn, list(answers)))
        return HttpPool(url).prepare("/v1/completions", b'{"max_tokens":%d}' % (turn + 1))

    return Script(start, 3, request)  # type: ignore[arg-type]


def test_a_turn_is_due_a_think_time_after_the_answer_before_it() -> None:
    options = NullOptions(first=0.02, interval=0.01)
    seen: list[tuple[int, list[str]]] = []
    with in_thread(lambda ready: serve_null(options, on_ready=ready)) as url:
        result = run(url, [script(url, seen), script(url, [], start=0.03)], think_time=0.04)
    turns = list(zip(result.exchanges, result.due, strict=True))
    for session, start in ((turns[:3], 0.0), (turns[3:], 0.03)):
        assert session[0][1] == pytest.approx(result.start + start)
        for (answered, _), (exchange, due) in pairwise(session):
            assert due == pytest.approx(answered.finished + 0.04)
            assert exchange.sent >= due
        assert [exchange.completion_tokens for exchange, _ in session] == [1, 2, 3]
    assert seen == [(0, []), (1, [" null"]), (2, [" null", " null null"])]


def test_a_session_ends_with_its_first_failure_and_every_turn_is_counted() -> None:
    async def busy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 429 No\r\nContent-Length: 4\r\n\r\nbusy")
        await writer.drain()

    done: list[Exchange] = []
    seen: list[tuple[int, list[str]]] = []

    async def main(url: str) -> LoadResult:
        return await run_sessions(
            HttpPool(url), [script(url, seen)], think_time=0.0, on_done=done.append
        )

    with rude_server(busy) as url:
        result = asyncio.run(main(url))
    errors = [exchange.error for exchange in result.exchanges]
    assert errors[0].startswith("HTTP 429") and len(errors) == len(done) == 3
    assert set(errors[1:]) == {"not sent: an earlier turn of the session failed"}
    assert [turn for turn, _ in seen] == [0]
