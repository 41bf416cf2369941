"""`quire chat` and `quire generate` against a scripted server: what is sent, shown and remembered."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys

import pytest

from quire.cli.chat import Conversation
from quire.cli.main import main
from quire.cli.model_flags import add_model_flags, model_choice
from quire.cli.parser import Parser
from quire.errors import ConfigError

TOO_LONG = json.dumps({"error": {"message": "too long", "param": "input_tokens"}}).encode()
CONTEXT_FULL = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(TOO_LONG) + TOO_LONG


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch):
    """Feed lines to stdin, as a pipe does."""

    def feed(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))

    return feed


def choice_of(*words: str):
    parser = Parser(prog="x", usage="x", description="x")
    add_model_flags(parser)
    return model_choice(parser.parse_strictly(words))


def test_history_and_system_are_sent(scripted_server, say, capsys) -> None:
    scripted_server.answers = [["one", " two"], ["three"]]
    say("first", "second", "/exit", "never asked")
    assert main(["chat", "--url", scripted_server.url, "--system", "be brief"]) == 0
    assert capsys.readouterr().out == "one two\nthree\n"
    system = {"role": "system", "content": "be brief"}
    first = [system, {"role": "user", "content": "first"}]
    assert [request["messages"] for request in scripted_server.requests] == [
        first,
        [
            *first,
            {"role": "assistant", "content": "one two"},
            {"role": "user", "content": "second"},
        ],
    ]
    assert scripted_server.requests[0]["model"] == "scripted"


def test_reset_forgets_and_unknown_commands_explain(scripted_server, say, capsys) -> None:
    scripted_server.answers = [["a"], ["b"]]
    say("first", "/reset", "/what", "", "second")
    assert main(["chat", "--url", scripted_server.url]) == 0
    assert scripted_server.requests[1]["messages"] == [{"role": "user", "content": "second"}]
    assert "/reset begins anew" in capsys.readouterr().out


def test_a_full_context_forgets_the_oldest_exchange(scripted_server, say, capsys) -> None:
    scripted_server.answers = [["a1"], ["a2"], CONTEXT_FULL, ["a3"]]
    say("q1", "q2", "q3")
    assert main(["chat", "--url", scripted_server.url]) == 0
    assert [m["content"] for m in scripted_server.requests[-1]["messages"]] == ["q2", "a2", "q3"]
    assert "forgot the oldest" in capsys.readouterr().err


def test_a_question_too_long_by_itself_is_told_and_the_chat_goes_on(
    scripted_server, say, capsys
) -> None:
    scripted_server.answers = [CONTEXT_FULL, ["fine"]]
    say("much too long", "short")
    assert main(["chat", "--url", scripted_server.url]) == 0
    output = capsys.readouterr()
    assert "error: too long" in output.err
    assert output.out == "fine\n"
    assert len(scripted_server.requests[-1]["messages"]) == 1


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(
    scripted_server, say, capsys
) -> None:
    scripted_server.answers = [["\x1b]0;owned\x07 line\nnext"]]
    say("q")
    main(["chat", "--url", scripted_server.url])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "line\nnext" in out


def test_generate_streams_a_chat_answer(scripted_server, capsys) -> None:
    scripted_server.answers = [["to", "kens"]]
    words = [
        "generate",
        "hi there",
        "--url",
        scripted_server.url,
        "--temperature",
        "0",
        "--stop",
        "x",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out == "tokens\n"
    [request] = scripted_server.requests
    assert request["messages"] == [{"role": "user", "content": "hi there"}]
    assert (request["temperature"], request["stop"], request["stream"]) == (0.0, ["x"], True)


def test_generate_raw_sends_the_text_alone(scripted_server, capsys) -> None:
    scripted_server.answers = [["abc"]]
    assert (
        main(["generate", "once", "--raw", "--url", scripted_server.url, "--max-tokens", "5"]) == 0
    )
    [request] = scripted_server.requests
    assert (request["prompt"], request["max_tokens"]) == ("once", 5)
    assert "messages" not in request
    assert capsys.readouterr().out == "abc\n"


def test_generate_reads_a_pipe(scripted_server, say) -> None:
    scripted_server.answers = [["ok"]]
    say("from a file")
    assert main(["generate", "--url", scripted_server.url]) == 0
    assert scripted_server.requests[0]["messages"][0]["content"] == "from a file\n"


def test_engine_flags_make_no_sense_with_url() -> None:
    with pytest.raises(ConfigError, match="remove max_model_len"):
        choice_of("--url", "http://x", "--max-model-len", "4k")


def test_seed_goes_to_sampling_and_to_dummy_weights() -> None:
    choice = choice_of("--seed", "7")
    assert choice.sampling == {"seed": 7}
    assert choice.engine.model.seed == 7


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")
    assert choice_of().api_key == "sk-env"
    assert choice_of("--api-key", "sk-flag").api_key == "sk-flag"


def test_no_server_is_one_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--url", "http://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("quire: error: no server answers at http://127.0.0.1:9")
    assert error.count("\n") == 1


def test_raw_and_system_exclude_each_other() -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["generate", "x", "--raw", "--system", "y"])
    assert exit_.value.code == 2


def test_quick_is_one_exchange_and_says_whether_it_worked(scripted_server, capsys) -> None:
    """With vLLM's own flags, and its address that ends in /v1."""
    words = ["--url", scripted_server.url + "/v1", "--model-name", "theirs", "-q", "hi"]
    scripted_server.answers = [["hello"], CONTEXT_FULL]
    assert main(["chat", "--system-prompt", "be brief", *words]) == 0
    assert capsys.readouterr().out == "hello\n"
    [request] = scripted_server.requests
    assert request["model"] == "theirs"
    assert [m["content"] for m in request["messages"]] == ["be brief", "hi"]
    assert main(["chat", *words]) == 1
    assert "error: too long" in capsys.readouterr().err


