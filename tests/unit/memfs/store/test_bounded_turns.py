"""No system call in the event loop frees much, wherever in a file its pages lie, and whoever has put them there."""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable

import pytest

from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, fallocate
from memfs.contract.units import PAGE_SIZE
from memfs.store.backing import Backing, Content
from memfs.store.chunks import LONG_PAGES
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.seals import F_SEAL_GUEST
from memfs.store.tmpfs_backing import TmpfsBacking
from tests.helpers import at, new_backing

MANY = 4 * LONG_PAGES
SEALS = {"ordinary": 0, "guest-sealed": F_SEAL_GUEST}


async def inside(file: File) -> None:
    await file.allocate(at(0), at(MANY), keep_size=False)


async def past_the_end(file: File) -> None:
    await file.allocate(at(0), at(MANY), keep_size=True)


async def by_its_owner(file: File) -> None:
    """Of those the page map knows nothing."""
    await file.truncate(at(MANY))
    fallocate(file.fd, 0, at(0), at(MANY))


async def by_its_owner_past_the_end(file: File) -> None:
    fallocate(file.fd, FALLOC_FL_KEEP_SIZE, at(0), at(MANY))


async def punch(file: File) -> None:
    await file.punch(at(0), at(MANY))


async def truncate(file: File) -> None:
    await file.truncate(0)


async def remove(file: File) -> None:
    """What the reaper does."""
    await file.empty()


async def seal(file: File) -> None:
    await file.add_seals(F_SEAL_GUEST)


def freed_in_the_loop(monkeypatch: pytest.MonkeyPatch, backing: Backing, file: File) -> list[int]:
    """How many pages each system call in this thread frees from now on."""
    freed: list[int] = []

    def counted(call: Callable[..., None]) -> Callable[..., None]:
        def counting(*arguments: object) -> None:
            before = file.pages
            call(*arguments)
            if threading.current_thread() is threading.main_thread():
                freed.append(before - file.pages)

        return counting

    free = backing.free

    def free_counting(content: Content) -> None:
        path, dir_fd = backing.locate(content)
        freed.append(os.stat(path, dir_fd=dir_fd).st_blocks * 512 // PAGE_SIZE)
        free(content)

    monkeypatch.setattr("memfs.store.pages.fallocate", counted(fallocate))
    monkeypatch.setattr(os, "truncate", counted(os.truncate))
    monkeypatch.setattr(backing, "free", free_counting)
    return freed


@pytest.mark.parametrize("kind", [TmpfsBacking, MemfdBacking])
@pytest.mark.parametrize(
    ("seals", "allocate", "free"),
    [
        *(("ordinary", allocate, free) for allocate in (inside, by_its_owner) for free in (punch, truncate, remove)),
        *(
            ("guest-sealed", allocate, free)
            for allocate in (inside, by_its_owner)
            for free in (punch, truncate, remove)
        ),
        *(
            ("ordinary", allocate, free)
            for allocate in (past_the_end, by_its_owner_past_the_end)
            for free in (truncate, remove, seal)
        ),
        *(
            ("guest-sealed", allocate, free)
            for allocate in (past_the_end, by_its_owner_past_the_end)
            for free in (truncate, remove)
        ),
    ],
)
async def test_no_call_in_the_loop_frees_much(
    monkeypatch: pytest.MonkeyPatch,
    kind: Callable[[int], Backing],
    seals: str,
    allocate: Callable[[File], Awaitable[None]],
    free: Callable[[File], Awaitable[None]],
) -> None:
    backing = new_backing(kind, at(2 * MANY))
    file = File(backing, 1, SEALS[seals])
    with file.held():
        await allocate(file)
        assert file.pages == MANY
        freed = freed_in_the_loop(monkeypatch, backing, file)
        await free(file)
        assert file.pages == 0
    file.check()
    file.close()
    assert max(freed) <= LONG_PAGES, freed
    assert backing.used_pages == 0
    backing.close()
