"""`quire run-batch -i in.jsonl -o out.jsonl`: answers OpenAI's batch files with an engine in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from quire.cli.parser import Parser, parse_options
from quire.config import EngineConfig, ServerConfig, engine_options, server_options, split_flat
from quire.errors import ConfigError, QuireError
from quire.util.logging import setup_logging

if TYPE_CHECKING:
    from quire.server.batch import Result

logger = logging.getLogger(__name__)

SERVER_OPTIONS = ("max_", "tool_", "reasoning_", "enable_auto_", "response_role", "strict_")
"""Prefixes of the server options that have an effect here; the others are about listening."""
URL_SCHEMES = ("http://", "https://", "file://", "s3://")


def run(argv: list[str]) -> int:
    infos = engine_options()
    infos += [info for info in server_options() if info.name.startswith(SERVER_OPTIONS)]
    parser = Parser(
        prog="quire run-batch",
        usage="quire run-batch -i FILE -o FILE [--model MODEL] [flags]",
        description="Answer a file of requests. What the output file holds already is not asked again, so "
        "that an interrupted run goes on where it was. The exit code is 1 if a request failed.",
    )
    parser.add_argument("-i", "--input-file", metavar="FILE", required=True, help="JSON lines")
    parser.add_argument("-o", "--output-file", metavar="FILE", required=True, help="appended to")
    parser.add_argument(
        "--errors", metavar="FILE", help="where failures go (default: the output file)"
    )
    parser.add_argument(
        "--concurrency", metavar="N", type=int, help="lines at once (default: 2 x max_num_seqs)"
    )
    args, values, notes = parse_options(parser, infos, argv)
    if args.concurrency is not None and args.concurrency < 1:
        parser.error(f"--concurrency must be at least 1, got {args.concurrency}")
    engine, server = split_flat(values)
    setup_logging(
        log_format=engine.runtime.log_format, level=os.environ.get("QUIRE_LOG_LEVEL", "WARNING")
    )
    for note in notes:
        logger.warning(note)
    with ExitStack() as stack:
        files = BatchFiles.open(
            stack, input_file=args.input_file, output_file=args.output_file, errors=args.errors
        )
        try:
            asyncio.run(_run(engine, server, files, args.concurrency))
        finally:
            print(f"quire run-batch: {files.summary()}", file=sys.stderr)
    return 1 if files.num_failed else 0


async def _run(
    config: EngineConfig, server: ServerConfig, files: BatchFiles, concurrency: int | None
) -> None:
    from tqdm import tqdm

    from quire.engine.async_llm import AsyncLLM
    from quire.server.app import build_app
    from quire.server.batch import run_batch
    from quire.server.state import ServerState

    # There are no other clients, so no line is refused because of a full queue.
    scheduler = dataclasses.replace(
        config.scheduler, max_num_queued_reqs=0, max_num_queued_tokens=None
    )
    config = dataclasses.replace(config, scheduler=scheduler)
    engine = await AsyncLLM.start(config)
    try:
        state = ServerState(server, config)
        state.engine_loaded(engine)
        with tqdm(total=files.count(), desc="requests", disable=None) as bar:

            def write(result: Result) -> None:
                files.write(result)
                bar.update()

            bar.update(len(files.done))
            await run_batch(
                build_app(state),
                engine,
                files.lines(server.max_body_bytes),
                write,
                done=files.done,
                concurrency=concurrency or 2 * config.scheduler.max_num_seqs,
            )
    finally:
        await engine.shutdown()


class OutputError(QuireError):
    """A file of results cannot be written: a full disk, a quota, an unmounted file system."""


class BatchFiles:
    """The files of one run. They are read and written line by line."""

    def __init__(self, lines: IO[bytes], output: IO[bytes], errors: IO[bytes], done: set[str]):
        self._input, self._output, self._errors = lines, output, errors
        self.done = done
        """The lines that earlier runs have answered; see `run_batch`."""
        self.num_answered = self.num_failed = 0
        self._broken: OutputError | None = None

    @classmethod
    def open(
        cls, stack: ExitStack, *, input_file: str, output_file: str, errors: str | None
    ) -> BatchFiles:
        """Raises `ConfigError` for files that cannot be used, before a model is loaded."""
        for name in filter(None, (input_file, output_file, errors)):
            if name.startswith(URL_SCHEMES):
                raise ConfigError(f"{name} is a URL; run-batch takes files. Download it first.")
        paths = [Path(name).resolve() for name in (input_file, output_file, errors) if name]
        if len(set(paths)) < len(paths):
            raise ConfigError("input, output and errors must be different files.")
        try:
            lines = stack.enter_context(paths[0].open("rb"))
            output = stack.enter_context(paths[1].open("a+b"))
            failures = stack.enter_context(paths[2].open("wb")) if errors else output
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}.") from None
        files = cls(lines, output, failures, _answered(output, output_file))
        stack.callback(files.close)
        return files

    def count(self) -> int:
        """The number of lines, done ones included."""
        count = sum(1 for line in self._input if line.strip())
        self._input.seek(0)
        return count

    def lines(self, max_body_bytes: int) -> Iterator[bytes]:
        """The lines of the input. A line far over the limit is cut, so that it is reported as an invalid
        request."""
        limit = max_body_bytes + 2**16
        while line := self._input.readline(limit):
            yield line
            while len(line) == limit and not line.endswith(b"\n"):
                line = self._input.readline(limit)

    def write(self, result: Result) -> None:
        """Write one whole line at a time, so that at most one is incomplete when the run ends for any reason.

        Raises `OutputError`, then also for every later line, because it might follow an incomplete one.
        """
        if self._broken is not None:
            raise self._broken
        file = self._output if result.error is None else self._errors
        try:
            file.write(msgspec.json.encode(result) + b"\n")
            file.flush()
        except OSError as error:
            self._broken = OutputError(
                f"{file.name} cannot be written: {error.strerror}. What it holds is kept; the same "
                "command goes on where it stopped."
            )
            raise self._broken from None
        if result.error is None:
            self.num_answered += 1
        else:
            self.num_failed += 1

    def close(self) -> None:
        for file in (self._input, self._output, self._errors):
            with suppress(OSError):  # the error has been reported already
                file.close()

    def summary(self) -> str:
        earlier = f", {len(self.done)} were done before" if self.done else ""
        where = f" (see {self._errors.name})" if self.num_failed else ""
        return f"{self.num_answered} answered, {self.num_failed} failed{where}{earlier}"


def _answered(output: IO[bytes], name: str) -> set[str]:
    """The answers in an output file. An incomplete last line is removed from the file, so that its
    request runs again."""
    from quire.server.batch import Result

    done: set[str] = set()
    end = 0
    output.seek(0)
    for number, line in enumerate(output, start=1):
        if not line.endswith(b"\n"):
            output.truncate(end)
            break
        end += len(line)
        try:
            result = msgspec.json.decode(line, type=Result)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ConfigError(
                f"{name}, line {number} is no output of run-batch; name another output file."
            ) from None
        done.add(result.custom_id if result.response and result.custom_id else result.id)
    return done
