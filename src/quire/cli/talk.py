"""The model that a command uses: an engine in this process, or a server over HTTP, behind `Speaker`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quire.cli.http import HttpClient
from quire.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    PromptTooLongError,
    QuireError,
)
from quire.lora.request import LoRARequest
from quire.placement import Placement
from quire.server.upstream import HttpError
from quire.util.terminal import printable

if TYPE_CHECKING:
    from quire.cli.model_flags import ModelChoice
    from quire.config import EngineConfig
    from quire.engine.async_llm import AsyncLLM
    from quire.outputs import RequestSpecDecodeMetrics, RequestStateStats
    from quire.sampling_params import SamplingParams

Message = Mapping[str, str]


class ContextFullError(QuireError):
    """The conversation no longer fits the model's context."""


class Speaker(Protocol):
    """Answers prompts with deltas of text."""

    def chat(
        self, messages: Sequence[Message], sampling: Mapping[str, object]
    ) -> AsyncIterator[str]:
        """The assistant's next message. Raises `ContextFullError` before the first delta."""
        ...

    def complete(self, prompt: str, sampling: Mapping[str, object]) -> AsyncIterator[str]:
        """The continuation of `prompt`, without a template."""
        ...

    @property
    def note(self) -> str:
        """What the last answer's drafts did, in a line; empty without speculative decoding."""
        ...

    async def close(self) -> None: ...


def print_note(speaker: Speaker) -> None:
    """On a terminal; a file gets nothing but the text."""
    if speaker.note and sys.stderr.isatty():
        print(speaker.note, file=sys.stderr)


class LocalModel:
    """An engine started for this command."""

    def __init__(self, engine: AsyncLLM, adapter: str | None = None) -> None:
        self._engine = engine
        self.note = ""
        self._adapter = adapter

    @classmethod
    async def start(cls, config: EngineConfig, adapter: str | None = None) -> LocalModel:
        """adapter: a directory or a name, as in `ModelChoice`."""
        from quire.engine.async_llm import AsyncLLM

        engine = await AsyncLLM.start(config)
        try:
            return cls(engine, None if adapter is None else await _adapter_name(engine, adapter))
        except BaseException:
            await engine.shutdown()
            raise

    @property
    def can_chat(self) -> bool:
        return self._engine.model.chat_template is not None

    async def chat(
        self, messages: Sequence[Message], sampling: Mapping[str, object]
    ) -> AsyncIterator[str]:
        template = self._engine.model.chat_template
        if template is None:
            raise ConfigError(
                f"{self._engine.model.name} has no chat template: give one with --chat-template, "
                "or use `quire generate --raw`."
            )
        model = self._engine.model
        # The template writes the special tokens itself, so the tokenizer must not add them again.
        ids = model.tokenizer.encode(template.render(messages), add_special_tokens=False)
        async for text in self._stream(ids, sampling):
            yield text

    async def complete(self, prompt: str, sampling: Mapping[str, object]) -> AsyncIterator[str]:
        async for text in self._stream(prompt, sampling):
            yield text

    async def _stream(
        self, prompt: str | list[int], sampling: Mapping[str, object]
    ) -> AsyncIterator[str]:
        stream, self.note = None, ""
        try:
            placement = Placement(adapter=self._adapter)
            stream = self._engine.submit(prompt, self._params(sampling), placement=placement)
            async for output in stream:
                if output.error is not None:
                    raise EngineError(output.error)
                for sequence in output.outputs:
                    yield sequence.text
                    if (drafts := sequence.spec_decode_metrics) is not None:
                        self.note = _note(output.metrics, drafts)
            stream = None
        except PromptTooLongError as error:
            raise ContextFullError(str(error)) from None
        finally:
            if stream is not None:  # ended early: Ctrl-C, or an error while printing
                stream.abort()

    def _params(self, sampling: Mapping[str, object]) -> SamplingParams:
        from quire.sampling_params import RequestOutputKind, SamplingParams

        values = {"max_tokens": None, **self._engine.model.default_sampling, **sampling}
        return SamplingParams(**values, output_kind=RequestOutputKind.DELTA)  # type: ignore[arg-type]

    async def close(self) -> None:
        await self._engine.shutdown()


def _note(times: RequestStateStats, drafts: RequestSpecDecodeMetrics) -> str:
    count, seconds = times.num_generation_tokens, times.last_token_ts - times.first_token_ts
    rate = f", {(count - 1) / seconds:.0f} tokens/s" if seconds > 0 else ""
    return f"({count} tokens{rate}; {drafts.num_accepted} of {drafts.num_draft_tokens} drafts accepted)"


