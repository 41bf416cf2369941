"""Nothing is unpickled, in any process: an audit hook in a server and its engine core sees every attempt.

That the source has no such call is tests/scripts/test_check_source.py; this sees what libraries do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HOOK = """
import os, sys, traceback
def hook(event, arguments, path=os.environ["QUIRE_TEST_EVENTS"]):
    if event in ("pickle.find_class", "marshal.load"):
        with open(path, "a") as file:
            file.write(event + " " + repr(arguments) + "\\n" + "".join(traceback.format_stack()[-6:]) + "\\n")
sys.addaudithook(hook)
with open(os.environ["QUIRE_TEST_EVENTS"] + ".seen", "a") as file:
    file.write(str(os.getpid()) + "\\n")
"""
SERVE = """
import asyncio
from quire.config import from_flat
from quire.engine.async_llm import AsyncLLM
from quire.sampling_params import SamplingParams

async def main():
    engine = await AsyncLLM.start(from_flat({"kv_cache_memory_bytes": 32 << 20, "max_model_len": 512}))
    params = SamplingParams(max_tokens=4, temperature=0)
    async for output in engine.submit([1, 2, 3], params):
        last = output
    assert last.outputs[0].token_ids
    await engine.shutdown()

asyncio.run(main())
"""


def run(script: str, folder: Path) -> tuple[str, int]:
    """What was unpickled, and in how many processes somebody watched."""
    (folder / "sitecustomize.py").write_text(HOOK)
    events = folder / "events"
    paths = [str(folder), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "QUIRE_TEST_EVENTS": str(events),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    seen = len(set((folder / "events.seen").read_text().split()))
    return (events.read_text() if events.exists() else ""), seen


def test_no_process_unpickles(tmp_path: Path):
    events, processes = run(SERVE, tmp_path)
    assert processes >= 2, "the engine core is watched too"
    assert events == ""


def test_the_hook_sees_an_unpickled_class(tmp_path: Path):
    events, _ = run("import pickle, os; pickle.loads(pickle.dumps(os.getcwd))", tmp_path)
    assert "getcwd" in events
