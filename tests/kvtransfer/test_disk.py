"""The disk tier: what it finds is what was put, whatever has happened to its files."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from quire.errors import ConfigError
from quire.kvtransfer import disk
from quire.kvtransfer.base import BlockBytes
from quire.kvtransfer.codec import Codec
from quire.kvtransfer.disk import DiskTier
from quire.kvtransfer.disk_files import check_disk
from quire.messages import BlockName

BLOCK, SMALL = 96, 16
RECORD = disk._RECORD_BYTES + 16 + BLOCK
HEAD = disk._SEGMENT.size + 4
GIB = 1 << 30

Open = Callable[..., DiskTier]


def name_of(number: int, group: int = 0) -> BlockName:
    return hashlib.sha256(b"%d" % number).digest(), group


def block_of(number: int, size: int = BLOCK) -> BlockBytes:
    return np.random.default_rng(number).integers(0, 256, size, np.uint8)


def put(tier: DiskTier, *numbers: int, size: int = BLOCK) -> None:
    for number in numbers:
        assert tier.put(name_of(number), block_of(number, size))


def found(tier: DiskTier, *numbers: int, size: int = BLOCK) -> list[int]:
    """Which of them it has. All that it has must be right."""
    result = []
    for number in numbers:
        out = np.zeros(size, np.uint8)
        if tier.get(name_of(number), out):
            assert (out == block_of(number, size)).all(), "wrong KV"
            result.append(number)
    return result


@pytest.fixture
def open_tier(tmp_path: Path) -> Iterator[Open]:
    tiers = []

    def open_(path: Path = tmp_path / "kv", size: int = 1 << 20, **options: object) -> DiskTier:
        settings: dict[str, object] = {
            "fingerprint": b"model",
            "share": "0/1",
            "block_bytes": BLOCK,
        }
        tier = DiskTier(path, size, codec=Codec(2, None), **(settings | options))  # type: ignore[arg-type]
        tiers.append(tier)
        assert tier.wait_indexed(60)
        return tier

    yield open_
    for tier in tiers:
        tier.close()


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*/*.kv"))


def test_a_path_in_the_home_directory(open_tier: Open, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(open_tier(Path("~/kv")), 1)
    assert len(segments(tmp_path / "kv")) == 1


def test_another_engine_may_delete_segments_meanwhile(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda self, _: iter([self / "a" / "0000000001.kv"]))
    check_disk(tmp_path / "kv", 1 << 20, BLOCK)


def test_what_was_put_is_found(open_tier: Open) -> None:
    tier = open_tier()
    put(tier, 1, 2, 3, 2)
    assert found(tier, 3, 2, 1, 4) == [3, 2, 1]
    assert tier.has(name_of(1)) and not tier.has(name_of(4)) and not tier.has(name_of(1, group=1))
    assert len(tier) == 3
    assert tier.num_bytes == HEAD + 3 * RECORD


def test_groups_are_told_apart(open_tier: Open) -> None:
    tier = open_tier()
    assert tier.put(name_of(1, 0), block_of(10)) and tier.put(name_of(1, 1), block_of(11))
    out = np.zeros(BLOCK, np.uint8)
    assert tier.get(name_of(1, 1), out) and (out == block_of(11)).all()
    assert tier.get(name_of(1, 0), out) and (out == block_of(10)).all()


def test_found_again_after_a_restart(open_tier: Open) -> None:
    for start in range(0, 9, 3):
        tier = open_tier()
        assert found(tier, *range(9)) == list(range(start))
        put(tier, *range(start, start + 3))
        tier.close()
        assert found(tier, 0) == [] and not tier.put(name_of(0), block_of(0))
    assert found(open_tier(), *range(9)) == list(range(9))


def test_found_again_if_it_was_not_closed(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    put(tier, 1, 2)
    shutil.copytree(tmp_path / "kv", tmp_path / "copy", copy_function=shutil.copy2)
    (tmp_path / "copy").chmod(0o700)
    again = open_tier(tmp_path / "copy")
    assert found(again, 1, 2) == [1, 2]
    put(again, 3)
    assert found(again, 1, 2, 3) == [1, 2, 3]


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_every_byte_that_is_flipped_is_a_miss(
    open_tier: Open, tmp_path: Path, running: bool, closed: bool
) -> None:
    path = tmp_path / "kv"
    writer = open_tier()
    put(writer, 0, 1)
    if closed:
        writer.close()
    (file,) = segments(path)
    content = file.read_bytes()
    assert len(content) > HEAD + 2 * RECORD if closed else len(content) == HEAD + 2 * RECORD
    for at in range(len(content)):
        folder = tmp_path / "flipped"
        (folder / file.parent.name).mkdir(mode=0o700, parents=True)
        folder.chmod(0o700)
        copy = folder / file.parent.name / file.name
        damaged = bytearray(content)
        damaged[at] ^= 1 << (at % 8)
        copy.write_bytes(content if running else damaged)
        copy.chmod(0o600)
        tier = open_tier(folder)
        if running:
            copy.write_bytes(damaged)
        there, record = found(tier, 0, 1), (at - HEAD) // RECORD
        if at < HEAD:
            assert there == []
        elif record > 1:  # the copy of the headers: the records are followed instead
            assert there == [0, 1]
        elif running or closed:
            assert there == [each for each in range(2) if each != record]
        else:  # if it is the header, the scan ends there
            assert there in ([each for each in range(2) if each != record], list(range(record)))
        put(tier, 0, 1)  # what is damaged is written again
        assert found(tier, 0, 1) == [0, 1]
        tier.close()
        shutil.rmtree(folder)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_truncated_at_every_length(
    open_tier: Open, tmp_path: Path, running: bool, closed: bool
) -> None:
    small = RECORD - BLOCK + SMALL
    writer = open_tier(block_bytes=SMALL)
    put(writer, 0, 1, 2, size=SMALL)
    if closed:
        writer.close()
    (file,) = segments(tmp_path / "kv")
    content = file.read_bytes()
    for length in range(len(content)):
        folder = tmp_path / "short"
        (folder / file.parent.name).mkdir(mode=0o700, parents=True)
        folder.chmod(0o700)
        copy = folder / file.parent.name / file.name
        copy.write_bytes(content if running else content[:length])
        copy.chmod(0o600)
        tier = open_tier(folder, block_bytes=SMALL)
        if running:
            os.truncate(copy, length)
        assert len(tier) <= 3
        whole = min(3, max(0, length - HEAD) // small)
        assert found(tier, 0, 1, 2, size=SMALL) == list(range(whole))
        if not running:
            assert not copy.exists() or copy.stat().st_size == HEAD + whole * small
        put(tier, 0, 1, 2, size=SMALL)
        assert found(tier, 0, 1, 2, size=SMALL) == [0, 1, 2]
        tier.close()
        shutil.rmtree(folder)


def test_swapped_segments(open_tier: Open, tmp_path: Path) -> None:
    for numbers in ((0, 1), (2, 3)):
        tier = open_tier()
        put(tier, *numbers)
        tier.close()
    first, second = segments(tmp_path / "kv")
    tier = open_tier()
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    assert found(tier, 0, 1, 2, 3) == []
    tier.close()
    assert found(open_tier(), 0, 1, 2, 3) == [0, 1, 2, 3]


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    "other", [{"fingerprint": b"another"}, {"share": "1/2"}, {"block_bytes": 192}, {"version": 2}]
)
def test_segments_of_another_kind(
    open_tier: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: dict[str, object],
    running: bool,
) -> None:
    tier = open_tier()
    put(tier, 0)
    tier.close()
    (mine,) = segments(tmp_path / "kv")
    with monkeypatch.context() as patched:
        if "version" in other:
            patched.setattr(disk, "FORMAT_VERSION", other["version"])
        settings = {key: value for key, value in other.items() if key != "version"}
        foreign = open_tier(tmp_path / "other", **settings)
        foreign.put(name_of(0), block_of(7))  # KV of the same tokens
        foreign.close()
    if running:
        tier = open_tier()
    (theirs,) = segments(tmp_path / "other")
    shutil.copy(theirs, mine)
    if not running:
        tier = open_tier()
    assert found(tier, 0) == []
    assert not mine.exists()
    put(tier, 0)
    assert found(tier, 0) == [0]


def make_link(file: Path, aside: Path) -> None:
    file.rename(aside)
    file.symlink_to(aside)


def make_hard_link(file: Path, aside: Path) -> None:
    os.link(file, aside)


def make_public(file: Path, _: Path) -> None:
    file.chmod(0o644)


def make_pipe(file: Path, _: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def make_foreign(file: Path, _: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(file, 12345, 12345)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    "change", [make_link, make_hard_link, make_public, make_pipe, make_foreign, lambda *_: None]
)
def test_files_that_are_not_private(
    open_tier: Open, tmp_path: Path, change: Callable[[Path, Path], None], running: bool
) -> None:
    tier = open_tier()
    put(tier, 0)
    tier.close()
    (file,) = segments(tmp_path / "kv")
    if running:
        tier = open_tier()
    change(file, tmp_path / "aside")
    if not running:
        tier = open_tier()
    assert found(tier, 0) == ([0] if change.__name__ == "<lambda>" else [])
    assert file.exists() == (change.__name__ == "<lambda>")


def test_a_directory_named_like_a_segment_is_left_alone(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    tier.close()
    (folder,) = (tmp_path / "kv").iterdir()
    (folder / "0000000007.kv").mkdir()
    put(open_tier(), 1)
    assert (folder / "0000000007.kv").is_dir()


def test_modes(open_tier: Open, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        put(open_tier(), 1)
    finally:
        os.umask(old)
    for path in (tmp_path / "kv").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700


def test_paths_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, size: int = 1 << 20) -> str:
        with pytest.raises(ConfigError) as caught:
            check_disk(path, size, BLOCK)
        return str(caught.value)

    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(target)
    assert "is a symbolic link: name the directory" in refused(tmp_path / "link")
    (tmp_path / "file").write_text("")
    assert "is not a directory" in refused(tmp_path / "file")
    assert "cannot be used" in refused(tmp_path / "file" / "below")
    target.chmod(0o777)
    assert f"chmod 700 {target}" in refused(target)
    target.chmod(0o700)
    assert "are too small: at least" in refused(target, 8 * BLOCK)
    assert "has room for" in refused(target, 1 << 60)
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)  # root may write anywhere
        assert "is not writable" in refused(target)
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: 4242)
        assert "this process is user 4242" in refused(target)
    check_disk(target, 1 << 20, BLOCK)
    check_disk(tmp_path / "new" / "deep", 1 << 20, BLOCK)


def test_a_directory_in_it_that_is_not_private(open_tier: Open, tmp_path: Path) -> None:
    open_tier().close()
    (folder,) = (tmp_path / "kv").iterdir()
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="not a private directory of this user"):
        open_tier()
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="cannot be used"):
        open_tier()


def test_the_segment_used_longest_ago_is_deleted_first(
    open_tier: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1_000_000_000, 2_000_000_000, 60))
    monkeypatch.setattr(disk.time, "time", lambda: float(next(clock)))
    size = 4 * (HEAD + 2 * RECORD + 2 * disk._RECORD_BYTES)  # four segments of two blocks
    tier = open_tier(size=size)
    put(tier, *range(6))
    assert found(tier, 0) == [0]  # the first segment is used
    put(tier, *range(6, 10))
    assert found(tier, *range(10)) == [0, 1, 4, 5, 6, 7, 8, 9]
    assert tier.counts["evicted_blocks"] == 2
    put(tier, *range(10, 100))
    assert sum(file.stat().st_size for file in segments(tmp_path / "kv")) == tier.num_bytes <= size
    assert found(tier, *range(100))[-4:] == [96, 97, 98, 99]


def test_after_a_restart_too(open_tier: Open, tmp_path: Path) -> None:
    size = 4 * (HEAD + 2 * RECORD + 2 * disk._RECORD_BYTES)
    tier = open_tier(size=size)
    put(tier, *range(6))
    tier.close()
    for age, file in zip((30, 50, 40), segments(tmp_path / "kv"), strict=True):
        os.utime(file, (0, file.stat().st_mtime - age))
    tier = open_tier(size=size)
    put(tier, 6, 7, 8)
    assert found(tier, *range(10)) == [0, 1, 4, 5, 6, 7, 8]
    tier.close()
    tier = open_tier(size=size - RECORD)  # a smaller one than before
    put(tier, 9)
    assert tier.num_bytes <= size - RECORD


def test_what_other_models_left_counts_and_goes_first(open_tier: Open, tmp_path: Path) -> None:
    size = 4 * (HEAD + 2 * RECORD + 2 * disk._RECORD_BYTES)
    for model in (b"one", b"two"):
        tier = open_tier(size=size, fingerprint=model)
        put(tier, 0, 1)
        if model == b"one":
            tier.close()  # the other one still runs
    for file in segments(tmp_path / "kv"):
        os.utime(file, (0, 0))
    tier = open_tier(size=size)
    put(tier, *range(10, 16))
    assert found(tier, *range(10, 16)) == [10, 11, 12, 13, 14, 15]
    put(tier, 16, 17)
    assert found(tier, *range(10, 18)) == [10, 11, 12, 13, 14, 15, 16, 17]
    assert len(segments(tmp_path / "kv")) == 5
    assert found(open_tier(size=size, fingerprint=b"one"), 0, 1) == []


def test_a_full_disk_turns_it_off(
    open_tier: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount = tmp_path / "mount"
    mount.mkdir(mode=0o700)
    options = ["-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", str(mount)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        tier = open_tier(mount, size=200_000)
        put(tier, 0)
        (mount / "filler").write_bytes(b"")
        with pytest.raises(OSError, match="No space"), (mount / "filler").open("wb", 0) as filler:
            while True:
                filler.write(bytes(4096))
        with caplog.at_level(logging.WARNING):
            assert not all(tier.put(name_of(n), block_of(n)) for n in range(1, 200))
            assert not tier.put(name_of(300), block_of(300))
        (record,) = caplog.records
        assert "KV on disk is off" in record.message and "No space left" in record.message
        assert not tier.is_on and not tier.has(name_of(0)) and found(tier, 0) == []
        tier.close()
        (mount / "filler").unlink()
        tier = open_tier(mount, size=200_000)
        assert found(tier, *range(3)) == [0, 1, 2]
        tier.close()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("call", ["pwritev", "preadv", "utime", "open"])
def test_any_other_error_turns_it_off_too(
    open_tier: Open,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    tier = open_tier()
    put(tier, 0)

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(os, call, fail)
        assert not tier.put(name_of(1), block_of(1)) or not tier.get(name_of(0), block_of(0))
        assert not tier.get(name_of(0), block_of(0))
        assert len(caplog.records) == 1
    tier.clear()
    tier.close()
    assert 0 in found(open_tier(), 0)


def test_clear_forgets_everything(open_tier: Open, tmp_path: Path) -> None:
    tier = open_tier()
    put(tier, 0, 1)
    tier.close()
    tier = open_tier()
    put(tier, 2)
    tier.clear()
    assert found(tier, 0, 1, 2) == [] and tier.num_bytes == 0 and not segments(tmp_path / "kv")
    put(tier, 3)
    tier.close()
    assert found(open_tier(), *range(4)) == [3]


def test_what_was_begun_before_clear_is_not_kept(open_tier: Open) -> None:
    tier = open_tier()

    class Clearing(Codec):
        def encode(self, data: BlockBytes) -> bytes:
            tier.clear()
            return super().encode(data)

    tier._codec = Clearing(2, None)
    assert not tier.put(name_of(0), block_of(0))
    assert not tier.has(name_of(0))


def test_clear_during_the_scan(open_tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        tier = open_tier()
        put(tier, number)
        tier.close()
    scan, started, go_on = DiskTier._scan_segment, threading.Event(), threading.Event()

    def slow(self: DiskTier, file: str) -> object:
        started.set()
        assert go_on.wait(60)
        return scan(self, file)

    monkeypatch.setattr(DiskTier, "_scan_segment", slow)
    monkeypatch.setattr(DiskTier, "wait_indexed", lambda *_: True)
    tier = open_tier()
    monkeypatch.undo()
    assert started.wait(60)
    put(tier, 7)
    tier.clear()
    put(tier, 8)
    go_on.set()
    assert tier.wait_indexed(60)
    assert found(tier, 0, 1, 2, 7, 8) == [8]
    tier.close()
    assert found(open_tier(), 0, 1, 2, 7, 8) == [8]


def test_many_threads(open_tier: Open) -> None:
    tier = open_tier(size=40 * RECORD)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(300):
                number = draw.randrange(60)
                if draw.random() < 0.5:
                    tier.put(name_of(number), block_of(number))
                else:
                    found(tier, number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and tier.is_on and tier.counts["evicted_blocks"]
    assert found(tier, *range(60))
    assert tier.counts["damaged_blocks"] == 0


WRITER = """
import sys
from pathlib import Path
from tests.kvtransfer.test_disk import BLOCK, Codec, DiskTier, block_of, name_of
tier = DiskTier(Path(sys.argv[1]), 1 << 20, fingerprint=b"model", share="0/1", block_bytes=BLOCK,
                codec=Codec(2, None))
