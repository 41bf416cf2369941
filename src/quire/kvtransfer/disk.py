"""A tier on a disk: append-only segments, found again after a restart.

A directory per fingerprint and share of the model; two processes never use the same one (`disk_files.py`).
A segment is a header, which says whose KV it has, and records: a header with the block's name and length,
and the payload, which `codec.py` checks. A segment that is complete ends with a copy of its records' headers.
Nothing waits for the disk (no fsync): a record that is lost or torn is a miss.

The index is in memory. At start a thread rebuilds it without reading payloads, newest segment first. In a
segment that a crash left incomplete, it follows the records and cuts off what is behind the last good one.
When the size is reached, the segment that was used longest ago is deleted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

from quire.kvtransfer.base import BlockBytes, Note, ignore
from quire.kvtransfer.codec import Codec
from quire.kvtransfer.disk_files import Directory, UnusableFileError, check_disk
from quire.messages import BlockName

R = TypeVar("R")
logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
SEGMENT_BYTES = 64 << 20
READ_AHEAD = 4 << 20
"""Bytes around a block that the system reads with it."""
TOUCH_SECONDS = 10.0
"""How exactly a file's time says when it was last used. After a restart that is all there is."""

_SEGMENT = struct.Struct("<8sIQ32s")
"""Magic, format version, block_bytes, digest of fingerprint and share."""
_MAGIC = b"quire-kv"
_RECORD = struct.Struct("<4sHxxI32s")
"""Magic, group, payload's length, hash. The crc32 of these follows; the payload has its own."""
_RECORD_MAGIC = b"kvr1"
_RECORD_BYTES = _RECORD.size + 4
_END = struct.Struct("<4sII")
"""Ends a segment that is complete, after the copy of its records' headers: magic, the copy's length and
crc32."""
_END_MAGIC = b"kve1"


@dataclass(eq=False, slots=True)
class _Segment:
    file: str
    size: int
    last_used: float
    """Wall clock, as files have it."""
    touched: float = 0.0
    names: list[BlockName] = field(default_factory=list)
    heads: bytearray = field(default_factory=lambda: bytearray(_END_MAGIC))
    """While it is written, the copy of the records' headers for its end. What it begins with is no record."""


@dataclass(frozen=True, slots=True)
class _Place:
    segment: _Segment
    offset: int
    length: int
    """Of the payload."""

    @property
    def end(self) -> int:
        return self.offset + _RECORD_BYTES + self.length


