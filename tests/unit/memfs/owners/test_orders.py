"""Which order an owner is told for a page: how large a mapping may be that begins with the block around it."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from memfs.contract.units import ORDER_2M, ORDER_4K, PAGE_SIZE, PageRange
from memfs.owners.registration import Registration
from memfs.owners.registry import Registry
from memfs.store.backing import Backing
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.seals import F_SEAL_GUEST
from memfs.store.tmpfs_backing import TmpfsBacking
from memfs.tree.inode import RegularFile
from memfs.tree.tree import ROOT_INO, Tree
from tests.helpers import at, new_backing, one, pages

from .test_registry import Guest

BLOCK = 1 << ORDER_2M


@asynccontextmanager
async def registered(kind: Callable[[int], Backing], seals: int) -> AsyncIterator[Registration]:
    """A file of two blocks, all allocated, and its owner."""
    backing = new_backing(kind, 4 * BLOCK * PAGE_SIZE)
    tree = Tree(lambda ino, seals: File(backing, ino, seals, held=True), 100, 0o755, 0, 0)
    registry = Registry(tree)
    inode = tree.create(ROOT_INO, b"file", stat.S_IFREG | 0o600, 0, 0, seals=seals)
    assert isinstance(inode, RegularFile)
    await inode.file.allocate(at(0), at(2 * BLOCK), keep_size=False)
    owner = Guest(registry)
    registration = owner.register(inode)
    if not seals:  # there, pages that nothing was written to count as absent
        assert inode.file.write(at(0), bytes(2 * BLOCK * PAGE_SIZE)) == at(2 * BLOCK)
    yield registration
    registry.end(owner)
    registry.check()
    tree.close()
    backing.close()


async def orders(registration: Registration, asked: PageRange) -> list[tuple[int, int, int | None]]:
    reply = await registration.get_pfn(asked, alloc=False, lock=False)
    return [(run.pages.start, run.pages.end, run.order if run.pfn is not None else None) for run in reply.runs]


async def test_order_is_what_is_allocated_around_it() -> None:
    async with registered(MemfdBacking, F_SEAL_GUEST) as registration:
        assert await orders(registration, one(7)) == [(7, 8, ORDER_2M)]
        assert await orders(registration, pages(0, 2 * BLOCK)) == [(0, 2 * BLOCK, ORDER_2M)]
        await registration.file.punch(at(BLOCK - 1), at(1))
        assert await orders(registration, one(7)) == [(7, 8, ORDER_4K)], "one page of the block is missing"
        assert await orders(registration, one(BLOCK)) == [(BLOCK, BLOCK + 1, ORDER_2M)]
        assert await orders(registration, pages(BLOCK - 2, BLOCK + 1)) == [
            (BLOCK - 2, BLOCK - 1, ORDER_4K),
            (BLOCK - 1, BLOCK, None),
            (BLOCK, BLOCK + 1, ORDER_2M),
        ]


async def test_of_a_file_without_page_map_no_more_is_known_than_was_asked_for() -> None:
    async with registered(TmpfsBacking, 0) as registration:
        assert await orders(registration, one(7)) == [(7, 8, ORDER_4K)]
        assert await orders(registration, pages(0, 2 * BLOCK)) == [(0, 2 * BLOCK, ORDER_2M)]
