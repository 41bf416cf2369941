"""The demo's reading of /metrics, its arithmetic and its screen."""

from __future__ import annotations

import io
import json

import pytest

from quire.cli.demo.report import Peaks, Report, Snapshot
from quire.cli.demo.talk import SCRIPT, Dialogue, Turn, script
from quire.cli.demo.view import View
from quire.errors import EngineError

PAGE = """\
# HELP vllm:num_requests_running Requests that run.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
quire:kv_blocks_shared{engine="0",model_name="m"} 7.0
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 200.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e9
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 50.0
vllm:num_preemptions_total{engine="0",model_name="m"} 1.0
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="101",model_name="m"} 1.0
"""


def test_a_metrics_page_is_read() -> None:
    assert Snapshot.parse(PAGE) == Snapshot(
        num_blocks=100,
        blocks_used=25,
        blocks_shared=7,
        running=3,
        prefix_queries=200,
        prefix_hits=50,
        preemptions=1,
    )


@pytest.mark.parametrize("line", PAGE.splitlines()[2:5] + PAGE.splitlines()[7:])
def test_a_missing_metric_is_an_error(line: str) -> None:
    with pytest.raises(EngineError, match="/metrics has no"):
        Snapshot.parse(PAGE.replace(line + "\n", ""))


def dialogues() -> list[Dialogue]:
    made = script(2)
    for dialogue in made:
        for second, question in enumerate(dialogue.questions):
            dialogue.turns.append(
                Turn(
                    question,
                    answer=f"answer {dialogue.number}.{second + 1}",
                    sent=10.0 + second,
                    first=10.1 + second + 0.1 * dialogue.number,
                    done=10.8 + second,
                    finish_reason="stop",
                    prompt_tokens=40,
                    cached_tokens=16,
                    completion_tokens=20,
                )
            )
        dialogue.finished = True
    return made


def report() -> Report:
    return Report.make(
        dialogues(),
        model="m",
        ready_seconds=1.5,
        peaks=Peaks(blocks_used=9, blocks_shared=2, running=2),
        end=Snapshot.parse(PAGE),
    )


def test_the_figures() -> None:
    made = report()
    assert (made.conversations, made.answers, made.generated_tokens) == (2, 4, 80)
    assert made.seconds == pytest.approx(1.8)
    assert made.tokens_per_second == pytest.approx(80 / 1.8, abs=0.1)
    assert (made.ttft_median_ms, made.ttft_max_ms) == (250.0, 300.0)
    assert made.prefix_hit_rate == 0.25
    assert made.requests[0]["tokens_per_second"] == pytest.approx(19 / 0.6, abs=0.1)


def test_json_and_text_hold_the_same_figures() -> None:
    made = report()
    assert json.loads(made.as_json())["prefix_hits"] == 50
    text = made.as_text()
    assert "peak 9 of 100 used, peak 2 shared" in text
    assert "50 of 200 prompt tokens found (25 %)" in text
    assert "median 250 ms, max 300 ms" in text


def test_the_second_question_carries_the_first_answer() -> None:
    [dialogue] = script(1)
    dialogue.turns = [Turn("q1", answer="a1", sent=1, done=2), Turn("q2", sent=2)]
    assert [m["content"] for m in dialogue.messages()[1:]] == ["q1", "a1", "q2"]


def test_the_script_begins_again() -> None:
    made = script(len(SCRIPT) + 1)
    assert made[-1].questions == made[0].questions
    assert [dialogue.number for dialogue in made] == list(range(1, len(SCRIPT) + 2))


def test_a_pipe_gets_each_conversation_once_and_no_escapes() -> None:
    stream = io.StringIO()
    made = dialogues()
    made[1].finished = False
    view = View(made, stream)
    view.draw()
    view.draw()
    assert "conversation 1" in stream.getvalue()
    assert "conversation 2" not in stream.getvalue()
    made[1].finished = True
    view.draw()
    text = stream.getvalue()
    assert text.count("answer 1.1") == text.count("answer 2.2") == 1
    assert "\x1b" not in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_open_conversations_grow() -> None:
    stream = Terminal()
    made = dialogues()
    made[1].finished = False
    made[1].turns[-1].done = 0.0
    made[1].turns[-1].answer = "growing\x1b[2J\nfast"
    view = View(made, stream)
    view.draw()
    first = stream.getvalue()
    assert "growing" in first
    assert "1 streaming" in first
    assert "\x1b" not in first, "the model's own escapes are shown, not sent"
    made[1].finished = True
    view.draw()
    assert stream.getvalue().startswith(first + "\x1b[2F\x1b[J"), "the region is taken back"


def test_lines_fit_the_width() -> None:
    stream = io.StringIO()
    made = dialogues()
    made[0].turns[0].answer = "word " * 100 + "\n\n" + "x" * 300
    View(made, stream).draw()
    assert max(len(line) for line in stream.getvalue().splitlines()) <= 100
