"""Runs cases one after another, so that one that raises, dies or hangs costs itself and no other.

A part is a module with `cases(options, entries)`. Its cases run in a process of their own, which writes the
results after each. A case that raises a CUDA error (the context is then lost), ends the process (a
compiler's assertion does) or exceeds its time (a kernel that never ends) ends that process; another one
goes on behind it. Standard library only.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTUP_S = 120.0
"""For importing PyTorch and listing the cases."""
LEAST_S = 10.0
"""No case begins with less time left."""

Values = dict[str, Any]
Entry = dict[str, Any]
"""part, name, status, seconds, values, error; remedy, if it is not as it should be. status: ok; wrong, if
values["ok"] is false; failed, with an exception; lost, if the process ended or hung; skipped, for want of
time, or of what values["skipped"] names."""


@dataclass(frozen=True, slots=True)
class Options:
    """sizes: "full", "quick" or "smoke" (see `lab.SIZES`). until: the end of it all, by time.time(). only: a
    part of the names of the cases to run."""

    models: tuple[str, ...]
    sizes: str
    until: float
    only: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    work: Callable[[], Values]
    limit_s: float = 60.0
    remedy: str = ""
    """What to do if it fails; with the entry then."""


def run_part(part: str, module: str, file: Path, options: Options) -> None:
    """Every case of the module, added to the "entries" of the JSON file."""
    spawn = multiprocessing.get_context("spawn")
    while True:
        before = len(_read(file)["entries"])
        process = spawn.Process(target=_work, args=(part, module, file, options), daemon=True)
        process.start()
        process.join()
        results = _read(file)
        if process.exitcode == 0:
            return
        if len(results["entries"]) == before:
            why = f"the process ended with {process.exitcode} before its first case"
            results["entries"].append(_entry(part, "start", "lost", why))
            _write(file, results)
            return


def _work(part: str, module: str, file: Path, options: Options) -> None:
    """The process. A case counts as lost until it has ended."""
    patience = 10 if options.sizes == "smoke" else 1
    faulthandler.dump_traceback_later(patience * STARTUP_S, exit=True)
    results = _read(file)
    entries: list[Entry] = results["entries"]
    done = {entry["name"] for entry in entries if entry["part"] == part}
    try:
        cases = importlib.import_module(module).cases(options, entries)
    except Exception:
        entries.append(_entry(part, "start", "failed", traceback.format_exc()))
        _write(file, results)
        return
    for case in cases:
        if case.name in done or options.only not in case.name:
            continue
        entry = _entry(part, case.name, "lost", "died, or took too long: see the log")
        entry["remedy"] = case.remedy
        entries.append(entry)
        _write(file, results)
        began = time.monotonic()
        left = options.until - time.time()
        if left < LEAST_S:
            entry |= {"status": "skipped", "error": None}
        else:
            faulthandler.dump_traceback_later(min(left, patience * case.limit_s), exit=True)
            try:
                values = case.work()
                status = "ok" if values.get("ok", True) else "wrong"
                status = "skipped" if "skipped" in values else status
                entry |= {"status": status, "values": values, "error": None}
            except Exception:
                entry |= {"status": "failed", "error": traceback.format_exc()}
        entry["seconds"] = time.monotonic() - began
        usable = _usable()
        if entry["status"] == "ok" and not usable:
            entry |= {"status": "failed", "error": "the CUDA context was lost"}
        if entry["status"] in ("ok", "skipped"):
            del entry["remedy"]
        _write(file, results)
        last = (entry["error"] or "").strip().splitlines()[-1:]
        print(
            f"{part}: {case.name}: {entry['status']}, {entry['seconds']:.1f} s",
            *last,
            entry.get("remedy", ""),
            flush=True,
        )
        if not usable:
            os._exit(1)
    faulthandler.cancel_dump_traceback_later()


def _usable() -> bool:
    """Whether the CUDA context, if there is one, still works. Frees what the case left."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _entry(part: str, name: str, status: str, error: str) -> Entry:
    return {
        "part": part, "name": name, "status": status, "seconds": 0.0, "values": {}, "error": error,
    }  # fmt: skip


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _write(file: Path, results: dict[str, Any]) -> None:
    """Whole or not at all: the process may end at any moment."""
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(file)
