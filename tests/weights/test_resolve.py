"""From a name to a directory: local paths never touch the network, and hub failures say what to do."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from quire.errors import CheckpointError
from quire.weights.resolve import ALLOWED_FILES, EXCLUDED_FILES, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_directory_is_used_as_it_is(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(local)) == local
    monkeypatch.chdir(local.parent)
    assert resolve_model(local.name).resolve() == local


def test_a_directory_needs_no_hub_and_no_torch(local: Path) -> None:
    code = (
        "import sys; from quire.weights.resolve import resolve_model;"
        f"resolve_model({str(local)!r});"
        "sys.exit(any(name in sys.modules for name in ('huggingface_hub', 'httpx', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "model",
    ["/no/such/dir", "./nothing", "~/nothing", "a/b/c", "../x", "", "a b", "owner/", "owner/x\n"],
)
def test_what_cannot_be_a_hub_id_never_asks_the_hub(model: str) -> None:
    with (
        mock.patch.object(huggingface_hub, "snapshot_download") as download,
        pytest.raises(CheckpointError, match=r"neither a directory|no config.json|is empty"),
    ):
        resolve_model(model)
    download.assert_not_called()


def test_wrong_directories(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is empty"):
        resolve_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model(str(file))


def test_download_asks_for_data_only_and_logs_the_commit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = tmp_path / COMMIT
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    with (
        mock.patch.object(huggingface_hub, "snapshot_download", return_value=str(snapshot)) as ask,
        caplog.at_level(logging.INFO),
    ):
        path = resolve_model("owner/name", revision="v1", download_dir="/d", hf_token="secret")
    assert path == snapshot
    assert COMMIT in caplog.text and "secret" not in caplog.text
    ask.assert_called_once_with(
        "owner/name",
        revision="v1",
        cache_dir="/d",
        token="secret",
        allow_patterns=ALLOWED_FILES,
        ignore_patterns=EXCLUDED_FILES,
    )


def test_the_patterns_leave_out_code_pickles_and_second_copies() -> None:
    def wanted(*names: str) -> list[str]:
        return list(
            huggingface_hub.utils.filter_repo_objects(
                names, allow_patterns=ALLOWED_FILES, ignore_patterns=EXCLUDED_FILES
            )
        )

    needed = ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "merges.txt")
    assert wanted(*needed) == list(needed)
    assert not wanted("modeling.py", "pytorch_model.bin", "original/params.json", "x.gguf")
    assert not wanted("consolidated.safetensors", "original/model.safetensors", "onnx/config.json")


RESPONSE = mock.Mock(headers={}, status_code=404)
FAILURES: list[tuple[Callable[[], Exception], str]] = [
    (lambda: errors.GatedRepoError("x", response=RESPONSE), "gated.*--hf-token"),
    (lambda: errors.RepositoryNotFoundError("x", response=RESPONSE), "not on the hub.*check the name"),
    (lambda: errors.RevisionNotFoundError("x", response=RESPONSE), "revision 'r'.*--revision"),
    (lambda: errors.LocalEntryNotFoundError("x"), "HF_HUB_OFFLINE"),
    (lambda: httpx.ConnectTimeout("x"), "ConnectTimeout.*network"),
    (lambda: OSError(28, "No space left on device"), "could not be downloaded"),
]  # fmt: skip


@pytest.mark.parametrize(("failure", "message"), FAILURES)
def test_hub_failures_are_typed(failure: Callable[[], Exception], message: str) -> None:
    with (
        mock.patch.object(huggingface_hub, "snapshot_download", side_effect=failure()),
        pytest.raises(CheckpointError, match=f"model 'owner/name'.*{message}"),
    ):
        resolve_model("owner/name", revision="r")


def test_offline_without_a_cache(tmp_path: Path) -> None:
    """The real huggingface_hub, told to stay offline (conftest sets HF_HUB_OFFLINE)."""
    with pytest.raises(CheckpointError, match="no directory here and not in the hub's cache"):
        resolve_model("owner/name", download_dir=str(tmp_path))


def test_an_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter \(adapter_config\.json\).*merge"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["notes.txt"], r"has no config\.json; point to"),
        (["model.gguf"], r"GGUF.*not read.*safetensors"),
        (["params.json", "consolidated.safetensors"], r"params\.json.*Hugging Face's layout"),
        (["inner/config.json"], r"did you mean .*/inner\?"),
        (
            ["refs/main", f"snapshots/{COMMIT}/config.json"],
            rf"did you mean .*/snapshots/{COMMIT}\?",
        ),
    ],
)
def test_a_directory_without_a_model_says_what_is_there(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(tmp_path))


def test_a_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="GGUF file, which is not read"):
        resolve_model(str(tmp_path / "model.gguf"))
