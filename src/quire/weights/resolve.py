"""Finds the files of the model that the user named, on this machine. The only place that may use the network.

A directory or file is used as it is: no network, no import of huggingface_hub. Anything else is a hub id,
downloaded once, at one commit, which is logged; of a repository with GGUF files, only the named file. Config,
tokenizer and weights of a served model always come from the same revision, because everything else reads the
directory or file that is returned here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from quire.errors import CheckpointError
from quire.weights import gguf_files
from quire.weights.source import FILES

logger = logging.getLogger(__name__)

ALLOWED_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "model.safetensors.index.json",
    "*.safetensors",
]
"""Never code, never pickles. Patterns match below subdirectories too, hence the exclusions."""
EXCLUDED_FILES = ["*/*", "consolidated*.safetensors"]
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    hf_token: str | None = None,
) -> Path:
    """The directory or file that holds the model, downloading it first if `model` is a hub id.

    `HF_HUB_OFFLINE=1` is honoured by huggingface_hub: only what is already in its cache is found.

    Raises:
        CheckpointError: no such directory, or the files cannot be downloaded; says which, and what to do.
    """
    if (local := find_local(model)) is not None:
        return local
    hub = partial(_download, revision=revision, download_dir=download_dir, hf_token=hf_token)
    if (wanted := gguf_files.HUB_FILE.fullmatch(model)) is not None:
        return _gguf(wanted, hub)
    return _with_config(model, hub(model))


def find_local(model: str) -> Path | None:
    """The model's directory or file on this machine; None if `model` can only be a hub id. Uses no network.

    Raises `CheckpointError` for what is neither, and for a directory or file that holds no model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if any(path.glob("*.safetensors")) or (file := gguf_files.in_directory(path)) is None:
            if not (path / "config.json").is_file():
                raise CheckpointError(_no_model(path))
            return path
        return file
    if path.is_file():
        if path.suffix in FILES:
            return path
        raise CheckpointError(
            f"{path} is a file; point to the directory that holds config.json and the weights"
        )
    if model.startswith(("/", ".", "~")) or not _may_be_on_hub(model):
        raise CheckpointError(
            f"model {model!r} is neither a directory here nor a hub id (owner/name); check the path"
        )
    return gguf_files.in_package(model)


def _may_be_on_hub(model: str) -> bool:
    return any(pattern.fullmatch(model) for pattern in (HUB_ID, gguf_files.HUB_FILE))


def _no_model(path: Path) -> str:
    """An error message with the kind of files that the directory contains."""
    if (path / "adapter_config.json").is_file():
        return (
            f"{path} holds an adapter (adapter_config.json), not a model; serve its base model with "
            f"--enable-lora --lora-modules NAME={path}, or merge them (merge_and_unload())"
        )
    if (path / "params.json").is_file():
        return (
            f"{path} has params.json and no config.json: it is in the layout of its makers; "
            "download the model in Hugging Face's layout"
        )
    inside = sorted(child.parent for child in path.glob("*/config.json"))
    inside += sorted(child.parent for child in path.glob("snapshots/*/config.json"))
    if inside:
        return f"{path} has no config.json; did you mean {inside[0]}?"
    what = "has no config.json" if any(path.iterdir()) else "is empty"
    return (
        f"{path} {what}; point to a directory in Hugging Face's layout (config.json, .safetensors)"
    )


def resolve_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    hf_token: str | None = None,
) -> Path:
    """A directory (with or without a config.json) or file as it is, or a hub id's files without its weights.

    Raises `CheckpointError` as `resolve_model` does.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not any(path.glob("*.gguf")):
        return path
    hub = partial(_download, revision=revision, download_dir=download_dir, hf_token=hf_token)
    if (wanted := gguf_files.HUB_FILE.fullmatch(name)) is not None:
        return find_local(name) or _gguf(wanted, hub)
    files = [pattern for pattern in ALLOWED_FILES if not pattern.endswith(".safetensors")]
    return find_local(name) or hub(name, files=files)


def resolve_config(name: str) -> Path:
    """The directory of a hub id's config.json. No other file is downloaded. Raises `CheckpointError` as
    `resolve_model` does."""
    return _with_config(name, _download(name, files=["config.json"]))


def _download(
    repo_id: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    hf_token: str | None = None,
    files: list[str] = ALLOWED_FILES,
    excluded: list[str] = EXCLUDED_FILES,
) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    where = f"model {repo_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        snapshot = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=download_dir,
            token=hf_token,
            allow_patterns=files,
            ignore_patterns=excluded,
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{where} is gated: accept its licence on huggingface.co, then pass --hf-token or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{where} does not exist on the hub; check --revision") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{where} is not on the hub, or is private; check the name, or pass --hf-token. "
            "For a local model give the path of its directory"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{where} is no directory here and not in the hub's cache, and the hub cannot be reached (or "
            "HF_HUB_OFFLINE is set); check the path, or download it where there is a network"
        ) from error
    except (
        Exception
    ) as error:  # the HTTP library's own errors: timeouts, proxies, certificates, a full disk
        raise CheckpointError(
            f"{where} could not be downloaded ({type(error).__name__}); check the network and the "
            "disk, or give the path of a local directory"
        ) from error
    path = Path(snapshot)
    logger.info("model %s resolved to commit %s", repo_id, path.name)
    return path


def _with_config(name: str, path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"model {name!r} has no config.json; it is not in Hugging Face's layout. Of a repository with "
            f"GGUF files name one: {name}:Q4_K_M"
        )
    return path


def _gguf(wanted: re.Match[str], hub: Callable[..., Path]) -> Path:
    """The file of a match of `gguf_files.HUB_FILE`, downloaded. Of a missing one the error names those that
    there are."""
    import huggingface_hub

    files = gguf_files.patterns(wanted)
    snapshot = hub(wanted["repo"], files=files, excluded=gguf_files.NO_MODELS)
    if (found := gguf_files.in_snapshot(snapshot, wanted)) is not None:
        return found
    try:
        names = huggingface_hub.list_repo_files(wanted["repo"], revision=snapshot.name)
    except Exception:  # only for the message
        names = []
    others = sorted(name for name in names if name.endswith(".gguf"))
    raise CheckpointError(
        f"model {wanted['repo']!r} has no GGUF file for {wanted['tag'] or wanted['file']}; "
        + (
            f"it has {gguf_files.list_files(others)}"
            if others
            else "look on huggingface.co for its files"
        )
    )
