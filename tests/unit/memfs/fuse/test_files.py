"""Answers on open files that could take long."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.aio.threads import THREADS, Threads, working_for
from memfs.contract.aio.turns import SHARE, Turns
from memfs.contract.sys.libc import PUNCH_HOLE
from memfs.contract.units import ByteOffset
from memfs.fuse.abi import (
    FALLOCATE_IN,
    FATTR_SIZE,
    IN_HEADER,
    LSEEK_IN,
    LSEEK_OUT,
    OPEN_IN,
    SETATTR_IN,
    Opcode,
    Request,
)
from memfs.fuse.files import FileHandlers
from memfs.fuse.page_cache import PageCache
from memfs.store.chunks import LONG
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.seals import F_SEAL_GUEST
from memfs.tree.inode import RegularFile
from memfs.tree.open_files import OpenFiles
from memfs.tree.tree import ROOT_INO, Tree
from tests.helpers import notify_nobody


@pytest.mark.parametrize("seals", [0, F_SEAL_GUEST], ids=["ordinary", "guest-sealed"])
async def test_to_search_a_large_file_holds_up_nobody(seals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may look at every page of it: not in the event loop's thread."""
    backing = MemfdBacking(1 << 30)
    tree = Tree(lambda ino, seals: File(backing, ino, seals, held=True), 100, 0o755, 0, 0)
    inode = tree.create(ROOT_INO, b"file", stat.S_IFREG | 0o600, 0, 0, seals=seals)
    assert isinstance(inode, RegularFile)
    open_files = OpenFiles(tree)
    handlers = FileHandlers(tree, open_files, backing, PageCache(notify_nobody))
    fh, _ = open_files.open_file(inode, os.O_RDWR)
    threads, seek = list[int](), File.seek

    def seeking(file: File, offset: ByteOffset, whence: int) -> ByteOffset:
        threads.append(threading.get_ident())
        return seek(file, offset, whence)

    monkeypatch.setattr(File, "seek", seeking)
    for size, is_here in ((LONG, True), (700 << 20, False)):
        await inode.file.truncate(size)
        body = LSEEK_IN.pack(fh, 4096, os.SEEK_HOLE, 0)
        header = IN_HEADER.pack(IN_HEADER.size + len(body), Opcode.LSEEK, 2, inode.ino, 0, 0, 0, 0, 0)
        reply = await handlers.lseek(Request.parse(memoryview(header + body)))
        assert LSEEK_OUT.unpack(reply) == (4096,)
        assert (threads.pop() == threading.get_ident()) == is_here
    open_files.close()
    tree.close()
    await trio.lowlevel.checkpoint()


class Mount:
    """A file of many pages of each of two users, and the handlers."""

    def __init__(self) -> None:
        backing = MemfdBacking(1 << 30)
        self.tree = Tree(lambda ino, seals: File(backing, ino, seals, held=True), 100, 0o755, 0, 0)
        self.open_files = OpenFiles(self.tree)
        self.handlers = FileHandlers(self.tree, self.open_files, backing, PageCache(notify_nobody))

    async def file(self, length: int, seals: int) -> tuple[RegularFile, int]:
        """Create a file, allocate so much of it, and return it and a handle."""
        name = str(len(self.tree.inodes)).encode()
        inode = self.tree.create(ROOT_INO, name, stat.S_IFREG | 0o600, 0, 0, seals=seals)
        assert isinstance(inode, RegularFile)
        await inode.file.allocate(ByteOffset(0), length, keep_size=False)
        return inode, self.open_files.open_file(inode, os.O_RDWR)[0]

    async def close(self) -> None:
        self.open_files.close()
        self.tree.close()
        await trio.lowlevel.checkpoint()


def request(opcode: Opcode, nodeid: int, body: bytes, uid: int = 0) -> Request:
    header = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, 2, nodeid, uid, 0, os.getpid(), 0, 0)
    return Request.parse(memoryview(header + body))


def truncated(size: int) -> bytes:
    fields = [0] * len(SETATTR_IN.unpack(bytes(SETATTR_IN.size)))
    fields[0], fields[2] = FATTR_SIZE, size
    return SETATTR_IN.pack(*fields)


