"""Python files beside a model, which auto_map may name, are never imported, and no option turns that on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quire.builtin import MODEL_DIR

EVIL = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\nclass Config: pass\n"
SCRIPT = """
import sys
from quire import LLM, SamplingParams
try:
    llm = LLM(sys.argv[1], kv_cache_memory_bytes=32 << 20, max_model_len=512)
    llm.generate("a", SamplingParams(max_tokens=1))
    print("served")
except Exception as error:
    print("refused", type(error).__name__, error)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(MODEL_DIR, directory)
    for name in (
        "modeling_evil.py",
        "configuration_evil.py",
        "tokenization_evil.py",
        "__init__.py",
        "conftest.py",
    ):
        (directory / name).write_text(EVIL.format(marker=str(tmp_path / "ran")))
    classes = {
        "AutoConfig": "configuration_evil.Config",
        "AutoModelForCausalLM": "modeling_evil.Config",
    }
    for file, extra in (
        ("config.json", {"auto_map": classes, "trust_remote_code": True}),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["tokenization_evil.Config", None]}},
        ),
    ):
        path = directory / file
        path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    return directory


def test_code_beside_a_model_is_not_run(model: Path, tmp_path: Path):
    """Served or refused, it makes no difference to this."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model)],
        capture_output=True,
        text=True,
        timeout=170,
        cwd=model,
    )
    assert done.returncode == 0 and done.stdout.startswith(("served", "refused")), done.stderr
    assert not (tmp_path / "ran").exists(), done.stdout