def test_complete_sends_lines_as_they_are(scripted_server, say, capsys) -> None:
    scripted_server.answers = [["bin"], ["\n  x", " = 1"], CONTEXT_FULL, ["end"]]
    say("/usr/", "def f(): ", "", "too long", "go", "/exit", "never asked")
    assert main(["complete", "--url", scripted_server.url, "--max-tokens", "9"]) == 0
    output = capsys.readouterr()
    assert output.out == "bin\n\n  x = 1\nend\n"
    assert "error: too long" in output.err
    asked = [(r["prompt"], r["max_tokens"], r["stream"]) for r in scripted_server.requests]
    prompts = ("/usr/", "def f(): ", "too long", "go")
    assert asked == [(prompt, 9, True) for prompt in prompts]


def test_complete_quickly(scripted_server, capsys) -> None:
    scripted_server.answers = [["b"]]
    assert main(["complete", "-q", "a", "--url", scripted_server.url]) == 0
    assert capsys.readouterr().out == "b\n"
    assert scripted_server.requests[0]["max_tokens"] == 256


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_ctrl_c_stops_an_answer_and_nothing_else(command, say, capsys, monkeypatch) -> None:
    from quire.cli import talk

    class Slow(talk.RemoteModel):
        async def _stream(self, path, request):
            said = request.get("prompt") or request["messages"][-1]["content"]
            yield {"delta": {"content": said}, "text": said}
            if said == "first":
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(60)

    monkeypatch.setattr(talk, "RemoteModel", Slow)
    say("first", "second")
    assert main([command, "--url", "http://x", "--model", "m"]) == 0
    assert "first" in (out := capsys.readouterr().out)
    assert "(stopped)" in out and out.endswith("second\n")


def test_forgetting_nothing() -> None:
    assert Conversation().forget_oldest() is False


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_at_an_empty_prompt_leaves_only_the_second_time(
    scripted_server, capsys, monkeypatch, presses: int
) -> None:
    """The first was probably meant for an answer that had just ended."""
    typed = iter([*[KeyboardInterrupt] * presses, "hello", EOFError])

    def type_next(prompt: str) -> str:
        word = next(typed)
        if isinstance(word, str):
            return word
        raise word

    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    scripted_server.answers = [["a"]]
    assert main(["chat", "--url", scripted_server.url]) == (0 if presses == 1 else 130)
    out = capsys.readouterr().out
    assert out.count("(Ctrl-C again leaves)") == 1
    assert ("\na\n" in out) == (presses == 1)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["complete", "os.path.join is a"], "'os.path.join is a' is no model; to say it, put -q"),
        (["chat", "what is a block?"], "'what is a block?' is no model; to say it, put -q"),
        (["generate", ""], "give a prompt: quire generate"),
        (["generate"], "give a prompt: quire generate"),
    ],
)
def test_a_prompt_in_the_wrong_place_or_none(words, complaint, say, capsys) -> None:
    say()
    assert main(words) == 2
    assert complaint in capsys.readouterr().err
