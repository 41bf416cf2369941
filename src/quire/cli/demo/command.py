"""The flags of `quire demo`, and a run from start to clean stop."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from pathlib import Path

from quire.cli.demo.report import Peaks, Report, snapshot, watch
from quire.cli.demo.server import ServerProcess, scratch_folder
from quire.cli.demo.talk import Dialogue, hold_all, script
from quire.cli.demo.view import View
from quire.cli.parser import Parser, add_options, given
from quire.config import engine_options, from_flat


def run(argv: list[str]) -> int:
    infos = engine_options()
    parser = Parser(
        prog="quire demo",
        usage="quire demo [flags]",
        description="Start a server, hold conversations with it at once, show what it did, and leave.",
    )
    parser.add_argument("--conversations", type=int, default=8, metavar="N", help="at once (8)")
    parser.add_argument("--max-tokens", type=int, default=96, metavar="N", help="per answer (96)")
    parser.add_argument("--json", action="store_true", help="print only the figures, as JSON")
    add_options(parser, infos)
    args = parser.parse_strictly(argv)
    if args.conversations < 1 or args.max_tokens < 1:
        parser.error("--conversations and --max-tokens must be at least 1")
    options = given(args, infos)
    from_flat(options)  # reports a mistake here and not in the log of a server that did not start
    dialogues = script(args.conversations)
    with scratch_folder() as folder:
        server = ServerProcess.start(options, Path(folder))
        try:
            report = asyncio.run(
                _demonstrate(server, dialogues, max_tokens=args.max_tokens, quiet=args.json)
            )
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                server.stop()
            raise
        server.stop()
    print(report.as_json() if args.json else "\n" + report.as_text())
    return 0


async def _demonstrate(
    server: ServerProcess, dialogues: list[Dialogue], *, max_tokens: int, quiet: bool
) -> Report:
    """Hold the conversations while a view draws them and a watcher samples /metrics."""
    if not quiet:
        print(f"Starting `quire serve` on {server.url} ...", flush=True)
    ready_seconds = await server.wait_ready()
    models = json.loads(await server.client.get("/v1/models"))
    model = str(models["data"][0]["id"])
    if not quiet:
        print(
            f"{model} is ready after {ready_seconds:.1f} s. {len(dialogues)} conversations at once:\n"
        )
        sys.stdout.flush()
    peaks = Peaks()
    view = View(dialogues)
    helpers = [asyncio.create_task(watch(server.client, peaks))]
    if not quiet:
        helpers.append(asyncio.create_task(view.run()))
    try:
        await hold_all(server.client, model, dialogues, max_tokens)
    finally:
        for helper in helpers:
            helper.cancel()
        results = await asyncio.gather(*helpers, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):  # a CancelledError is their normal end
            raise result
    if not quiet:
        view.draw()
    return Report.make(
        dialogues,
        model=model,
        ready_seconds=ready_seconds,
        peaks=peaks,
        end=await snapshot(server.client),
    )