#: what is long: the opcode, and the body for a handle and a length
LONG_REQUESTS: dict[str, tuple[Opcode, Callable[[int, int], bytes]]] = {
    "allocate": (Opcode.FALLOCATE, lambda fh, length: FALLOCATE_IN.pack(fh, length, length, 0, 0)),
    "punch": (Opcode.FALLOCATE, lambda fh, length: FALLOCATE_IN.pack(fh, 0, length, PUNCH_HOLE, 0)),
    "truncate": (Opcode.SETATTR, lambda fh, length: truncated(0)),
    "open to truncate": (Opcode.OPEN, lambda fh, length: OPEN_IN.pack(os.O_RDWR | os.O_TRUNC, 0)),
    "seek": (Opcode.LSEEK, lambda fh, length: LSEEK_IN.pack(fh, 0, os.SEEK_HOLE, 0)),
}


@asynccontextmanager
async def stuck(user: int) -> AsyncIterator[None]:
    """All threads of a user do something that takes as long as the block."""
    ends = threading.Event()
    async with trio.open_nursery() as nursery:
        with working_for(lambda: user):
            for _ in range(THREADS):
                nursery.start_soon(Threads.here().run, ends.wait)
        await wait_all_tasks_blocked()
        try:
            yield
        finally:
            ends.set()


@pytest.mark.parametrize("what", LONG_REQUESTS)
async def test_what_is_long_waits_for_threads_of_its_user_and_for_no_others(what: str) -> None:
    mount, done = Mount(), list[int]()
    opcode, body = LONG_REQUESTS[what]
    handler = getattr(mount.handlers, opcode.name.lower())
    length = 2 * LONG

    async def ask(user: int) -> None:
        inode, fh = await mount.file(length, F_SEAL_GUEST)
        await handler(request(opcode, inode.ino, body(fh, length), user))
        done.append(user)

    async with trio.open_nursery() as nursery, stuck(12001):
        with trio.fail_after(10):
            await ask(12002)
        nursery.start_soon(ask, 12001)
        await wait_all_tasks_blocked(0.01)
        assert done == [12002]
    assert done == [12002, 12001]
    await mount.close()


@pytest.mark.parametrize("seals", [0, F_SEAL_GUEST], ids=["ordinary", "guest-sealed"])
@pytest.mark.parametrize("what", ["allocate", "punch", "truncate", "open to truncate"])
async def test_what_is_not_quite_long_counts_as_a_turn(what: str, seals: int) -> None:
    """A row of them must not be taken for a row of small ones."""
    mount, turns = Mount(), Turns.here()
    opcode, body = LONG_REQUESTS[what]
    handler = getattr(mount.handlers, opcode.name.lower())
    for length, least, most in ((LONG, SHARE, 2 * SHARE), (4096, 0, 1)):
        inode, fh = await mount.file(length, seals)
        begun = turns.total
        await handler(request(opcode, inode.ino, body(fh, length)))
        assert least <= turns.total - begun <= most
    await mount.close()


async def test_to_forget_files_counts_as_freeing_their_memory() -> None:
    mount, turns = Mount(), Turns.here()
    for length, least, most in ((LONG, SHARE, 2 * SHARE), (4096, 0, 1)):
        inode, fh = await mount.file(length, 0)
        mount.tree.looked_up(inode)
        mount.open_files.release(fh)
        mount.tree.unlink(ROOT_INO, next(iter(mount.tree.directory(ROOT_INO).entries)))
        begun = turns.total
        mount.tree.forget(inode.ino, 1)
        assert inode.ino not in mount.tree.inodes
        assert least <= turns.total - begun <= most
    await mount.close()


@pytest.mark.parametrize("seals", [0, F_SEAL_GUEST], ids=["ordinary", "guest-sealed"])
async def test_many_long_punches_of_a_user_are_one_user_s(seals: int) -> None:
    """In an event-loop iteration no more is done for all of them than for one."""
    mount = Mount()
    files = [await mount.file(4 * LONG, seals) for _ in range(8)]
    turns, iterations, ended = Turns.here(), list[int](), False

    async def watch() -> None:
        while not ended:
            begun = turns.total
            await trio.lowlevel.checkpoint()
            iterations.append(turns.total - begun)

    async with trio.open_nursery() as watching:
        watching.start_soon(watch)
        async with trio.open_nursery() as nursery:
            with working_for(lambda: 12001):
                for inode, _ in files:
                    nursery.start_soon(inode.file.punch, ByteOffset(0), 4 * LONG)
        ended = True
    assert max(iterations) <= 2 * SHARE
    assert not any(inode.stat().blocks for inode, _ in files)
    await mount.close()
