"""memfs.store.file against a real file on a real tmpfs: after any sequence of operations both say and hold the same.

On both backings: the tmpfs, where the kernel keeps the limit, and memfds, where the file does.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memfs.contract.sys.libc import fallocate, mount, umount
from memfs.contract.units import PAGE_SIZE, ByteOffset
from memfs.store.backing import Backing
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.tmpfs_backing import TmpfsBacking

LIMIT = 24 * PAGE_SIZE
OFFSETS = st.integers(0, 20 * PAGE_SIZE) | st.integers(0, 30).map(lambda pages: pages * PAGE_SIZE)
LENGTHS = st.integers(1, 12 * PAGE_SIZE) | st.integers(1, 30).map(lambda pages: pages * PAGE_SIZE)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the errno that it raises."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


class FileMachine(RuleBasedStateMachine):
    backing_type: Callable[[int], Backing]

    def __init__(self) -> None:
        super().__init__()
        self.backing = type(self).backing_type(LIMIT)
        self.file = File(self.backing, 1)
        self.file.hold()
        self.directory = tempfile.mkdtemp()
        mount("tmpfs", self.directory, "tmpfs", 0, f"size={LIMIT}")
        self.real = os.open(f"{self.directory}/file", os.O_CREAT | os.O_RDWR)

    def teardown(self) -> None:
        os.close(self.real)
        umount(self.directory)
        os.rmdir(self.directory)
        self.file.release()
        self.file.close()
        assert self.backing.free_pages == self.backing.total_pages
        self.backing.close()

    def both(self, ours: Callable[[], Any], real: Callable[[], Any]) -> None:
        assert outcome(ours) == outcome(real)

    @rule(offset=OFFSETS, length=LENGTHS, byte=st.integers(1, 255))
    def write(self, offset: int, length: int, byte: int) -> None:
        data = bytes([byte]) * length
        self.both(lambda: self.file.write(ByteOffset(offset), data), lambda: os.pwrite(self.real, data, offset))

    @rule(offset=OFFSETS, length=LENGTHS)
    def read(self, offset: int, length: int) -> None:
        self.both(lambda: self.file.read(ByteOffset(offset), length), lambda: os.pread(self.real, length, offset))

    @rule(size=OFFSETS)
    def truncate(self, size: int) -> None:
        self.both(lambda: trio.run(self.file.truncate, size), lambda: os.ftruncate(self.real, size))

    @rule(offset=OFFSETS, length=LENGTHS, keep_size=st.booleans())
    def allocate(self, offset: int, length: int, keep_size: bool) -> None:
        async def ours() -> None:
            await self.file.allocate(ByteOffset(offset), length, keep_size=keep_size)

        self.both(lambda: trio.run(ours), lambda: fallocate(self.real, int(keep_size), offset, length))

    @rule(offset=OFFSETS, length=LENGTHS)
    def punch(self, offset: int, length: int) -> None:
        self.both(
            lambda: trio.run(self.file.punch, ByteOffset(offset), length),
            lambda: fallocate(self.real, 3, offset, length),
        )

    @precondition(lambda self: isinstance(self.backing, TmpfsBacking))  # elsewhere holes are what is not allocated
    @rule(offset=OFFSETS, whence=st.sampled_from([os.SEEK_DATA, os.SEEK_HOLE]))
    def seek(self, offset: int, whence: int) -> None:
        self.both(lambda: self.file.seek(ByteOffset(offset), whence), lambda: os.lseek(self.real, offset, whence))

    @invariant()
    def same(self) -> None:
        self.file.check()
        ours, real = self.file.stat(), os.fstat(self.real)
        assert (ours.st_size, ours.st_blocks) == (real.st_size, real.st_blocks)
        assert self.file.read(ByteOffset(0), 1 << 20) == os.pread(self.real, 1 << 20, 0)
        assert self.backing.total_pages - self.backing.free_pages == self.file.pages


class OnTmpfs(FileMachine):
    backing_type = TmpfsBacking


class OnMemfd(FileMachine):
    backing_type = MemfdBacking


def needs_tmpfs() -> None:
    try:
        TmpfsBacking(LIMIT).close()
    except OSError as error:
        pytest.skip(f"no tmpfs to compare with: {error.strerror}")


@pytest.mark.parametrize("machine", [OnTmpfs, OnMemfd])
def test_file_is_a_tmpfs_file(machine: type[FileMachine]) -> None:
    needs_tmpfs()
    case = machine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
    case().runTest()
