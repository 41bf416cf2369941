"""Two trees of Quire side by side: the workloads of bench.peers, by turns, as ratios.

    python bench/old_new.py OLD NEW [--models DIR] [--model M2] [--repeats 7] [--json FILE]

`--workloads start` measures the first answers of `LLM` and of `quire serve` in new processes.

OLD and NEW are checkouts. Each has a process of its own with its own `src/`; both load the model once, and
then take turns, so that what else runs on the machine disturbs both alike. A ratio is NEW's speed over
OLD's, above 1 if NEW is faster: the median over the repeats of the ratio in one repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.peers.workloads import WORKLOADS

from quire.bench.record import run_record

REPOSITORY = Path(__file__).resolve().parent.parent
HIGHER_IS_BETTER = "tok_s"


class Tree:
    def __init__(self, checkout: Path, model: str, models: Path, threads: int) -> None:
        self._model = models / model
        self._environment = {**os.environ, "PYTHONPATH": f"{checkout / 'src'}:{REPOSITORY}"}
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once
        command = ["-m", "bench.peers.run_quire", "--model", model, "--models", str(models)]
        self._process = subprocess.Popen(
            [sys.executable, *command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self._environment,
            text=True,
        )
        self.load_s = float(self._read()["load_s"])

    def run(self, workload: str, repeat: int) -> dict[str, float]:
        if workload == "start":
            return self._start()
        answer = self._ask({"command": "run", "workload": workload, "repeat": repeat})
        measures: dict[str, float] = answer["measures"]
        return measures

    def _start(self) -> dict[str, float]:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", "quire", "bench", "startup", "--runs", "1"]
            subprocess.run(
                [*command, "--model", str(self._model), "--output-json", file.name],
                env=self._environment,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            seconds = json.load(file)["medians"]
        parts = ("engine_import", "engine_load", "engine_first_token")
        return {
            "LLM_first_answer_s": sum(seconds[part] for part in parts),
            "server_first_answer_s": seconds["server_first_token"],
        }

    def close(self) -> None:
        self._process.communicate(json.dumps({"command": "quit"}) + "\n")

    def _ask(self, message: dict[str, object]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise SystemExit(answer["error"])
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--model", default="M2")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    trees = [Tree(path, args.model, args.models, args.threads) for path in (args.old, args.new)]
    found: dict[str, list[tuple[float, float]]] = {"load_s": [(trees[0].load_s, trees[1].load_s)]}
    for workload in args.workloads:
        for repeat in range(args.repeats):
            order = trees if repeat % 2 == 0 else trees[::-1]
            measured = {id(tree): tree.run(workload, repeat) for tree in order}
            old, new = (measured[id(tree)] for tree in trees)
            for name, value in old.items():
                found.setdefault(f"{workload} {name}", []).append((value, new[name]))
    for tree in trees:
        tree.close()
    results = {}
    for name, pairs in found.items():
        higher = name.endswith(HIGHER_IS_BETTER)
        ratios = [new / old if higher else old / new for old, new in pairs]
        medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
        results[name] = {"old": medians[0], "new": medians[1], "ratios": ratios}
        print(
            f"{name:32} {medians[0]:12.4f} {medians[1]:12.4f}  x{statistics.median(ratios):.3f}"
            f"  ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    if args.json is not None:
        args.json.write_text(json.dumps({"run": run_record(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
