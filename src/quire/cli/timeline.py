"""`quire timeline`: what an engine did, for https://ui.perfetto.dev, or as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quire.cli.explain import add_source, check_source, fetch, read_files, to_json
from quire.cli.parser import Parser
from quire.errors import ConfigError


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire timeline",
        usage="quire timeline [FILE ...] [flags]",
        description="Write what an engine did as Chrome's trace events, which https://ui.perfetto.dev opens.",
    )
    add_source(parser)
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="trace.json", help="default: trace.json"
    )
    parser.add_argument(
        "--seconds", metavar="N", type=float, help="the last ones only (default: all)"
    )
    parser.add_argument(
        "--picture", metavar="FILE", help="write an SVG with the requests, and no trace"
    )
    parser.add_argument(
        "--request",
        metavar="ID",
        help="with --picture: this one, its explanation, and those beside it",
    )
    args = parser.parse_strictly(argv)
    check_source(args)
    if args.seconds is not None and not 0.0 < args.seconds < float("inf"):
        raise ConfigError(f"--seconds must be positive, got {args.seconds:g}.")
    trace: dict[str, Any]
    if args.url:
        trace = fetch(
            args, "/debug/timeline" + (f"?seconds={args.seconds}" if args.seconds else "")
        )
    else:
        from quire.scheduler.timeline import timeline

        trace = to_json(timeline(read_files(args.files), seconds=args.seconds))
    if args.picture:
        from quire.cli.timeline_picture import picture

        Path(args.picture).write_text(picture(trace, args.request), encoding="utf-8")
        print(args.picture)
        return 0
    Path(args.output).write_text(json.dumps(trace), encoding="utf-8")
    print(f"{args.output}: {len(trace['traceEvents'])} events; open it at https://ui.perfetto.dev")
    return 0
