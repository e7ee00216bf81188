"""A store for kvmsim to talk to, without a mount: the real protocol over a socketpair, memory in real memfds.

What it does and when is decided by the test, so that a fault can be held between any two of its steps.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

import pytest
import trio

from kvmsim.mmu.ownership import OwnershipTable
from kvmsim.uapi import KVM_MEM_FD, UserspaceMemoryRegion
from kvmsim.vm import VM, create_vm
from kvmsim.vm_type import VmType
from memfs.contract.page_map import ABSENT, ALLOCATED, MapMemfds, PageMap
from memfs.contract.protocol.call import Incoming, PeerGone
from memfs.contract.protocol.connection import Role
from memfs.contract.protocol.messages import (
    VERSION,
    Ack,
    ConvertEnd,
    Done,
    Failed,
    Fallocate,
    FileId,
    GetPfn,
    Hello,
    HelloReply,
    InvalidateEnd,
    Launch,
    Measured,
    Message,
    PfnReply,
    PfnRun,
    Register,
    Registered,
    Unregister,
)
from memfs.contract.protocol.peer import Peer, close_all
from memfs.contract.units import PAGE_SIZE, ByteOffset, Gpa, PageIndex, PageRange, Pfn

PAGES = 64


@dataclass
class FakeFile:
    """A file of the store, known by the descriptor that the VMM has of it."""

    id: FileId
    fd: int
    page_map: PageMap | None
    registered: int = 0


class ScriptedStore:
    """The store's end of a connection."""

    def __init__(self) -> None:
        self.peer: Peer | None = None
        self.files: dict[int, FakeFile] = {}  # by inode number of the memfd
        self.refuse: dict[type[Message], int] = {}  # errno for requests of a kind
        self.before_registered: Callable[[FakeFile], Awaitable[object]] | None = None  #: called once
        self.registering = trio.Event()  # Register waits for this
        self.registering.set()
        self.requests: list[Message] = []
        self.held = trio.Event()  # GetPfn waits for this
        self.held.set()

    def file(self, pages: int = PAGES, *, guest: bool = False) -> int:
        """A new file; the descriptor for the VMM."""
        fd = os.memfd_create("fake", os.MFD_CLOEXEC)
        os.ftruncate(fd, pages * PAGE_SIZE)
        number = FileId(len(self.files) + 1)
        self.files[os.fstat(fd).st_ino] = FakeFile(number, fd, MapMemfds().open("fake") if guest else None)
        return fd

    def by_fd(self, fd: int) -> FakeFile:
        return self.files[os.fstat(fd).st_ino]

    def by_id(self, file: FileId) -> FakeFile:
        return next(each for each in self.files.values() if each.id == file)

    async def notify(self, message: Message) -> None:
        """Say something, and return when it has been acted upon."""
        assert self.peer is not None
        if isinstance(message, InvalidateEnd | ConvertEnd):  # not answered; what comes after it is
            await self.peer.tell(message)
            message = Fallocate(FileId(0), PageRange(PageIndex(0), PageIndex(1)))
        assert isinstance((await self.peer.call(message)).message, Ack)

    async def serve(self) -> None:
        assert self.peer is not None
        with suppress(PeerGone):
            await self.peer.serve(self._answer)

    async def _answer(self, request: Incoming) -> None:
        number, message, fds = request.id, request.message, request.fds
        self.requests.append(message)
        if isinstance(message, Register):
            await self.registering.wait()
        reply, out = self._act(message, fds)
        close_all(fds)
        if isinstance(message, GetPfn):
            await self.held.wait()
            if not self.by_id(message.file).registered:
                reply = Failed(errno.EBADF, "unregistered")
        if isinstance(reply, Registered) and self.before_registered is not None:
            before, self.before_registered = self.before_registered, None
            await before(self.by_id(reply.file))
        try:
            assert self.peer is not None
            await self.peer.reply(number, reply, out)
        except PeerGone:
            pass

    def _act(self, message: Message, fds: tuple[int, ...]) -> tuple[Message, tuple[int, ...]]:
        if type(message) in self.refuse:
            return Failed(self.refuse[type(message)], "as told"), ()
        match message:
            case Hello():
                return HelloReply(VERSION, PAGE_SIZE), ()
            case Register():
                file = self.files[os.fstat(fds[0]).st_ino]
                file.registered += 1
                maps = () if file.page_map is None else (file.page_map.fd,)
                return Registered(file.id, 1, os.fstat(file.fd).st_size, 0), (file.fd, *maps)
            case Unregister(number):
                self.by_id(number).registered -= 1
                return Done(), ()
            case Launch():
                return Measured(bytes(48)), ()
            case GetPfn(number, pages, alloc, lock):
                assert not lock, "nobody would unlock it"
                return self._get(self.by_id(number), pages, alloc), ()
        raise AssertionError(message)

    def _get(self, file: FakeFile, pages: PageRange, alloc: bool) -> PfnReply:
        runs = []
        for index in range(pages.start, pages.end):
            page = PageRange(PageIndex(index), PageIndex(index + 1))
            present = alloc or file.page_map is None or file.page_map.is_allocated(page.start)
            runs.append(PfnRun(page, Pfn((file.id << 18) + index) if present else None))
        return PfnReply(file.id, pages, tuple(runs))

    def allocate(self, fd: int, pages: PageRange) -> None:
        page_map = self.by_fd(fd).page_map
        assert page_map is not None
        page_map.set(pages, ALLOCATED)

    def free(self, fd: int, pages: PageRange) -> None:
        page_map = self.by_fd(fd).page_map
        assert page_map is not None
        page_map.set(pages, ABSENT)

    def close(self) -> None:
        for file in self.files.values():
            os.close(file.fd)
            if file.page_map is not None:
                file.page_map.close()


