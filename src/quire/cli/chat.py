"""`quire chat`: a conversation in the terminal, with a model here or with a running server."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field

from quire.cli.model_flags import ModelChoice, add_model_flags, model_choice
from quire.cli.parser import Parser
from quire.cli.talk import ContextFullError, LocalModel, RemoteModel, Speaker
from quire.errors import EngineDeadError, QuireError
from quire.util.terminal import printable

HELP = "/reset begins anew, /exit leaves (so does Ctrl-D); Ctrl-C stops an answer."


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire chat",
        usage="quire chat [MODEL] [flags]",
        description=f"Talk with a model. In the conversation: {HELP}",
    )
    parser.add_argument("model_positional", metavar="MODEL", nargs="?")
    parser.add_argument("--system", metavar="TEXT", help="system message, before everything else")
    add_model_flags(parser)
    args = parser.parse_strictly(argv)
    choice = model_choice(args, model=args.model_positional)
    with asyncio.Runner() as runner:
        speaker = runner.run(_speaker(choice))
        try:
            _converse(runner, speaker, Conversation(args.system), choice.sampling)
        finally:
            runner.run(speaker.close())
    return 0


async def _speaker(choice: ModelChoice) -> Speaker:
    if choice.url is not None:
        return await RemoteModel.connect(choice.url, model=choice.model, api_key=choice.api_key)
    return await LocalModel.start(choice.engine)


@dataclass(slots=True)
class Conversation:
    """What was said. Answers that failed or were stopped before a word leave no trace."""

    system: str | None = None
    exchanges: list[tuple[str, str]] = field(default_factory=list)
    """(user, assistant), oldest first."""

    def messages(self, question: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        said = [
            {"role": role, "content": text}
            for exchange in self.exchanges
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        ]
        return [*system, *said, {"role": "user", "content": question}]

    def forget_oldest(self) -> bool:
        """Make room. False when there is nothing left to forget."""
        return bool(self.exchanges) and self.exchanges.pop(0) is not None


def _converse(
    runner: asyncio.Runner,
    speaker: Speaker,
    conversation: Conversation,
    sampling: dict[str, object],
) -> None:
    """Read, answer, repeat. The engine outlives a stopped answer and a refused question."""
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
        _edit_lines()
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except EOFError:
            return
        if question in ("/exit", "/quit"):
            return
        if question == "/reset":
            conversation.exchanges.clear()
        elif question.startswith("/"):
            print(HELP)
        elif question:
            try:
                runner.run(_answer(speaker, conversation, question, sampling))
            except KeyboardInterrupt:
                print(" (stopped)")
            except EngineDeadError:
                raise
            except QuireError as error:
                print(f"error: {printable(str(error))}", file=sys.stderr)


async def _answer(
    speaker: Speaker, conversation: Conversation, question: str, sampling: dict[str, object]
) -> None:
    """Print the answer as it comes and remember it, forgetting old exchanges where they do not fit."""
    said: list[str] = []
    while True:
        try:
            async for text in speaker.chat(conversation.messages(question), sampling):
                said.append(text)
                print(printable(text, keep_newlines=True), end="", flush=True)
            break
        except ContextFullError:
            if said or not conversation.forget_oldest():
                raise
            print("(the context is full: forgot the oldest exchange)", file=sys.stderr)
        finally:
            if said:
                conversation.exchanges.append((question, "".join(said)))
                print()


def _edit_lines() -> None:
    """Arrow keys and history in `input()`, where this Python has them."""
    try:
        import readline  # noqa: F401 - importing it is what changes input()
    except ImportError:
        return
