"""scripts/audit: what OSV's records say of a version, and that nothing is called checked that was not."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path

import pytest
from tests.scripts.loading import load_script

audit = load_script("audit")


def record(name: str, *events: dict, versions=(), **more) -> dict:
    affected = {
        "package": {"ecosystem": "PyPI", "name": name},
        "ranges": [{"type": "ECOSYSTEM", "events": list(events)}],
        "versions": list(versions),
    }
    return {
        "id": "PYSEC-1",
        "modified": "2026-11-01T00:00:00Z",
        "summary": "bad",
        "affected": [affected],
    } | more


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "lock.txt"
    path.write_text(
        "# comment\nFast_API==1.5.0\nother==2.0 \\\n    --hash=sha256:" + "a" * 64 + "\n"
    )
    return path


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(audit.sys, "executable", str(tmp_path / "bin/python"))


def check(tmp_path: Path, lock: Path, *found: dict, packed: bool = False) -> int:
    folder = tmp_path / "osv"
    folder.mkdir()
    for number, each in enumerate(found):
        (folder / f"{number}.json").write_text(json.dumps(each))
    if packed:
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for file in folder.iterdir():
                archive.write(file, file.name)
        folder = tmp_path / "all.zip"
    return audit.main(["--database", str(folder), str(lock)])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("events", "versions", "hit"),
    [
        ([{"introduced": "0"}], [], True),
        ([{"introduced": "0"}, {"fixed": "1.5.0"}], [], False),
        ([{"introduced": "0"}, {"fixed": "1.5.1"}], [], True),
        ([{"introduced": "1.5.1"}], [], False),
        ([{"introduced": "0"}, {"last_affected": "1.5.0"}], [], True),
        ([{"introduced": "0"}, {"last_affected": "1.4"}], [], False),
        ([{"introduced": "0"}, {"fixed": "1.0"}, {"introduced": "1.5"}, {"fixed": "1.10"}], [], True),
        ([{"introduced": "1.5"}, {"fixed": "1.10"}, {"introduced": "0"}, {"fixed": "1.0"}], [], True),
        ([], ["1.5.0"], True), ([], ["1.4"], False),
    ],
)  # fmt: skip
def test_ranges(tmp_path, lock, capsys, events, versions, hit, packed):
    status = check(tmp_path, lock, record("fast-api", *events, versions=versions), packed=packed)
    assert status == (audit.FOUND if hit else audit.NOTHING)
    said = capsys.readouterr().out
    assert ("fast-api 1.5.0: PYSEC-1 bad" in said) == hit and "newest of 2026-11-01" in said


def test_other_packages_ecosystems_and_withdrawn_records_do_not_count(tmp_path, lock):
    everything = {"introduced": "0"}
    foreign = record("fast-api", everything)
    foreign["affected"][0]["package"]["ecosystem"] = "npm"
    withdrawn = record("other", everything, withdrawn="2026-01-01T00:00:00Z")
    assert (
        check(tmp_path, lock, record("fastapi2", everything), foreign, withdrawn) == audit.NOTHING
    )


@pytest.mark.parametrize("content", [b"", b"{", b'{"id": 1', b"\xff"])
def test_a_damaged_database_is_not_checked(tmp_path, lock, capsys, content):
    (tmp_path / "osv").mkdir()
    (tmp_path / "osv" / "a.json").write_bytes(content)
    assert audit.main(["--database", str(tmp_path / "osv"), str(lock)]) == audit.NOT_CHECKED
    (tmp_path / "all.zip").write_bytes(content)
    assert audit.main(["--database", str(tmp_path / "all.zip"), str(lock)]) == audit.NOT_CHECKED
    assert audit.main(["--database", str(tmp_path / "absent"), str(lock)]) == audit.NOT_CHECKED
    assert capsys.readouterr().err.count("NOT CHECKED") == 3


def test_without_pip_audit_it_is_not_checked(lock, capsys):
    assert audit.main([str(lock)]) == audit.NOT_CHECKED
    assert "pip-audit is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "status"),
    [
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', audit.NOTHING),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X"}]}]}', audit.FOUND),
        ('{"dependencies": [{"name": "a", "skip_reason": "offline"}]}', audit.NOT_CHECKED),
        ('{"dependencies": []}', audit.NOT_CHECKED),
        ("", audit.NOT_CHECKED),
    ],
)
def test_what_pip_audit_says(tmp_path, lock, output, status):
    """Its exit status is 1 for a vulnerability and for no network, so its answer decides."""
    program = tmp_path / "bin" / "pip-audit"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 'no network' >&2\necho '{output}'\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert audit.main([str(lock)]) == status


def test_our_own_locks_are_read():
    paths = [audit.ROOT / "requirements" / name for name in audit.LOCKS]
    assert {"torch", "pytest", "fastapi"} <= audit.pins(paths).keys()