def region(shared: int, private: int = -1, **changes: int) -> UserspaceMemoryRegion:
    """A slot of PAGES pages at gpa 0."""
    values = {"slot": 0, "flags": KVM_MEM_FD, "gpa": 0, "size": PAGES * PAGE_SIZE, "offset": 0, **changes}
    return UserspaceMemoryRegion(
        values["slot"],
        values["flags"],
        Gpa(values["gpa"]),
        values["size"],
        ByteOffset(values["offset"]),
        shared,
        private,
    )


class VmOptions(TypedDict, total=False):
    """What create_vm takes by name."""

    map_on_fallocate: bool
    vm_type: VmType
    levels: int
    fault_around: int
    ownership: OwnershipTable | None


class NewVm(Protocol):
    """The fixture `new_vm`."""

    def __call__(self, **options: Unpack[VmOptions]) -> AbstractAsyncContextManager[tuple[VM, ScriptedStore]]:
        """Make a VM and the scripted store that it is connected to; a fault asks for its own page, if nothing else."""


@pytest.fixture
def new_vm(tmp_path: Path) -> NewVm:
    """A context manager: a VM and the scripted store that it is connected to."""

    numbers = itertools.count()

    @asynccontextmanager
    async def make(**options: Unpack[VmOptions]) -> AsyncIterator[tuple[VM, ScriptedStore]]:
        options.setdefault("fault_around", 1)
        path = f"{tmp_path}/store-{next(numbers)}.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(path)
        listener.listen(1)
        store = ScriptedStore()
        try:
            async with trio.open_nursery() as nursery:

                async def accept() -> None:
                    await trio.lowlevel.wait_readable(listener)
                    sock, _ = listener.accept()
                    store.peer = Peer(sock, Role.STORE)
                    await store.serve()

                nursery.start_soon(accept)
                async with create_vm(path, **options) as vm:
                    yield vm, store
                    vm.check()
                nursery.cancel_scope.cancel()
        finally:
            listener.close()
            if store.peer is not None:
                store.peer.close()
            store.close()

    return make
