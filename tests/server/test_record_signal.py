"""SIGUSR1 writes the record of decisions to files."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from quire.engine.record_files import save
from quire.errors import EngineError
from quire.server.run import _save_on_signal


class Engine:
    def __init__(self, *records: bytes) -> None:
        self.all, self.calls = list(records), 0

    async def records(self) -> list[bytes]:
        self.calls += 1
        if not self.all:
            raise EngineError("it sleeps badly")
        return self.all


def files_after_signal(directory: Path, engine: Engine) -> list[bytes]:
    async def main() -> None:
        _save_on_signal(engine, str(directory))  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGUSR1)
        async with asyncio.timeout(60):
            while not engine.calls or len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.01)

    asyncio.run(main())
    return sorted(path.read_bytes() for path in directory.glob("quire-record-*.bin"))


def test_each_core_has_a_file_that_others_cannot_read(tmp_path: Path) -> None:
    assert files_after_signal(tmp_path, Engine(b"one", b"two")) == [b"one", b"two"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_errors_are_logged(tmp_path: Path, caplog) -> None:
    assert files_after_signal(tmp_path, Engine()) == []
    assert "it sleeps badly" in caplog.text
    assert save(str(tmp_path / "absent"), [b"x"], "why") == []
    assert "could not be written" in caplog.text


def test_the_directory_for_temporary_files_is_the_default(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (path,) = save(None, [b"x"], "why")
    assert path.parent == tmp_path and path.read_bytes() == b"x"
