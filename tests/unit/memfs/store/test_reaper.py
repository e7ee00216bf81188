"""Large files that are freed beside everything else, and who waits for their space."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.fuse.abi import IN_HEADER, STATFS_OUT, Opcode, Request
from memfs.fuse.files import FileHandlers
from memfs.fuse.page_cache import PageCache
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.reaper import Reaper
from memfs.tree.open_files import OpenFiles
from memfs.tree.tree import Tree
from tests.helpers import notify_nobody


class Large:
    """A file that takes as long to free as the test wants."""

    def __init__(self) -> None:
        self.may_be_empty = trio.Event()
        self.closed = False
        self.asked = 0  # how often for its pages

    @property
    def pages(self) -> int:
        self.asked += 1
        return 4096

    async def empty(self) -> None:
        await self.may_be_empty.wait()

    def close(self) -> None:
        self.closed = True


class Stubborn(Large):
    """A file that cannot be freed in chunks."""

    async def empty(self) -> None:
        raise OSError(errno.EIO, "told to fail")


async def test_waiting_ends_with_what_was_being_freed_when_it_began() -> None:
    reaper, first, second = Reaper(), Large(), Large()
    drained: list[bool] = []

    async def drain() -> None:
        drained.append(await reaper.drain())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reaper.run)
        await wait_all_tasks_blocked()
        assert reaper.take(first, 4096)
        await wait_all_tasks_blocked()
        nursery.start_soon(drain)
        await wait_all_tasks_blocked()
        assert reaper.take(second, 4096)  # while somebody waits for the first
        first.may_be_empty.set()
        await wait_all_tasks_blocked()
        assert (drained, first.closed, second.closed) == ([True], True, False)
        nursery.start_soon(drain)
        await wait_all_tasks_blocked()
        assert drained == [True]
        second.may_be_empty.set()
        await wait_all_tasks_blocked()
        assert (drained, reaper.is_idle) == ([True, True], True)
        assert not await reaper.drain()
        nursery.cancel_scope.cancel()


async def test_a_file_that_is_expected_is_waited_for_and_not_for_long(autojump_clock: trio.testing.MockClock) -> None:
    reaper, file = Reaper(), Large()
    file.may_be_empty.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reaper.run)
        await wait_all_tasks_blocked()
        reaper.expect(file, 4096)
        began = trio.current_time()
        assert not await reaper.drain()  # somebody keeps it in a way that nobody hears of
        assert 0 < trio.current_time() - began < 1

        async def come() -> None:
            await trio.sleep(0.01)
            assert reaper.take(file, 4096)

        reaper.expect(file, 4096)
        nursery.start_soon(come)
        assert await reaper.drain()
        assert file.closed
        nursery.cancel_scope.cancel()


async def test_a_file_that_somebody_keeps_delays_others_once_only(autojump_clock: trio.testing.MockClock) -> None:
    reaper, kept = Reaper(), Large()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reaper.run)
        await wait_all_tasks_blocked()
        reaper.expect(kept, 4096)
        assert (reaper.is_idle, reaper.pages) == (False, 4096)
        await reaper.drain()
        began = trio.current_time()
        assert (reaper.is_idle, reaper.pages) == (True, 0)
        assert not await reaper.drain()
        assert trio.current_time() == began
        assert reaper.take(kept, 4096)  # it comes after all
        assert (reaper.is_idle, reaper.pages) == (False, 4096)
        nursery.cancel_scope.cancel()


async def test_to_ask_what_is_being_freed_costs_the_same_however_many_files_there_are() -> None:
    reaper, files, expected = Reaper(), [Large() for _ in range(100)], [Large() for _ in range(100)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reaper.run)
        await wait_all_tasks_blocked()
        for file in files:
            reaper.take(file, 4096)
        for file in expected:
            reaper.expect(file, 4096)
        before = sum(file.asked for file in files + expected)
        assert not before  # who hands a file over has looked already
        assert reaper.pages == 200 * 4096
        assert sum(file.asked for file in files + expected) - before <= 1
        nursery.cancel_scope.cancel()


async def test_statfs_counts_what_is_being_freed_and_does_not_wait() -> None:
    backing = MemfdBacking(1 << 30)
    tree = Tree(lambda ino, seals: File(backing, ino, seals, held=True), 100, 0o755, 0, 0)
    handlers, stuck = FileHandlers(tree, OpenFiles(tree), backing, PageCache(notify_nobody)), Large()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backing.reaper.run)
        await wait_all_tasks_blocked()
        backing.reserve(5000)
        backing.reaper.take(stuck, 4096)
        backing.reaper.expect(Large(), 4096)
        request = Request.parse(memoryview(IN_HEADER.pack(IN_HEADER.size, Opcode.STATFS, 2, 1, 0, 0, 0, 0, 0)))
        with pytest.raises(StopIteration) as answered:  # immediately
            handlers.statfs(request).send(None)
        total, free, *_ = STATFS_OUT.unpack(answered.value.value)
        assert total - free == 0  # never more than there is
        backing.reserve(5000)
        with pytest.raises(StopIteration) as answered:
            handlers.statfs(request).send(None)
        total, free, *_ = STATFS_OUT.unpack(answered.value.value)
        assert total - free == 10_000 - 2 * 4096
        nursery.cancel_scope.cancel()
    backing.unreserve(10_000)


async def test_what_cannot_be_freed_in_chunks_is_freed_all_the_same() -> None:
    reaper, file = Reaper(), Stubborn()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reaper.run)
        await wait_all_tasks_blocked()
        assert reaper.take(file, 4096)
        assert await reaper.drain()
        assert file.closed
        nursery.cancel_scope.cancel()


async def test_at_the_end_all_is_freed_and_nobody_waits() -> None:
    reaper, files = Reaper(), [Large(), Large()]
    assert not reaper.take(files[0], 4096)  # it does not run yet
    async with trio.open_nursery() as nursery:
        running = trio.CancelScope()

        async def run() -> None:
            with running:
                await reaper.run()

        nursery.start_soon(run)
        await wait_all_tasks_blocked()
        assert all(reaper.take(file, 4096) for file in files)
        nursery.start_soon(reaper.drain)
        await wait_all_tasks_blocked()
        running.cancel()
    assert all(file.closed for file in files)
    assert (reaper.is_idle, reaper.take(Large(), 4096)) == (True, False)
