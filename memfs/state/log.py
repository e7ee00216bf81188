"""A log of after-images in memory that outlives its writer: what a process had committed, the next one reads.

It is a file on a tmpfs, and the writer has it mapped. A record is a key and what its value is from now on, or that
there is none. Records count once they are committed, all of a transaction or none: they are written behind the end, and
then the end is moved, which is one aligned store of eight bytes. SIGKILL ends a process between two instructions, so
the order of the program is all that is needed: no msync, no checksums. Against a failing machine nothing is needed,
since with that the files are gone, too.

    byte 0     u64 magic   u32 version   u32 whether it is complete   u64 end   u64 serial
    byte 64    records: u16 length of the key, u32 length of the value (2**32 - 1: there is none), key, value

A log only grows. When it is long it is **compacted** into a new one, a little with each commit, so nobody waits for it:
what is committed goes to both meanwhile, and the old one is read up to where its end was, and each record that is the
last of its key is copied. When that is done the new one has all there is; a flag in its header says so, and the old one
goes, in pieces as well. A writer that dies before leaves an incomplete log, which is removed.

How much is read depends on how much was appended, and not on how often: twice as many bytes. So whatever is committed,
both logs together are at most seven times as long as what is true, and some MiB. What is true, and how long that is,
the writer knows: it remembers where the last record of each key begins.

Measured against LMDB (writemap, nosync, without locks) on the same tmpfs, in transactions of four records among 100,000
files: 3.3 us a transaction with LMDB, 4.2 with this, 2.7 of which is to remember what is true; create, stat and unlink
take a hundred times as long. LMDB would need no compaction, but it is a dependency in C. Rejected as well: SQLite (ten
times as slow as LMDB); a child that writes a snapshot (a fork of a large process is a pause, and the child of a dead
writer races with the next one); to copy what is still the value of its key (what changes without being noted is lost).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Final

_MAGIC: Final = int.from_bytes(b"memfslog", "little")
VERSION: Final = 1  #: of what is written from now on, keys and values among that
READABLE: Final = frozenset({VERSION})  #: which can be gone on with
_HEADER: Final = struct.Struct("=QIIQQ")
_VERSION: Final = struct.Struct("=I")
_VERSION_AT: Final = 8  # where the version lies
_FIRST: Final = 64  # where the records begin
_COMPLETE: Final = 12  # where the flag lies
_END: Final = 2  # which u64 of the header is the end
_RECORD: Final = struct.Struct("=HI")
_NO_VALUE: Final = (1 << 32) - 1
_CAPACITY: Final = 1 << 36  # bytes of address space; the file is sparse
_MOST_TRUE: Final = _CAPACITY // 8  # bytes of records that are true: then both logs never need more than there is
_SHORT: Final = 4 << 20  # bytes that are never worth compacting
_FACTOR: Final = 2  # bytes of the old log that are read for each that is appended
_LEAST_READ: Final = 2 << 10  # bytes with each commit
_MOST_READ: Final = 256 << 10  # bytes, which takes 0.2 ms to copy
_MOST_RECORDS: Final = 1024  # with each commit, which takes 0.6 ms to look at
_PIECE: Final = 1 << 20  # bytes of what is freed with each commit, in 0.2 ms
_SIZE_BITS: Final = 40  # of a place: position << _SIZE_BITS | size of the record, one number since there are very many
_SIZE: Final = (1 << _SIZE_BITS) - 1


class UnreadableState(Exception):
    """The state was written by another version; a sentence."""


class _LogFile:
    """One log, mapped. Positions in it begin at `base`, so that those of two logs differ."""

    def __init__(self, root: int, serial: int, *, create: bool, version: int = VERSION) -> None:
        self._root: Final = root
        self.serial: Final = serial
        self.base: Final = serial * _CAPACITY
        self.name: Final = f"log-{serial}"
        fd = os.open(
            self.name, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0), 0o600, dir_fd=root
        )
        try:
            if create:
                os.ftruncate(fd, _CAPACITY)
            self._map = mmap.mmap(fd, _CAPACITY)
        except OSError:
            if create:
                os.unlink(self.name, dir_fd=root)
            raise
        finally:
            os.close(fd)
        self.bytes = memoryview(self._map)
        self._numbers = self.bytes[: _HEADER.size].cast("Q")
        if create:
            _HEADER.pack_into(self.bytes, 0, _MAGIC, version, 0, _FIRST, serial)
        self.end = self._numbers[_END]

    @property
    def version(self) -> int:
        """The version of what is written in it; 0 if it is no log."""
        return _version_in(self.bytes)

    def own(self) -> None:
        """Note that what is written in it is of our version."""
        _VERSION.pack_into(self.bytes, _VERSION_AT, VERSION)

    @property
    def is_complete(self) -> bool:
        """Whether it has all there is."""
        return bool(self.bytes[_COMPLETE])

    def complete(self) -> None:
        """Note that it has all there is."""
        self.bytes[_COMPLETE] = 1

    def append(self, records: bytes) -> None:
        """Append records and commit them."""
        end = self.end + len(records)
        self.bytes[self.end : end] = records
        self._numbers[_END] = self.end = end

    def record(self, position: int) -> tuple[bytes, int]:
        """Return the key of the record at a position, which is an offset without `base`, and its size."""
        key_length, length = _RECORD.unpack_from(self._map, position)
        start = position + _RECORD.size
        end = start + key_length
        return self._map[start:end], end + (length if length != _NO_VALUE else 0) - position

    def places(self) -> dict[bytes, int]:
        """Return the places of the records that are the last of their keys and have a value."""
        places, base = dict[bytes, int](), self.base
        bytes_, unpack, header, position, last = self._map, _RECORD.unpack_from, _RECORD.size, _FIRST, self.end
        while position < last:
            key_length, length = unpack(bytes_, position)
            start = position + header
            after = start + key_length
            key = bytes_[start:after]
            if length == _NO_VALUE:
                places.pop(key, None)
            else:
                after += length
                places[key] = (base + position) << _SIZE_BITS | (after - position)
            position = after
        return places

    def value(self, key: bytes, place: int) -> bytes:
        """Return the value of the record of a key that is at a place."""
        position = (place >> _SIZE_BITS) - self.base
        return self._map[position + _RECORD.size + len(key) : position + (place & _SIZE)]

    def values(self, keys: Iterable[bytes], places: Mapping[bytes, int]) -> list[bytes]:
        """Return the values of keys of which all places are in this log. They may be very many."""
        bytes_, skipped, bits, mask = self._map, _RECORD.size - self.base, _SIZE_BITS, _SIZE
        values = list[bytes]()
        for key in keys:
            place = places[key]
            start = (place >> bits) + skipped
            values.append(bytes_[start + len(key) : start - _RECORD.size + (place & mask)])
        return values

    def read(self, position: int, size: int) -> bytes:
        """Return bytes as they are."""
        return self._map[position : position + size]

    def free(self, start: int) -> int:
        """Free a piece of its memory, and return where the next one begins."""
        self._map.madvise(mmap.MADV_REMOVE, start, _PIECE)
        return start + _PIECE

    def close(self) -> None:
        """Unmap it."""
        self._numbers.release()
        self.bytes.release()
        self._map.close()

    def remove(self) -> None:
        """Remove its name."""
        os.unlink(self.name, dir_fd=self._root)


def _version_in(header: bytes | memoryview) -> int:
    magic, version, *_ = _HEADER.unpack_from(header)
    return int(version) if magic == _MAGIC else 0


def _serials(root: int) -> list[int]:
    return [int(name[4:]) for name in os.listdir(f"/proc/self/fd/{root}") if name.startswith("log-")]


def check_readable(root: int) -> None:
    """Raise UnreadableState if the log in a directory is of a version that cannot be gone on with. Changes nothing."""
    for serial in _serials(root):
        try:
            fd = os.open(f"log-{serial}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
        except FileNotFoundError:  # it was compacted at that moment
            continue
        try:
            header = os.pread(fd, _HEADER.size, 0)
        finally:
            os.close(fd)
        version = _version_in(header) if len(header) == _HEADER.size else 0
        if version and version not in READABLE:
            readable = ", ".join(map(str, sorted(READABLE)))
            raise UnreadableState(f"the state has version {version}; this memfs reads version {readable}")


class Log:
    """The log in a directory, of which `root` is a descriptor. One process at a time may have it.

    Raises UnreadableState, changing nothing.

    >>> import tempfile
    >>> root = os.open(tempfile.mkdtemp(), os.O_PATH)
    >>> log = Log(root)
    >>> log.put(b"one", b"1"); log.put(b"two", b"2"); log.commit()
    >>> log.put(b"one", None); log.commit()
    >>> log.put(b"three", b"3")  # and is not committed
    >>> log.close()
    >>> Log(root).load()
    {b'two': b'2'}
    """

    def __init__(self, root: int) -> None:
        self._root: Final = root
        self._changes: Final[list[tuple[bytes, bytes | None]]] = []  # since the last commit
        self._file = self._open()
        self._next: _LogFile | None = None  # the log that this one is being compacted into
        self._cursor = self._last = 0  # up to where it has been, and up to where it must be: then the next one has it
        self._freed: _LogFile | None = None  # the log that was compacted
        self._freed_to = 0
        self._places: Final = self._file.places()  # by key: of the last record
        self._true = sum(map(_SIZE.__and__, self._places.values()))  # bytes of those
        self._position = self._file.base + self._file.end  # of the next record, in the newest log

    def _open(self) -> _LogFile:
        check_readable(self._root)
        files = [_LogFile(self._root, serial, create=False) for serial in sorted(_serials(self._root))]
        complete = [file for file in files if file.version and file.is_complete]
        for file in files:
            if file not in complete[-1:]:
                file.close()
                file.remove()
        if complete:
            return complete[-1]
        first = _LogFile(self._root, 1, create=True)
        first.complete()
        return first

    @property
    def nbytes(self) -> int:
        """How long all that is there is: of what is being compacted, both."""
        return self._file.end + (self._next.end if self._next is not None else 0)

    @property
    def true_bytes(self) -> int:
        """How long the records are that are true."""
        return self._true

    @property
    def is_full(self) -> bool:
        """Whether nothing that is new should be put: what changes or goes can be, always."""
        return self._true > _MOST_TRUE or self._file.end > _CAPACITY // 2

    def own(self) -> None:
        """Note that from now on what is written is of our version. Until then who wrote it before can go on with it."""
        for file in (self._file, self._next):
            if file is not None:
                file.own()

    def load(self) -> dict[bytes, bytes]:
        """Return what was committed."""
        return {key: self._value(key, place) for key, place in self._places.items()}

    def values(self, keys: Iterable[bytes]) -> list[bytes]:
        """Return the values of keys that have some."""
        if self._next is not None:
            return [self._value(key, self._places[key]) for key in keys]
        return self._file.values(keys, self._places)

    def keys(self) -> Iterable[bytes]:
        """Return the keys of what was committed. They may be very many."""
        return self._places.keys()

    def get(self, key: bytes) -> bytes | None:
        """Return the value that was committed of a key; None if there is none."""
        place = self._places.get(key)
        return self._value(key, place) if place is not None else None

    def _value(self, key: bytes, place: int) -> bytes:
        file = self._file if place >> _SIZE_BITS < self._file.base + _CAPACITY else self._next
        assert file is not None
        return file.value(key, place)

    def put(self, key: bytes, value: bytes | None) -> None:
        """Give a key a value with the next commit; None is no value, for a key that may never have had one."""
        self._changes.append((key, value))

    def commit(self) -> None:
        """Commit what was put since the last commit."""
        records = self._pack()
        self._file.append(records)
        if self._next is not None:
            self._next.append(records)
            self._copy(self._next, len(records))
        elif self._freed is not None:
            self._free(self._freed)
        elif self._file.end > 2 * self._true + _SHORT:
            self._begin()

    def _pack(self) -> bytes:
        """Return the records of what was put, and remember where they will be."""
        places, position, true, packed = self._places, self._position, self._true, list[bytes]()
        header, pack = _RECORD.size, _RECORD.pack
        for key, value in self._changes:
            before = places.get(key)
            if before is not None:
                true -= before & _SIZE
            if value is not None:
                length = len(value)
                size = header + len(key) + length
                packed += (pack(len(key), length), key, value)
                places[key] = position << _SIZE_BITS | size
                true += size
            elif before is not None:
                size = header + len(key)
                packed += (pack(len(key), _NO_VALUE), key)
                del places[key]
            else:
                continue
            position += size
        self._changes.clear()
        self._position, self._true = position, true
        return b"".join(packed)

    def _begin(self) -> None:
        """Begin to compact the log."""
        try:
            self._next = _LogFile(self._root, self._file.serial + 1, create=True, version=self._file.version)
        except OSError:  # no descriptor, no memory: nothing is wrong yet, and the next commit tries again
            return
        self._cursor, self._last = _FIRST, self._file.end
        self._position = self._next.base + self._next.end

    def _copy(self, target: _LogFile, appended: int) -> None:
        """Copy some records that are true, and with the last of them let the new log take this one's place."""
        old, places, copied = self._file, self._places, list[bytes]()
        stop = min(self._last, self._cursor + min(max(_FACTOR * appended, _LEAST_READ), _MOST_READ))
        for _ in range(_MOST_RECORDS):
            if self._cursor >= stop:
                break
            position = self._cursor
            key, size = old.record(position)
            if places.get(key) == (old.base + position) << _SIZE_BITS | size:
                copied.append(old.read(position, size))
                places[key] = self._position << _SIZE_BITS | size
                self._position += size
            self._cursor = position + size
        target.append(b"".join(copied))
        if self._cursor >= self._last:
            target.complete()
            old.remove()
            self._file, self._next = target, None
            self._freed, self._freed_to = old, 0

    def _free(self, old: _LogFile) -> None:
        """Free a piece of a log that was compacted: all of it at once takes milliseconds."""
        if self._freed_to < old.end:
            self._freed_to = old.free(self._freed_to)
        else:
            old.close()
            self._freed = None

    def close(self) -> None:
        """Unmap it; it stays where it is, and whoever opens it removes what is not complete."""
        for file in (self._file, self._next, self._freed):
            if file is not None:
                file.close()
