"""What seals forbid of a file itself, and what they leave alone; and where the data of a guest-sealed file is."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator

import pytest

from memfs.contract.sys.constants import F_SEAL_FUTURE_WRITE
from memfs.contract.units import PAGE_SIZE, ByteOffset
from memfs.store.backing import Backing
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.seals import (
    F_SEAL_EXEC,
    F_SEAL_GROW,
    F_SEAL_GUEST,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
)
from memfs.store.tmpfs_backing import TmpfsBacking
from tests.helpers import at, new_backing, raises


@pytest.fixture(params=[TmpfsBacking, MemfdBacking])
def backing(request: pytest.FixtureRequest) -> Iterator[Backing]:
    backing = new_backing(request.param, 32 * PAGE_SIZE)
    yield backing
    backing.close()


@pytest.fixture
def file(backing: Backing) -> Iterator[File]:
    file = File(backing, 1)
    with file.held():
        yield file
    file.close()


async def test_file_that_must_not_grow_keeps_its_size(file: File) -> None:
    await file.truncate(PAGE_SIZE)
    await file.add_seals(F_SEAL_GROW)
    assert file.write(ByteOffset(PAGE_SIZE - 4), b"12345678") == 4
    with raises(errno.EPERM):
        file.write(at(1), b"x")
    for keep_size in (False, True):
        await file.allocate(at(0), PAGE_SIZE, keep_size=keep_size)
        with raises(errno.EPERM):
            await file.allocate(at(0), PAGE_SIZE + 1, keep_size=keep_size)
    with raises(errno.EPERM):
        await file.truncate(PAGE_SIZE + 1)
    assert (file.size, file.read(ByteOffset(PAGE_SIZE - 4), 8)) == (PAGE_SIZE, b"1234")
    await file.truncate(PAGE_SIZE)
    await file.truncate(1)
    assert file.size == 1


async def test_file_that_must_not_shrink_may_grow(file: File) -> None:
    await file.truncate(PAGE_SIZE)
    await file.add_seals(F_SEAL_SHRINK)
    with raises(errno.EPERM):
        await file.truncate(PAGE_SIZE - 1)
    assert file.write(at(1), b"x") == 1
    await file.truncate(at(3))
    assert file.size == at(3)


async def test_seals_add_up(file: File) -> None:
    await file.add_seals(F_SEAL_SHRINK)
    await file.add_seals(F_SEAL_GROW | F_SEAL_SHRINK)
    assert file.seals == F_SEAL_SHRINK | F_SEAL_GROW
    if fcntl.fcntl(file.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL:
        return  # a file of a tmpfs, which takes none
    assert fcntl.fcntl(file.fd, fcntl.F_GET_SEALS) & file.seals == file.seals


async def test_exec_seal_is_about_these_three_bits(file: File) -> None:
    file.check_chmod(0o600, 0o700)
    await file.add_seals(F_SEAL_EXEC)
    for mode in (0, 0o777, 0o644):
        for bit in range(12):
            if 1 << bit & 0o111:
                with raises(errno.EPERM):
                    file.check_chmod(mode, mode ^ 1 << bit)
            else:
                file.check_chmod(mode, mode ^ 1 << bit)


async def test_data_of_a_guest_sealed_file_is_what_is_allocated(backing: Backing) -> None:
    file = File(backing, 1, F_SEAL_GUEST)
    await file.truncate(at(8))
    await file.allocate(at(2), at(3), keep_size=False)
    found = [
        (file.seek(offset, os.SEEK_DATA), file.seek(offset, os.SEEK_HOLE))
        for offset in (at(0), at(2), ByteOffset(at(3) + 5))
    ]
    assert found == [(at(2), at(0)), (at(2), at(5)), (at(3) + 5, at(5))]
    assert file.seek(at(5), os.SEEK_HOLE) == at(5)
    with raises(errno.ENXIO):
        file.seek(at(5), os.SEEK_DATA)
    await file.allocate(at(5), at(3), keep_size=False)
    assert file.seek(at(4), os.SEEK_HOLE) == at(8), "the end"
    for offset in (at(8), ByteOffset(-1)):
        with raises(errno.ENXIO):
            file.seek(offset, os.SEEK_HOLE)
    file.close()


@pytest.mark.parametrize("passes_through", [False, True])
async def test_seal_on_writes_waits_for_nobody_who_may_write(file: File, passes_through: bool) -> None:
    """Through a mapping of the page cache, or without asking us; who only reads is in nobody's way."""
    file.opens.pass_through(1 if passes_through else None)
    for writable in (False, True):
        file.opens.add(writable=writable)
    for seal in (F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, F_SEAL_SHRINK, F_SEAL_GROW):
        if seal == F_SEAL_SHRINK or (seal == F_SEAL_GROW and not passes_through):
            await file.add_seals(seal)
            continue
        with raises(errno.EBUSY):
            await file.add_seals(seal)
    file.opens.remove(writable=True)
    await file.add_seals(F_SEAL_WRITE | F_SEAL_GROW)
    file.opens.remove(writable=False)


async def test_size_that_stays_changes_the_times_unless_it_is_set_by_path(file: File) -> None:
    await file.truncate(PAGE_SIZE)
    for by_path in ({"by_path": True}, {"by_path": False}, {}):
        file.set_times(0, 0)
        await file.truncate(PAGE_SIZE, **by_path)
        assert (file.stat().st_mtime == 0) == bool(by_path.get("by_path")), by_path
