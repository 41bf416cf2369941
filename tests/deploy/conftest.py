"""Programs that check what is in deploy/, and folders for pods, or a skip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.deploy.kube import tools
from tests.deploy.pod import USER, need_containers


@pytest.fixture(autouse=True, scope="session")
def programs() -> None:
    tools()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where other users may pass."""
    need_containers()
    made = tmp_path_factory.mktemp("pods")
    for each in (made, made.parent):
        each.chmod(0o755)
    return made


@pytest.fixture(scope="session")
def kernels(folder: Path) -> Path:
    """A volume for /cache that pods share, so that kernels are compiled once."""
    made = folder / "kernels"
    made.mkdir()
    os.chown(made, 0, USER)
    made.chmod(0o2777)
    return made