class DiskTier:
    """Blocks on a disk, at most `size` bytes. A `Tier`.

    `fingerprint` and `share` say whose KV it is, and `block_bytes` how long a block is: KV of any other kind
    is in another directory, and a segment that is in the wrong one is deleted. `also_others`: `size` includes
    what is left of other models in `path`, which is deleted as if it were this one's; one rank does that.

    Any error while it runs turns the tier off, with one warning, and the engine continues without it. Raises
    `ConfigError` if `path` cannot be used.
    """

    label = "disk"

    def __init__(
        self,
        path: str | Path,
        size: int,
        *,
        fingerprint: bytes,
        share: str,
        block_bytes: int,
        codec: Codec,
        also_others: bool = True,
    ) -> None:
        check_disk(path, size, block_bytes)
        self._directory = Directory(Path(path).expanduser(), fingerprint, share)
        self.capacity = size
        self._segment_bytes = min(SEGMENT_BYTES, size // 4)
        self._codec = codec
        head = _SEGMENT.pack(_MAGIC, FORMAT_VERSION, block_bytes, self._directory.identity)
        self._head = head + crc32(head).to_bytes(4, "little")
        self._index: dict[BlockName, _Place] = {}
        self._segments: dict[str, _Segment] = {}
        self.num_bytes = 0
        """Of all segments that count against `capacity`."""
        self._also_others = also_others
        self._lock = threading.RLock()
        """For all that writes or changes the index. Lookups and reads take none."""
        self._active: _Segment | None = None
        self._fd = -1
        self._ahead: tuple[_Segment | None, int] = None, 0
        """Where `READ_AHEAD` bytes were asked for last."""
        self._off = self._closed = False
        self._generation = 0
        """Rises with `clear`: what was begun before it is not finished."""
        self.note: Note = ignore
        self.counts: Counter[str] = Counter()
        """Since the start, by the names of `TierStats`."""
        names = self._directory.segments()
        self._next_number = 1 + max((int(name.partition(".")[0]) for name in names), default=0)
        self._scan = threading.Thread(
            target=self._guarded, args=(self._rebuild, names), name="kv-disk-scan", daemon=True
        )
        self._scan.start()

    @property
    def is_on(self) -> bool:
        return not (self._off or self._closed)

    def wait_indexed(self, timeout: float | None = None) -> bool:
        """Wait until all that is on the disk has been found."""
        self._scan.join(timeout)
        return not self._scan.is_alive()

    def __len__(self) -> int:
        return len(self._index)

    def has(self, name: BlockName) -> bool:
        return name in self._index

    def put(self, name: BlockName, data: BlockBytes) -> bool:
        return self._guarded(self._put, name, data) or False

    def get(self, name: BlockName, out: BlockBytes) -> bool:
        return self._guarded(self._get, name, out) or False

    def clear(self) -> None:
        with self._lock:
            self._generation += 1
            for segment in list(self._segments.values()):
                self._guarded(self._forget, segment)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._guarded(self._seal)
            self._closed = True
            self._close_file()
            self._index.clear()
        self._scan.join()
        self._directory.close()

    def _guarded(self, action: Callable[..., R], *args: Any) -> R | None:
        """Do it; any error turns the tier off."""
        if not self.is_on:
            return None
        try:
            return action(*args)
        except Exception as error:  # whatever it is, the engine can do without this tier
            with self._lock:
                if self.is_on:
                    self._off = True
                    for name in list(self._index):
                        self._drop(name)
                    logger.warning(
                        "KV on disk is off until the next start: %s (%s)",
                        error, self._directory.path,
                    )  # fmt: skip
            return None

    # Reading

    def _get(self, name: BlockName, out: BlockBytes) -> bool:
        place = self._index.get(name)
        if place is None:
            return False
        segment, head = place.segment, _record_head(name, place.length)
        record = memoryview(bytearray(len(head) + place.length))
        try:
            with self._opened(segment.file) as (fd, _):
                self._read_ahead(fd, place)
                count = os.preadv(fd, [record], place.offset)
        except UnusableFileError:  # deleted or replaced
            with self._lock:
                self._forget(segment)
            return False
        payload = record[len(head) : count]
        if record[: len(head)] == head and self._codec.decode(payload, out):
            self._use(segment)
            with self._lock:
                self.counts["loaded_blocks"] += 1
                self.counts["read_bytes"] += count
            return True
        with self._lock:
            self.counts["damaged_blocks"] += 1
            if self._index.get(name) is place:
                self._drop(name)
        return False

    def _read_ahead(self, fd: int, place: _Place) -> None:
        """The neighbours of a block that is read are usually read next. They follow it or, since the cache
        evicts the end of a prefix first, precede it."""
        segment, start = self._ahead
        if segment is not place.segment or not start <= place.offset < start + READ_AHEAD:
            start = max(0, place.offset - READ_AHEAD // 2)
            self._ahead = place.segment, start
            os.posix_fadvise(fd, start, READ_AHEAD, os.POSIX_FADV_WILLNEED)

    @contextlib.contextmanager
    def _opened(self, file: str, flags: int = os.O_RDONLY) -> Iterator[tuple[int, os.stat_result]]:
        """A segment that is this tier's. Raises `UnusableFileError`."""
        fd, found = self._directory.open(file, flags)
        try:
            if os.pread(fd, len(self._head), 0) != self._head:
                raise UnusableFileError(f"{file} has KV of another model or format")
            yield fd, found
        finally:
            os.close(fd)

    def _use(self, segment: _Segment) -> None:
        segment.last_used = now = time.time()
        if now - segment.touched > TOUCH_SECONDS:
            segment.touched = now
            self._directory.touch(segment.file)

    # Writing

    def _put(self, name: BlockName, data: BlockBytes) -> bool:
        generation = self._generation
        known = self._index.get(name)
        if known is not None:
            self._use(known.segment)
            return True
        payload = self._codec.encode(data)
        head = _record_head(name, len(payload))
        size = len(head) + len(payload)
        with self._lock:
            if name in self._index or not self.is_on or generation != self._generation:
                return name in self._index
            segment = self._active
            if segment is None or segment.size + size > self._segment_bytes:
                segment = self._new_segment()
            if not self._make_room(size):
                return False
            self._write([head, payload], segment.size)
            self._index[name] = _Place(segment, segment.size, len(payload))
            self.note(name, True)
            segment.names.append(name)
            segment.heads += head
            segment.size += size
            segment.last_used = time.time()
            self.num_bytes += size
            self.counts["saved_blocks"] += 1
            self.counts["written_bytes"] += size
        return True

    def _write(self, parts: Sequence[bytes], offset: int) -> None:
        rest = [memoryview(part) for part in parts]
        while rest:
            count = os.pwritev(self._fd, rest, offset)
            offset += count
            while rest and count >= len(rest[0]):
                count -= len(rest.pop(0))
            if rest:
                rest[0] = rest[0][count:]

    def _new_segment(self) -> _Segment:
        self._seal()
        file = f"{self._next_number:010}.kv"
        self._next_number += 1
        self._fd = self._directory.create(file)
        self._write([self._head], 0)
        self._active = segment = _Segment(file, len(self._head), time.time())
        self._add(segment)
        if self._also_others:  # when something is written first, all ranks have their directories
            self._also_others = False
            for other, found in self._directory.others():
                self._add(_Segment(other, found.st_size, found.st_mtime))
        return segment

    def _seal(self) -> None:
        """No more records go to the segment being written."""
        segment = self._active
        if segment is not None:
            end = _END.pack(_END_MAGIC, len(segment.heads), crc32(segment.heads))
            self._write([bytes(segment.heads), end], segment.size)
            self.num_bytes += len(segment.heads) + len(end)
            segment.size += len(segment.heads) + len(end)
            self._close_file()

    def _close_file(self) -> None:
        if self._active is not None:
            os.close(self._fd)
            self._active.heads.clear()
            self._active = None

    def _add(self, segment: _Segment) -> None:
        self._segments[segment.file] = segment
        self.num_bytes += segment.size

    def _make_room(self, size: int) -> bool:
        """Delete what was used longest ago, until there is room."""
        while self.num_bytes + size > self.capacity:
            sealed = [each for each in self._segments.values() if each is not self._active]
            if not sealed:
                return False
            oldest = min(sealed, key=lambda each: each.last_used)
            self.counts["evicted_blocks"] += len(oldest.names)
            self._forget(oldest)
        return True

    def _forget(self, segment: _Segment) -> None:
        """Its blocks are misses from now on, and its file is deleted."""
        if self._segments.pop(segment.file, None) is None:
            return
        if segment is self._active:
            self._close_file()
        self.num_bytes -= segment.size
        for name in segment.names:
            place = self._index.get(name)
            if place is not None and place.segment is segment:
                self._drop(name)
        self._directory.delete(segment.file)

    def _drop(self, name: BlockName) -> None:
        del self._index[name]
        self.note(name, False)

    # After a restart

    def _rebuild(self, files: Sequence[str]) -> None:
        started, generation = time.perf_counter(), self._generation
        for file in files:
            segment, places = self._scan_segment(file)
            with self._lock:
                if not self.is_on:
                    return
                if segment is None or generation != self._generation:
                    self._directory.delete(file)
                    continue
                self._add(segment)
                for name, place in places:
                    segment.names.append(name)
                    self._index.setdefault(name, place)
        if files:
            seconds = time.perf_counter() - started
            logger.info(
                "KV on disk: found %d blocks, %.2f GiB, in %.2f s",
                len(self._index), self.num_bytes / 2**30, seconds,
            )  # fmt: skip

    def _scan_segment(self, file: str) -> tuple[_Segment | None, list[tuple[BlockName, _Place]]]:
        """What is in it. None: it is of no use here."""
        places = []
        try:
            with self._opened(file, os.O_RDWR) as (fd, found):
                segment = _Segment(file, len(self._head), found.st_mtime, found.st_mtime)
                end = found.st_size - _END.size
                magic, length, checksum = _END.unpack(os.pread(fd, _END.size, end))
                copy = os.pread(fd, length, max(0, end - length)) if magic == _END_MAGIC else b""
                complete = bool(copy) and crc32(copy) == checksum
                for head in _split(copy) if complete else _walk(fd, segment):
                    _, group, length, name_hash = _RECORD.unpack_from(head)
                    name, place = (name_hash, group), _Place(segment, segment.size, length)
                    if head != _record_head(name, length) or place.end > found.st_size:
                        break
                    places.append((name, place))
                    segment.size = place.end
                if complete:
                    segment.size = found.st_size
                else:
                    os.truncate(fd, segment.size)
        except UnusableFileError as error:
            logger.info("KV on disk: deleted %s", error)
            return None, []
        return segment, places


def _record_head(name: BlockName, length: int) -> bytes:
    head = _RECORD.pack(_RECORD_MAGIC, name[1], length, name[0])
    return head + crc32(head).to_bytes(4, "little")


def _split(heads: bytes) -> Iterator[bytes]:
    for start in range(len(_END_MAGIC), len(heads), _RECORD_BYTES):
        yield heads[start : start + _RECORD_BYTES]


def _walk(fd: int, segment: _Segment) -> Iterator[bytes]:
    """The header at the segment's size so far, again and again."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    while len(head := os.pread(fd, _RECORD_BYTES, segment.size)) == _RECORD_BYTES:
        yield head
