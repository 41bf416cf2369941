"""Measure Quire and every installed rival on W1-W6, interleaved in one run.

    make dev && bench/peers/setup                         (once)
    .venv/bin/python -m bench.peers.compare --model M2    (from the repository's root)

Every engine stays loaded but stopped while another is measured. Each workload is run once by every engine to
warm up, then `--repeats` times by all engines in turn, starting with another one each time, so that whatever
else the machine does meets all of them alike. Writes bench/results/cpu/<date>-<commit>-<model>.json and .md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.peers import agents, client, report, servers
from bench.peers.processes import Runner, RunnerError, cpu_times, others_share
from bench.peers.rivals import REPOSITORY, Spec, peers_dir, server_makers, specs
from bench.peers.workloads import (
    FULL,
    MODELS,
    SMOKE,
    WARM_UP,
    WORKLOADS,
    w5_arrivals,
    w5_requests,
)

from quire.bench.record import run_record

MUCH_SLOWER = 3.0
"""An engine this many times slower than the best at the warm-up is measured once, not `repeats` times."""

SERVED = ("W5", "W6")
"""Workloads of a server and not of an engine in process."""

QUIET = 0.10
"""A measurement during which others used more than this much of a core is taken again (and marked)."""


def main() -> None:
    args = parse(__doc__)
    root = peers_dir()
    logs = root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # A plain kill must not leave stopped engines behind: it ends this as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Installed engines have compiled modules. So must this checkout, or its start is not comparable.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    run = Comparison(args, root, logs, specs(root, args.threads))
    try:
        run.measure()
        for workload in SERVED:
            if workload in args.workloads:
                write(run.results, args)  # these are long; what is measured is safe
                run.serve(workload)
    finally:
        run.abandon()
    write(run.results, args)


class Comparison:
    """One run. `results` is what is written as JSON; `report` makes the table from it alone."""

    def __init__(
        self, args: argparse.Namespace, root: Path, logs: Path, engines: Sequence[Spec]
    ) -> None:
        self.args, self.root, self.logs = args, root, logs
        self.shape = MODELS[args.model]
        self.specs = [spec for spec in engines if not args.engines or spec.name in args.engines]
        self.runners: dict[str, Runner] = {}
        self.engines: dict[str, dict[str, object]] = {}
        self.skipped: dict[str, str] = {}
        self.samples: list[dict[str, object]] = []
        self.results: dict[str, object] = {
            "record": record(),
            "model": args.model,
            "title": self.shape.title,
            "smoke": args.smoke,
            "threads": args.threads,
            "repeats": args.repeats,
            "engines": self.engines,
            "skipped": self.skipped,
            "samples": self.samples,
        }

    def measure(self) -> None:
        """W1-W4: everyone together, then, one after another, whoever had no room beside them."""
        apart = [spec for spec in self.specs if self.args.model in spec.apart_on]
        together = [spec for spec in self.specs if spec not in apart]
        for group in (together, *([spec] for spec in apart)):
            self._measure_group(group)

    def _measure_group(self, group: list[Spec]) -> None:
        """An engine that runs one workload only is loaded for that alone."""
        names = [name for name in WORKLOADS if name in self.args.workloads]
        for spec in group:
            if len(spec.workloads) > 1 and set(spec.workloads) & set(names):
                self._load(spec)
        for name in names:
            guests = [spec for spec in group if spec.workloads == (name,)]
            for spec in guests:
                self._load(spec)
            self._measure_workload(name)
            for spec in guests:
                self._leave(spec.name)
        for spec in group:
            self._leave(spec.name)

    def _measure_workload(self, name: str) -> None:
        for engine in self._able(name):
            self._sample(engine, name, WARM_UP)
        for repeat in range(self.args.repeats):
            slow = report.much_slower(self.samples, name, MUCH_SLOWER)
            able = self._able(name)
            turn = repeat % max(1, len(able))
            for engine in able[turn:] + able[:turn]:
                if not (repeat and engine in slow):
                    self._sample(engine, name, repeat)

    def _load(self, spec: Spec) -> None:
        """Start an engine, alone on the machine while it loads."""
        reason = spec.missing(self.root, self.args.model)
        if reason is not None:
            self._skip(spec.name, reason)
            return
        log = self.logs / f"{spec.name.replace(' ', '-')}-{self.args.model}.log"
        command = spec.command(self.root, self.args.model, self.args.threads, smoke=self.args.smoke)
        runner = Runner(spec, command, log)
        try:
            message = runner.wait_ready(timeout=900)
        except RunnerError as error:
            runner.kill()
            self._skip(spec.name, f"did not load: {error} (log: {log})")
            return
        except BaseException:
            runner.kill(patience=0)
            raise
        runner.stop()
        self.runners[spec.name] = runner
        self.engines[spec.name] = {
            **message,
            "command": " ".join(command),
            "env": spec.env,
            "apart": self.args.model in spec.apart_on,
            "failures": [],
        }
        _say(
            f"{spec.name} {message['version']}: first answer {message['first_answer_s']:.1f} s; "
            f"{_available_gib():.1f} GiB of memory left"
        )

    def _leave(self, engine: str) -> None:
        """Note an engine's peak memory, and end it."""
        if engine in self.runners:
            answer = self._ask(engine, command="memory")
            if answer is not None:
                self.engines[engine]["peak_rss_mib"] = answer["peak_rss_mib"]
                self.runners.pop(engine).kill()

    def _able(self, workload: str) -> list[str]:
        return [n for n, runner in self.runners.items() if workload in runner.spec.workloads]

    def _sample(self, engine: str, workload: str, repeat: int) -> None:
        """Measure, and once or twice more where others used the machine; every attempt is recorded."""
        for attempt in range(1 if repeat == WARM_UP else 1 + self.args.retries):
            if self._ask(engine, command="nudge", keep_awake=True) is None:
                return
            group = {self.runners[engine].process.pid}
            before = cpu_times(group)
            answer = self._ask(
                engine, command="run", workload=workload, repeat=repeat + attempt * 1000
            )
            after = cpu_times(group)
            if answer is None:
                return
            others = others_share(before, after)
            self.samples.append(
                {
                    "engine": engine,
                    "workload": workload,
                    "repeat": repeat,
                    "attempt": attempt,
                    "others": round(others, 3),
                    "measures": answer["measures"],
                }
            )
            _say(
                f"  {workload} {repeat:2} {engine:24} {_brief(answer['measures'])} others {others:.2f}"
            )
            if others <= QUIET:
                return

    def _ask(
        self, engine: str, *, keep_awake: bool = False, **command: object
    ) -> dict[str, object] | None:
        """The answer, with the engine awake only for it. None, and no more of that engine, on an error."""
        runner = self.runners[engine]
        runner.wake()
        try:
            return runner.ask(self.args.timeout, **command)
        except RunnerError as error:
            _say(f"  {engine} failed at {command}: {error}")
            failures = self.engines[engine]["failures"]
            assert isinstance(failures, list)
            failures.append(f"{command}: {error}")
            if (
                command.get("workload") is None
                or "gave no answer" in str(error)
                or "ended" in str(error)
            ):
                del self.runners[engine]
                runner.kill()
            return None
        finally:
            if not keep_awake:
                runner.stop()

    def _skip(self, name: str, reason: str) -> None:
        self.skipped[name] = reason
        _say(f"{name} skipped: {reason}")

    def abandon(self) -> None:
        """End what still runs, after an error or Ctrl-C; nothing does after a whole run."""
        for runner in self.runners.values():
            runner.kill(patience=0)
        self.runners.clear()

    def serve(self, workload: str) -> None:
        """W5 or W6: each server alone, in turn, `--rounds` times."""
        shape = agents.with_room(self.shape) if workload == "W6" else self.shape
        makers = server_makers(self.root, shape, self.args.threads)
        wanted = [
            name
            for name in makers
            if (
                not self.args.engines
                or name in self.args.engines
                or name.split()[0] in self.args.engines
            )
        ]
        for turn in range(self.args.rounds):
            for name in wanted[turn % len(wanted) :] + wanted[: turn % len(wanted)]:
                if name not in self.skipped:
                    try:
                        self._serve_one(workload, name, makers[name], turn)
                    except (RuntimeError, OSError) as error:
                        self._skip(f"{name} server", f"{workload}: {error}")

    def _serve_one(self, workload: str, name: str, maker: servers.ServerMaker, turn: int) -> None:
        port = servers.free_port()
        server = maker(port)
        if not Path(server.command[0]).exists():
            raise RuntimeError(f"not installed: no {server.command[0]} (run bench/peers/setup)")
        log = self.logs / f"{name.replace(' ', '-')}-server-{self.args.model}.log"
        drive = self._drive_w6 if workload == "W6" else self._drive_w5
        started = time.perf_counter()
        process = servers.start(server, log)
        try:
            servers.wait_ready(port, process, timeout=900)
            scale = SMOKE if self.args.smoke else FULL
            first = w5_requests(self.shape.vocab_size, WARM_UP - turn, scale)[0]
            asyncio.run(client.answer(port, server.model, first.prompt))
            first_answer = time.perf_counter() - started
            asyncio.run(drive(port, server, WARM_UP - turn))
            before = cpu_times({process.pid})
            result = asyncio.run(drive(port, server, turn))
            others = others_share(before, cpu_times({process.pid}))
        finally:
            _end(process)
        measures = {key: round(value, 3) for key, value in asdict(result).items()}
        measures["server_first_answer_s"] = round(first_answer, 3)
        self.samples.append(
            {
                "engine": name,
                "workload": workload,
                "repeat": turn,
                "attempt": 0,
                "others": round(others, 3),
                "rate": self._rate() if workload == "W5" else None,
                "command": " ".join(server.command),
                "measures": measures,
            }
        )
        _say(f"  {workload} {turn:2} {name:24} {_brief(measures)} others {others:.2f}")

    def _rate(self) -> float:
        return self.args.rate or self.shape.w5_rate

    async def _drive_w5(self, port: int, server: servers.Server, repeat: int) -> client.LoadResult:
        """A warm-up (`repeat` below 0) is 16 requests at once."""
        scale = SMOKE if self.args.smoke else FULL
        requests = w5_requests(self.shape.vocab_size, repeat, scale)
        arrivals = w5_arrivals(self._rate(), len(requests))
        if repeat < 0:
            requests = requests[1:17]
            arrivals = [0.0] * len(requests)
        pairs = [(r.prompt, r.max_tokens) for r in requests]
        return await client.load(port, server.model, pairs, arrivals)

    async def _drive_w6(
        self, port: int, server: servers.Server, repeat: int
    ) -> agents.AgentsResult:
        """A warm-up (`repeat` below 0) is the first turn of each session."""
        shape = agents.SMOKE if self.args.smoke else agents.FULL
        if repeat < 0:
            shape = agents.first_turns(shape)
        return await agents.replay(port, server, self.shape.vocab_size, repeat, shape)


