"""Every point of fault injection on the way of a conversion: all of it is done or nothing, and it is counted right."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from memfs.contract.conversion import Key, convert, key_of
from memfs.contract.faults import Kind, Point
from memfs.contract.page_map import PageMapView
from memfs.contract.page_ranges import NO_PAGES, PageRanges
from memfs.contract.protocol.messages import ConvertBegin, ConvertEnd
from memfs.contract.protocol.peer import close_all
from memfs.contract.sys.libc import fallocate
from tests.helpers import one, pages

from .conftest import Memfs, MountMemfs, memfs_command, run
from .injection import Injection
from .owner import Owner, connected, shell
from .test_fault_points import MESSAGES, PAGE, blocks, used

PAGES = 16  # of each file
RANGES = PageRanges.of([one(1), pages(4, 7)])
NOTIFIED = {Point.BEFORE_BEGIN, Point.AFTER_BEGIN, Point.BEFORE_END, Point.AFTER_END}
UNDONE = {Point.BEFORE_ALLOCATE, Point.AFTER_ALLOCATE, Point.BEFORE_FREE}
DONE = {Point.AFTER_FREE, Point.BEFORE_ACCOUNT, Point.AFTER_ACCOUNT}
POINTS = sorted({*NOTIFIED, *UNDONE, *DONE, *MESSAGES}, key=list(Point).index)


@dataclass
class Owned:
    """Two files, open, and their owner."""

    owner: Owner
    fds: tuple[int, int]
    key: Key
    paths: tuple[Path, Path]
    page_map: PageMapView

    async def convert(self, *, to_private: bool) -> int:
        """Convert, and return the errno."""
        try:
            await trio.to_thread.run_sync(lambda: convert(self.fds[1], self.key, RANGES, to_private=to_private))
        except OSError as error:
            return error.errno or 0
        return 0

    async def look(self, memfs: Memfs) -> tuple[int, int]:
        """All accounts agree; how many pages either file has."""
        shared, private = [await blocks(path) for path in self.paths]
        assert await used(memfs) == shared + private
        assert self.page_map.count(pages(0, 1024)) == private
        return shared, private


@contextlib.asynccontextmanager
async def owning(memfs: Memfs, *, to_private: bool) -> AsyncIterator[Owned]:
    """Files of which the one that is left has all pages."""
    paths = memfs.path / "shared", memfs.path / "private"

    def make() -> tuple[int, int]:
        for path in paths:
            os.mknod(path)
        os.setxattr(paths[1], "user.memfs.seals", b"guest")
        for path in paths:
            os.truncate(path, PAGES * PAGE)
        shared, private = (os.open(path, os.O_RDWR) for path in paths)
        fallocate(shared if to_private else private, 0, 0, PAGES * PAGE)
        return shared, private

    fds = await trio.to_thread.run_sync(make)
    key = await trio.to_thread.run_sync(key_of, fds[0])
    try:
        async with connected(memfs.socket) as owner:
            with trio.fail_after(5):
                _, of_shared = await owner.registered(paths[0])
                _, of_private = await owner.registered(paths[1])
            view = PageMapView(of_private[1])
            close_all((*of_shared, *of_private))
            try:
                yield Owned(owner, fds, key, paths, view)
            finally:
                view.close()
    finally:
        with trio.CancelScope(shield=True):
            for fd in fds:
                await trio.to_thread.run_sync(os.close, fd)
            with contextlib.suppress(OSError):  # it has died
                for path in paths:
                    await trio.to_thread.run_sync(path.unlink)


@pytest.mark.parametrize("to_private", [True, False], ids=["to private", "to shared"])
async def test_every_point(mount_memfs: MountMemfs, in_memfs: Injection, to_private: bool) -> None:
    """Failing and waiting; one after the other on one mount, whose invariants are verified at its end."""
    memfs = mount_memfs("size=64m")
    memfs.expected += ["could not be notified", "cannot be received from"]
    for point, kind in itertools.product(POINTS, (Kind.FAIL, Kind.DELAY)):
        what = f"{kind.value} {point.value}"
        async with owning(memfs, to_private=to_private) as files:
            before = await files.look(memfs)
            in_memfs.arm(point, kind)
            with trio.fail_after(5):
                error = await files.convert(to_private=to_private)
                while in_memfs.armed:  # a socket is listened to again when all has been done
                    assert point in MESSAGES, f"{what}: nobody came by"
                    await trio.sleep(0.001)
            fails = kind is Kind.FAIL and point in UNDONE | DONE
            assert error == (errno.EIO if fails else 0), what
            left = PAGES - RANGES.pages
            is_done = not (kind is Kind.FAIL and point in UNDONE)
            after = (left, RANGES.pages) if to_private else (RANGES.pages, left)
            assert await files.look(memfs) == (after if is_done else before), what
            with trio.fail_after(5):
                if kind is Kind.FAIL and point in NOTIFIED | MESSAGES:
                    await files.owner.gone.wait()
                else:
                    while len(files.owner.heard) < 2:  # noqa: ASYNC110
                        await trio.sleep(0.001)
                    begin, end = files.owner.heard
                    assert isinstance(begin, ConvertBegin)
                    assert isinstance(end, ConvertEnd)
                    assert (begin.ranges, end.ranges) == (RANGES, RANGES if is_done else NO_PAGES), what
            assert await files.convert(to_private=to_private) == 0, what  # it goes on as if nothing had happened
            assert await files.look(memfs) == after, what
        with trio.fail_after(5):
            while await used(memfs):  # noqa: ASYNC110
                await trio.sleep(0.001)


async def test_memfs_dies_at_every_point(mount_memfs: MountMemfs, in_memfs: Injection) -> None:
    """The system call fails, the owner is told, and memfs is mounted again over what is left."""
    memfs = mount_memfs("size=64m")
    mount = [*memfs_command("mount", memfs.path, "--socket", memfs.socket), "-o", "size=64m"]
    try:
        for point in POINTS:
            async with owning(memfs, to_private=True) as files:
                await files.look(memfs)  # memfs is done with what came before
                in_memfs.arm(point, Kind.KILL)
                with trio.fail_after(10):
                    assert await files.convert(to_private=True) in (errno.ENOTCONN, errno.ECONNABORTED), point
                    await files.owner.gone.wait()
                assert not in_memfs.armed, point
            again = await shell(*mount, cwd=Path("/"))
            assert again.returncode == 0, (point, again)
            assert await used(memfs) == 0, point
        assert await trio.to_thread.run_sync(memfs.process.wait, 5) == -signal.SIGKILL
    finally:
        await trio.to_thread.run_sync(run, "umount", memfs.path)
