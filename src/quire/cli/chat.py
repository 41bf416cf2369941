"""`quire chat`: a conversation in the terminal, with a model started here or with a running server."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field

from quire.cli.model_flags import add_model_flags, model_choice, refuse_text_for_model
from quire.cli.parser import Parser
from quire.cli.talk import ContextFullError, Speaker, ask, converse, open_speaker, print_note
from quire.util.terminal import printable

HELP = "/reset begins anew, /exit leaves (so does Ctrl-D); Ctrl-C stops an answer."


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire chat",
        usage="quire chat [MODEL] [flags]",
        description=f"Talk with a model. In the conversation: {HELP}",
    )
    parser.add_argument(
        "model_positional",
        metavar="MODEL",
        nargs="?",
        help="local directory, GGUF file or hub id (default: the built-in model)",
    )
    parser.add_argument(
        "--system", "--system-prompt", metavar="TEXT", help="system message, before everything else"
    )
    parser.add_argument("-q", "--quick", metavar="TEXT", help="say this, print the answer, leave")
    add_model_flags(parser)
    args = parser.parse_strictly(argv)
    refuse_text_for_model(args.model_positional)
    choice = model_choice(args, model=args.model_positional)
    conversation = Conversation(args.system)
    with asyncio.Runner() as runner:
        speaker = runner.run(open_speaker(choice))

        async def answer(question: str) -> None:
            await _answer(speaker, conversation, question, choice.sampling)

        try:
            if args.quick is not None:
                return 0 if ask(runner, answer, args.quick) else 1
            commands = {"/reset": conversation.exchanges.clear}
            converse(runner, answer, commands=commands, about=HELP)
        finally:
            runner.run(speaker.close())
    return 0


@dataclass(slots=True)
class Conversation:
    """The conversation so far, without answers that failed or were stopped before their first word."""

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
        """Drop the oldest exchange. Returns False if there is none."""
        return bool(self.exchanges) and self.exchanges.pop(0) is not None


async def _answer(
    speaker: Speaker, conversation: Conversation, question: str, sampling: dict[str, object]
) -> None:
    """Print the answer as it comes and keep it. Drops old exchanges if the conversation does not fit."""
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
                print_note(speaker)
