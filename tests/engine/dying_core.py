"""Makes engine cores die of marked prompts, without anything in the product that could.

`environment(directory)` is of a process whose engine cores do; in it Python finds `sitecustomize.py`, which
wraps `EngineCore.step` in processes that run `quire.engine.core_process`, and in no others.
"""

from __future__ import annotations

import os
from pathlib import Path

MARK = 7
"""A prompt that begins with this token so often is deadly."""
TIMES = 5

SITE = f"""
import os, signal, sys, time

if "quire.engine.core_process" in sys.orig_argv:
    from quire.engine import core

    def check(self, step=core.EngineCore.step):
        how = os.environ["QUIRE_TEST_DEATH"]
        for request in self.scheduler.running:
            if request.token_ids[:{TIMES}] == [{MARK}] * {TIMES}:
                if how == "hang":
                    time.sleep(3600)
                if how == "error":
                    raise RuntimeError("a marked request")
                os.kill(os.getpid(), getattr(signal, how))
        return step(self)

    core.EngineCore.step = check
"""


def environment(directory: Path, how: str) -> dict[str, str]:
    """how: "hang", "error" or the name of a signal. The core dies in the step after the one in which the
    request was admitted."""
    (directory / "sitecustomize.py").write_text(SITE)
    paths = [str(directory), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "QUIRE_TEST_DEATH": how}
