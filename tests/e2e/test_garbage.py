"""Nothing that comes and goes waits for the garbage collector: reference counts free all of it.

A memfs with --check collects nothing, and says in the end what was left (memfs/garbage.py); so every test is one of
this rule, and here is what comes and goes in all its ways.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

import trio

from memfs.contract.conversion import Key, convert, key_of
from memfs.contract.protocol.client import StoreGone
from memfs.contract.protocol.messages import GetPfn, PutPfn, Unregister
from memfs.contract.protocol.peer import close_all
from memfs.contract.sys.libc import PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE
from tests.helpers import pages, raises

from .conftest import Memfs, MountMemfs
from .owner import connected

TIMES = 5


def make(path: Path, seals: bytes = b"") -> None:
    os.mknod(path, 0o600)
    if seals:
        os.setxattr(path, "user.memfs.seals", seals)
    os.truncate(path, 16 * PAGE_SIZE)


def test_files_that_were_there(memfs: Memfs) -> None:
    for number in range(TIMES):
        private, shared = memfs.path / f"private-{number}", memfs.path / f"shared-{number}"
        make(private, b"guest")
        make(shared)
        fds = [os.open(path, os.O_RDWR) for path in (private, shared)]
        key = key_of(fds[1])
        convert(fds[0], key, [pages(0, 4)], to_private=True)
        with raises(errno.EBADF):
            convert(fds[0], Key(key ^ 1), [pages(0, 4)], to_private=True)
        with raises(errno.EPERM):
            os.read(fds[0], 1)
        fallocate(fds[0], PUNCH_HOLE, 0, PAGE_SIZE)
        with raises(errno.ENOENT):
            os.unlink(memfs.path / "missing")
        for path in (private, shared):
            os.unlink(path)
        close_all(fds)


async def test_owners_that_were_there(memfs: Memfs) -> None:
    path = memfs.path / "private"
    await trio.to_thread.run_sync(make, path, b"guest")
    for number in range(TIMES):
        async with connected(memfs.socket) as owner:
            registered, fds = await owner.registered(path)
            close_all(fds)
            file = registered.file
            await owner.ask(GetPfn(file, pages(0, 4), alloc=True, lock=True))
            await owner.ask(GetPfn(file, pages(0, 99), alloc=True, lock=True))  # past the end
            if number % 2:
                await owner.ask(PutPfn(file, pages(0, 4), dirty=False))
                await owner.ask(Unregister(file))


async def test_owners_that_were_cut_off(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m,notify_timeout=0.2")
    memfs.expected += ["is fenced", "broke the protocol", "registered"]
    path = memfs.path / "private"
    await trio.to_thread.run_sync(make, path, b"guest")
    for _ in range(TIMES):
        with contextlib.suppress(StoreGone):
            async with connected(memfs.socket) as owner:
                registered, fds = await owner.registered(path)
                close_all(fds)
                await owner.ask(GetPfn(registered.file, pages(0, 4), alloc=True, lock=True))
                owner.acknowledge = trio.Event()
                await trio.run_process(["fallocate", "-p", "-l", "4096", str(path)])
    for said in (b"", b"nonsense"):
        for _ in range(TIMES):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(str(memfs.socket))
                if said:
                    sock.send(said)


async def test_callers_that_were_killed_while_they_waited(memfs: Memfs) -> None:
    path = memfs.path / "private"
    await trio.to_thread.run_sync(make, path, b"guest")
    async with connected(memfs.socket) as owner:
        registered, fds = await owner.registered(path)
        close_all(fds)
        await owner.ask(GetPfn(registered.file, pages(0, 4), alloc=True, lock=True))
        for _ in range(TIMES):
            caller = await trio.lowlevel.open_process(["fallocate", "-p", "-l", "4096", str(path)])
            await owner.arrived.wait()
            caller.kill()
            await owner.ask(PutPfn(registered.file, pages(0, 1), dirty=False))
            await caller.wait()
            await owner.ask(GetPfn(registered.file, pages(0, 1), alloc=True, lock=True))
