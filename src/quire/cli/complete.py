"""`quire complete`: continues texts in the terminal, with a model started here or a running server."""

from __future__ import annotations

import asyncio

from quire.cli.model_flags import add_model_flags, model_choice, refuse_text_for_model
from quire.cli.parser import Parser
from quire.cli.talk import ask, converse, open_speaker
from quire.util.terminal import printable

HELP = "A line is a prompt; /exit leaves (so does Ctrl-D); Ctrl-C stops a text."
MAX_TOKENS = 256
"""The default of --max-tokens: most models continue without end."""


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire complete",
        usage="quire complete [MODEL] [flags]",
        description=f"Let a model continue texts, with no chat template. {HELP}",
    )
    parser.add_argument(
        "model_positional",
        metavar="MODEL",
        nargs="?",
        help="local directory, GGUF file or hub id (default: the built-in model)",
    )
    parser.add_argument(
        "-q", "--quick", metavar="TEXT", help="continue this, print what follows, leave"
    )
    add_model_flags(parser)
    args = parser.parse_strictly(argv)
    refuse_text_for_model(args.model_positional)
    choice = model_choice(args, model=args.model_positional)
    sampling = {"max_tokens": MAX_TOKENS, **choice.sampling}
    with asyncio.Runner() as runner:
        speaker = runner.run(open_speaker(choice))

        async def answer(prompt: str) -> None:
            async for text in speaker.complete(prompt, sampling):
                print(printable(text, keep_newlines=True), end="", flush=True)
            print()

        try:
            if args.quick is not None:
                return 0 if ask(runner, answer, args.quick) else 1
            converse(runner, answer, commands={}, about=HELP)
        finally:
            runner.run(speaker.close())
    return 0
