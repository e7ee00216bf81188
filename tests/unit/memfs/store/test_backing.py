"""Two tmpfs under one limit: what guests have freed is there for ordinary files."""

from __future__ import annotations

import errno
import os

import pytest
import trio
from trio.testing import MockClock

from memfs.contract.units import PAGE_SIZE
from memfs.store.backing import Backing
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.seals import F_SEAL_GUEST
from memfs.store.tmpfs_backing import TmpfsBacking
from tests.helpers import at, new_backing, raises

PLENTY = 300 << 20
SCARCE = 32 * PAGE_SIZE


async def free_a_guests_page(backing: Backing) -> None:
    guest = File(backing, 1, F_SEAL_GUEST)
    with guest.held():
        await guest.allocate(at(0), PAGE_SIZE, keep_size=False)
        await guest.truncate(0)
    guest.close()


def fill(backing: Backing, size: int) -> None:
    """Allocate so many bytes as a program does in passthrough mode: memfs is not asked."""
    file = File(backing, 2)
    try:
        with file.held():
            os.posix_fallocate(file.fd, 0, size)
    finally:
        file.close()


async def test_what_a_guest_frees_returns_to_ordinary_files_in_a_moment(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    backing = new_backing(TmpfsBacking, PLENTY)
    nursery.start_soon(backing.run)
    await trio.testing.wait_all_tasks_blocked()
    await free_a_guests_page(backing)
    await trio.sleep(0.02)
    fill(backing, PLENTY)
    nursery.cancel_scope.cancel()
    backing.close()


async def test_a_guest_allocates_again_what_has_not_returned_yet(nursery: trio.Nursery) -> None:
    backing = new_backing(TmpfsBacking, PLENTY)
    nursery.start_soon(backing.run)
    await trio.testing.wait_all_tasks_blocked()
    await free_a_guests_page(backing)
    guest = File(backing, 3, F_SEAL_GUEST)
    with guest.held():
        await guest.allocate(at(0), PAGE_SIZE, keep_size=False)
        with raises(errno.ENOSPC):
            fill(backing, PLENTY)
        assert backing.free_pages == backing.total_pages - 1
        await guest.truncate(0)
    guest.close()
    nursery.cancel_scope.cancel()
    backing.close()


@pytest.mark.parametrize("size", [SCARCE, PLENTY])
@pytest.mark.parametrize("runs", [False, True])
async def test_what_a_guest_frees_returns_immediately(nursery: trio.Nursery, size: int, runs: bool) -> None:
    """Where space is scarce, where nothing runs that would return it, and whenever somebody asks how much there is."""
    backing = new_backing(TmpfsBacking, size)
    if runs:
        nursery.start_soon(backing.run)
        await trio.testing.wait_all_tasks_blocked()
    await free_a_guests_page(backing)
    if runs and size == PLENTY:
        assert backing.free_pages == backing.total_pages
    fill(backing, size)
    nursery.cancel_scope.cancel()
    backing.close()


def test_what_another_process_left_goes_and_nothing_that_was_created_since() -> None:
    backing = new_backing(TmpfsBacking, SCARCE)
    assert isinstance(backing, TmpfsBacking)
    lost = [(5, True), (6, False), (7, False), (8, True), (9, False), (9, True)]
    for number, guest in [(5, False), (6, True), *lost]:
        backing.shut(backing.create(number, guest=guest)[1])

    def is_there(number: int, guest: bool) -> bool:
        path, root = backing.locate(backing.find(number, guest=guest))
        try:
            os.stat(path, dir_fd=root)
        except FileNotFoundError:
            return False
        return True

    remove_rest = backing.remove_others({5, 6}, {6}, end=9)
    created = [(5, True), (9, False), (9, True)]  # sealed, and new: the only ones that may come
    assert not any(is_there(*each) for each in created)
    for number, guest in created:
        backing.shut(backing.create(number, guest=guest)[1])
    remove_rest()
    assert all(is_there(*each) for each in [(5, False), (6, True), *created])
    assert not any(is_there(*each) for each in lost if each not in created)
    backing.close()


@pytest.mark.parametrize("kind", [TmpfsBacking, MemfdBacking])
def test_new_file_that_is_held_need_not_be_opened(kind: type[Backing], monkeypatch: pytest.MonkeyPatch) -> None:
    backing = new_backing(kind, SCARCE)

    def no_open(content: object) -> int:
        raise AssertionError("opened")

    monkeypatch.setattr(backing, "open", no_open)
    file = File(backing, 1, held=True)
    with file.held():
        assert file.write(at(0), b"content") == 7
    assert file.read(at(0), 7) == b"content"
    file.release()
    file.close()
    backing.close()


@pytest.mark.parametrize("kind", [TmpfsBacking, MemfdBacking])
@pytest.mark.parametrize("held", [False, True])
def test_file_that_cannot_be_sealed_is_not_left_behind(
    kind: type[Backing], held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backing, descriptors = new_backing(kind, SCARCE), os.listdir("/proc/self/fd")

    def no_seal(file: File, bits: int) -> None:
        raise OSError(errno.EBUSY, "cannot be sealed")

    monkeypatch.setattr(File, "_seal_backing_file", no_seal)
    with raises(errno.EBUSY):
        File(backing, 1, held=held)
    assert os.listdir("/proc/self/fd") == descriptors
    monkeypatch.undo()
    File(backing, 1).close()
    backing.close()
