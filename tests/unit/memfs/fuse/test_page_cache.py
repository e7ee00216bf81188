"""What is remembered of the kernel's page cache is bounded, and true after whatever comes in between."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from memfs.contract.units import PAGE_SIZE, ByteOffset
from memfs.fuse.abi import IN_HEADER, NOTIFY_RETRIEVE_IN, Opcode, Request
from memfs.fuse.page_cache import PageCache
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.tree.inode import RegularFile
from memfs.tree.open_files import OpenFiles
from memfs.tree.tree import ROOT_INO, Tree
from tests.helpers import at

GROUP = 512  # pages


class Kernel:
    """Answers retrievals with pages of a kind, when told to."""

    def __init__(self) -> None:
        self.backing = MemfdBacking(1 << 20)
        self.tree = Tree(lambda ino, seals: File(self.backing, ino, seals, held=True), 100, 0o755, 0, 0)
        self.open_files = OpenFiles(self.tree)
        self.cache = PageCache(self.notify)
        self.asked: list[int] = []

    def notify(self, message: bytes) -> None:
        self.asked.append(int.from_bytes(message[16:24], "little"))

    async def answer(self, content: bytes) -> None:
        body = NOTIFY_RETRIEVE_IN.pack(0, len(content)) + content
        unique = self.asked.pop(0)
        header = IN_HEADER.pack(IN_HEADER.size + len(body), Opcode.NOTIFY_REPLY, unique, 0, 0, 0, 0, 0, 0)
        await self.cache.retrieved(Request.parse(memoryview(header + body)))

    def file(self, name: bytes, size: int) -> RegularFile:
        inode = self.tree.create(ROOT_INO, name, stat.S_IFREG | 0o600, 0, 0)
        assert isinstance(inode, RegularFile)
        self.open_files.open_file(inode, os.O_RDWR)
        os.ftruncate(inode.file.fd, size)
        return inode


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.cache.check()
    kernel.open_files.close()
    kernel.tree.close()


async def seek(offset: ByteOffset, whence: int) -> ByteOffset:
    """Seek in a file of a page that is a hole."""
    if whence == os.SEEK_DATA:
        raise OSError(6, "no data")
    return offset


@pytest.mark.parametrize("content", [b"", b"x", bytes(PAGE_SIZE - 1), b"x" * PAGE_SIZE])
async def test_a_file_is_forgotten_while_somebody_waits(kernel: Kernel, content: bytes) -> None:
    inode = kernel.file(b"file", PAGE_SIZE)
    kernel.cache.has_read(inode, at(0), PAGE_SIZE, 0)
    found: list[int] = []

    async def ask() -> None:
        found.append(await kernel.cache.seek(inode, at(0), os.SEEK_HOLE, seek))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert kernel.cache.forget(inode)
        kernel.cache.has_read(inode, at(0), PAGE_SIZE, 0)  # of one who has opened it since
        await kernel.answer(content)
    assert found == [PAGE_SIZE if content.strip(b"\0") else 0]
    kernel.cache.check()
    assert kernel.cache.forget(inode)


async def test_all_files_together_are_bounded(kernel: Kernel) -> None:
    kernel.cache = PageCache(kernel.notify, 5)
    files = [kernel.file(b"%d" % number, 100 * GROUP * PAGE_SIZE) for number in range(3)]
    for inode in files:
        for group in range(3):
            kernel.cache.has_read(inode, at(group * GROUP), PAGE_SIZE, 0)
        kernel.cache.check()
    for inode in files[1:]:  # one has what is left, one nothing: any hole may be data
        assert await kernel.cache.seek(inode, at(7), os.SEEK_DATA, seek) == at(7)
        assert await kernel.cache.seek(inode, at(7), os.SEEK_HOLE, seek) == inode.file.size
        assert await kernel.cache.blocks(inode) == inode.file.size // 512
    assert kernel.cache.forget(files[0])
    kernel.cache.has_read(kernel.file(b"another", GROUP * PAGE_SIZE), at(0), PAGE_SIZE, 0)
    kernel.cache.check()


async def test_all_files_together_are_bounded_also_if_each_begins_small(kernel: Kernel) -> None:
    kernel.cache = PageCache(kernel.notify, 5)
    files = [kernel.file(b"%d" % number, 100 * GROUP * PAGE_SIZE) for number in range(3)]
    for group in range(3):
        for inode in files:
            kernel.cache.has_read(inode, at(group * GROUP), PAGE_SIZE, 0)
            kernel.cache.check()


async def test_no_user_takes_what_is_remembered_of_the_files_of_others(kernel: Kernel) -> None:
    kernel.cache = PageCache(kernel.notify, 100)
    several = [kernel.file(b"%d" % number, 100 * GROUP * PAGE_SIZE) for number in range(10)]
    for inode in several:
        for group in range(50):
            kernel.cache.has_read(inode, at(group * GROUP), PAGE_SIZE, 1000)
    kernel.cache.check()
    other = kernel.file(b"other", 100 * GROUP * PAGE_SIZE)
    for group in range(20):
        kernel.cache.has_read(other, at(group * GROUP), PAGE_SIZE, 1001)
    kernel.cache.check()
    assert await kernel.cache.seek(several[-1], at(7), os.SEEK_DATA, seek) == at(7)  # any hole may be data
    assert not kernel.asked
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kernel.cache.seek, other, at(7), os.SEEK_DATA, seek)
        await trio.testing.wait_all_tasks_blocked()
        assert kernel.asked  # what is remembered is looked at
        nursery.cancel_scope.cancel()
    for inode in (*several, other):
        assert kernel.cache.forget(inode)
    kernel.cache.check()


async def test_of_very_many_holes_the_kernel_is_asked_about_some(kernel: Kernel) -> None:
    """The others count as data, or a call would take as long as there are holes."""
    most = 256
    inode = kernel.file(b"file", 1000 * PAGE_SIZE)
    for page in range(0, 1000, 2):
        kernel.cache.has_read(inode, at(page), PAGE_SIZE, 0)
    blocks: list[int] = []

    async def ask() -> None:
        blocks.append(await kernel.cache.blocks(inode))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            for number in range(most):
                await trio.testing.wait_all_tasks_blocked()
                await kernel.answer(b"x" * PAGE_SIZE if number % 4 == 0 else bytes(PAGE_SIZE))
    assert blocks == [(most // 4 + 500 - most) * PAGE_SIZE // 512]


async def test_data_is_found_behind_very_many_holes(kernel: Kernel) -> None:
    inode = kernel.file(b"file", 1000 * PAGE_SIZE)
    for page in range(0, 1000, 2):
        kernel.cache.has_read(inode, at(page), PAGE_SIZE, 0)
    found: list[int] = []

    async def ask() -> None:
        found.append(await kernel.cache.seek(inode, at(1), os.SEEK_DATA, seek))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        for page in range(2, 902, 2):
            await trio.testing.wait_all_tasks_blocked()
            await kernel.answer(b"x" * PAGE_SIZE if page == 900 else bytes(PAGE_SIZE))
    assert found == [at(900)]


async def test_an_answer_that_nobody_waits_for_is_nothing(kernel: Kernel) -> None:
    kernel.asked.append(1 << 63)
    await kernel.answer(b"x" * PAGE_SIZE)