tier.wait_indexed()
print(len(tier), flush=True)
number = 0
while True:
    if not tier.has(name_of(number)):
        assert tier.put(name_of(number), block_of(number))
    number += 1
    print(number, flush=True)
"""


def writer(path: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=environment
    )


def test_killed_while_writing(open_tier: Open, tmp_path: Path) -> None:
    draw, blocks = random.Random(7), 0
    for _ in range(3):
        with writer(tmp_path / "kv") as process:
            assert process.stdout is not None
            assert int(process.stdout.readline()) >= blocks
            for _ in range(draw.randrange(100, 400)):
                blocks = max(blocks, int(process.stdout.readline()))
            process.send_signal(signal.SIGKILL)
            process.stdout.read()
    tier = open_tier()
    there = found(tier, *range(blocks + 1000))
    assert there == list(range(len(there))) and len(there) >= blocks
    assert tier.counts["damaged_blocks"] == 0


def test_two_processes_have_two_directories(open_tier: Open, tmp_path: Path) -> None:
    with writer(tmp_path / "kv") as process:
        assert process.stdout is not None
        process.stdout.readline()
        tier = open_tier()
        put(tier, 5000)
        assert len(list((tmp_path / "kv").iterdir())) == 2
        process.stdout.readline()
        process.kill()
        process.stdout.read()
    tier.close()
    again = open_tier()  # the directory of the process that was killed is free
    assert again.has(name_of(0)) and not again.has(name_of(5000))
    assert found(open_tier(), 5000) == [5000]
