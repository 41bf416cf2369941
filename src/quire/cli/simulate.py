"""`quire simulate`: what would happen to traffic, on the real scheduler under virtual time."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

from quire.cli.parser import Parser, add_options, given
from quire.config import engine_options, load_yaml
from quire.config.options import check_type
from quire.errors import ConfigError
from quire.plan.chart import draw
from quire.plan.options import GROUPS, simulate_options
from quire.plan.report_lines import report_lines, sweep_lines
from quire.plan.simulate import Simulation, find_device

_ENGINE = [info for info in engine_options() if info.name not in ("seed", "model")]


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="quire simulate",
        usage="quire simulate --gpu NAME|--cost FILE --model MODEL [flags]",
        description="Simulate a fleet under traffic: the real scheduler and cache in virtual time.",
    )
    parser.add_argument(
        "--model", metavar="MODEL",
        help="directory, hub id, or a public model's name (default: the built-in one); only sizes count",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML file of engine options")
    own = simulate_options()
    add_options(parser, [*own, *_ENGINE])
    args = parser.parse_strictly(argv)
    values = load_yaml(args.config) if args.config else {}
    values |= given(args, _ENGINE)
    if args.model is not None:
        values["model"] = args.model
    flags = given(args, own)
    checked = {info.name: check_type(info, flags[info.name]) for info in own if info.name in flags}
    group_of = {info.name: info.group for info in own}
    groups: dict[str, Any] = {
        name: kind(**{key: value for key, value in checked.items() if group_of[key] == name})
        for name, kind in GROUPS.items()
    }
    traffic, fleet, report = groups["traffic"], groups["fleet"], groups["report"]
    if report.plot is not None and not report.plot.endswith(".svg"):
        raise ConfigError(f"plot must end in .svg, got {report.plot!r}.")
    device = find_device(values, fleet, report.gpu_price)
    simulation = Simulation(device, traffic, fleet, report)
    gc.disable()  # there are millions of objects to look at; what a run leaves goes at its end
    try:
        found, runs = (simulation.sweep(), []) if traffic.sweep_rate else simulation.run()
    finally:
        gc.enable()
    content = {"about": simulation.about(), **found}
    print(*(sweep_lines if traffic.sweep_rate else report_lines)(content), sep="\n")
    if report.json is not None:
        _write(report.json, json.dumps(content, indent=1) + "\n")
    if report.plot is not None:
        _write(report.plot, draw(content, runs))
    return 0


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from None