async def _adapter_name(engine: AsyncLLM, adapter: str) -> str:
    """The name under which the engine serves it."""
    if Path(adapter).is_dir():
        return await engine.adapters.use(LoRARequest(Path(adapter).resolve().name, 1, adapter))
    found = await engine.adapters.find(adapter)
    if found is None:
        raise ConfigError(f"--lora {adapter}: no such directory, and no adapter of that name.")
    return found.name


class RemoteModel:
    """A running server: Quire's, or any with OpenAI's API."""

    can_chat = True
    """Not known before the first request."""
    note = ""

    def __init__(self, client: HttpClient, model: str) -> None:
        self._client = client
        self._model = model

    @classmethod
    async def connect(cls, url: str, *, model: str | None, api_key: str | None) -> RemoteModel:
        """Use `model`, or the first one that the server lists."""
        import json

        client = HttpClient(url.rstrip("/").removesuffix("/v1"), api_key)
        if model is None:
            try:
                model = str(json.loads(await client.get("/v1/models"))["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise HttpError(
                    f"{url} does not answer like an OpenAI-compatible server."
                ) from None
        return cls(client, model)

    async def chat(
        self, messages: Sequence[Message], sampling: Mapping[str, object]
    ) -> AsyncIterator[str]:
        request = {"messages": list(messages), **sampling}
        async for choice in self._stream("/v1/chat/completions", request):
            delta = choice.get("delta")
            if isinstance(delta, dict) and delta.get("content"):
                yield str(delta["content"])

    async def complete(self, prompt: str, sampling: Mapping[str, object]) -> AsyncIterator[str]:
        async for choice in self._stream("/v1/completions", {"prompt": prompt, **sampling}):
            yield str(choice.get("text") or "")

    async def _stream(
        self, path: str, request: Mapping[str, object]
    ) -> AsyncIterator[Mapping[str, object]]:
        body = {"model": self._model, "stream": True, **request}
        try:
            async for event in self._client.post_events(path, body):
                choices = event.get("choices")
                if isinstance(choices, list):
                    for choice in choices:
                        yield choice
        except HttpError as error:
            if error.status == 400 and error.param in ("input_tokens", "max_tokens"):
                raise ContextFullError(str(error)) from None
            raise

    async def close(self) -> None:
        return None


async def open_speaker(choice: ModelChoice) -> LocalModel | RemoteModel:
    """The server at `choice.url`, or a model started here. That takes seconds, so it prints a line on a
    terminal."""
    if choice.url is not None:
        return await RemoteModel.connect(choice.url, model=choice.model, api_key=choice.api_key)
    if sys.stdin.isatty() and sys.stderr.isatty():
        print("loading the model ...", file=sys.stderr)
    return await LocalModel.start(choice.engine, choice.adapter)


def converse(
    runner: asyncio.Runner,
    answer: Callable[[str], Awaitable[None]],
    *,
    commands: Mapping[str, Callable[[], object]],
    about: str,
) -> None:
    """Read a line, answer it, repeat. A stopped answer or a refused question does not end the conversation.

    commands: words that begin with "/", besides /exit. Without any, all other lines are questions.
    """
    interactive = sys.stdin.isatty()
    leaving = False
    if interactive:
        print(about)
        _edit_lines()
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()  # so that the shell's prompt begins on a new line
            return
        except KeyboardInterrupt:  # probably meant to stop an answer that had just ended
            if leaving or not interactive:
                raise
            leaving = True
            print("\n(Ctrl-C again leaves)")
            continue
        leaving = False
        said = line.strip()
        if said in ("/exit", "/quit"):
            return
        if said in commands:
            commands[said]()
        elif commands and said.startswith("/"):
            print(about)
        elif said:
            ask(runner, answer, said if commands else line)


def ask(runner: asyncio.Runner, answer: Callable[[str], Awaitable[None]], said: str) -> bool:
    """Answer one question; Ctrl-C stops only the answer. Returns False after an error, which is printed."""

    async def run() -> None:
        await answer(said)

    try:
        runner.run(run())
    except KeyboardInterrupt:
        print(" (stopped)")
    except EngineDeadError:
        raise
    except QuireError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return False
    return True


def _edit_lines() -> None:
    """Enable arrow keys and history in `input()`, if this Python has readline."""
    try:
        import readline  # noqa: F401 - importing it is what changes input()
    except ImportError:
        return
