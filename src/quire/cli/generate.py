"""`quire generate "..."`: prints the answer to one prompt as it comes, and exits."""

from __future__ import annotations

import asyncio
import sys

from quire.cli.model_flags import ModelChoice, add_model_flags, model_choice
from quire.cli.parser import Parser
from quire.cli.talk import open_speaker, print_note
from quire.errors import ConfigError
from quire.util.terminal import printable


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire generate",
        usage='quire generate "PROMPT" [flags]',
        description="Answer or continue one prompt. Without PROMPT, or with -, it is read from stdin.",
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", default="-")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--chat", action="store_true", help="as a user's message (default if it can)")
    kind.add_argument("--raw", action="store_true", help="continue the text, with no chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message, before the user's")
    add_model_flags(parser)
    args = parser.parse_strictly(argv)
    if args.raw and args.system:
        parser.error("--system needs a chat; remove --raw")
    choice = model_choice(args)
    prompt = _prompt(args.prompt)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": prompt})
    asyncio.run(
        _generate(choice, prompt, messages, chat=args.chat or args.system is not None, raw=args.raw)
    )
    return 0


def _prompt(word: str) -> str:
    text = word
    if word == "-" and not sys.stdin.isatty():
        text = sys.stdin.read()
    if not text.strip() or (word == "-" and sys.stdin.isatty()):
        raise ConfigError('give a prompt: quire generate "what does os.path.join do?"')
    return text


async def _generate(
    choice: ModelChoice, prompt: str, messages: list[dict[str, str]], *, chat: bool, raw: bool
) -> None:
    """Stream to stdout. Uses the chat template if `chat`, or if the model has one and not `raw`."""
    speaker = await open_speaker(choice)
    as_chat = chat or (not raw and speaker.can_chat)
    try:
        if as_chat:
            deltas = speaker.chat(messages, choice.sampling)
        else:
            deltas = speaker.complete(prompt, {"max_tokens": 256, **choice.sampling})
        plain = not sys.stdout.isatty()  # a file gets exactly the model's text
        async for text in deltas:
            sys.stdout.write(text if plain else printable(text, keep_newlines=True))
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        print_note(speaker)
    finally:
        await speaker.close()