def write(
    results: dict[str, object],
    args: argparse.Namespace,
    table: Callable[[dict[str, object]], str] = report.markdown,
    suffix: str = "",
) -> None:
    record = results["record"]
    assert isinstance(record, dict)
    day = str(record["date"])[:10]
    commit = str(record["commit"] or "unknown")[:7] + ("-dirty" if record["dirty"] else "")
    name = f"{day}-{commit}-{args.model}{suffix}" + ("-smoke" if args.smoke else "")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(table(results))
    _say(f"written: {args.out / name}.json and .md")


def parse(page: str | None) -> argparse.Namespace:
    """page: the docstring of the module that is run."""
    parser = argparse.ArgumentParser(description=(page or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="M2")
    parser.add_argument("--engines", nargs="+", help="only these, by the names in the table")
    parser.add_argument("--workloads", nargs="+", default=[*WORKLOADS, *SERVED])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="of W5 and W6")
    parser.add_argument(
        "--rate", type=float, help="of W5, requests/s (default: 2 for M2, 0.5 for M1)"
    )
    parser.add_argument("--retries", type=int, default=2, help="where others used the machine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one measurement")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench" / "results" / "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny workloads, once: does it work?")
    args = parser.parse_args()
    if args.smoke:
        args.repeats, args.rounds, args.retries = 1, 1, 0
    return args


def record() -> dict[str, object]:
    """Of this run."""
    return run_record(["python", "-m", f"bench.peers.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def _end(process: subprocess.Popen[bytes]) -> None:
    """The server's whole session: asked first, then with force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return float("nan")


def _brief(measures: object) -> str:
    assert isinstance(measures, dict)
    return " ".join(f"{key} {value:.4g}" for key, value in measures.items())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
