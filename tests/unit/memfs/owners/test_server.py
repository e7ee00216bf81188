"""The server and its sessions without a mount: a real socket, a real Tree, and a tmpfs in the mount's place.

A descriptor says which file it is of by its device and inode number. A tmpfs on which the same files are made in the
same order as in the Tree gives them the same numbers, so its descriptors are taken for the mount's.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import os
import resource
import socket
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from trio.testing import wait_all_tasks_blocked

from memfs.contract.aio.turns import SHARE
from memfs.contract.page_map import PageMapView
from memfs.contract.protocol.call import Incoming
from memfs.contract.protocol.client import Client, StoreGone, connect
from memfs.contract.protocol.connection import Role
from memfs.contract.protocol.messages import (
    Failed,
    Fallocate,
    FileId,
    Hello,
    InvalidateBegin,
    InvalidateEnd,
    Message,
    Register,
)
from memfs.contract.protocol.peer import Peer, close_all, open_connection
from memfs.contract.units import PAGE_SIZE, ByteOffset
from memfs.owners.admission import Clients
from memfs.owners.closer import Closer
from memfs.owners.listener import listen
from memfs.owners.registry import Registry
from memfs.owners.server import Server
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.seals import F_SEAL_GUEST, F_SEAL_WRITE
from memfs.store.tmpfs_backing import TmpfsBacking
from memfs.tree.inode import RegularFile
from memfs.tree.inode_flags import FS_APPEND_FL, FS_IMMUTABLE_FL
from memfs.tree.tree import ROOT_INO
from tests.helpers import at, datagram, new_backing, not_none, pages, raises

from ..tree.places import SIZE, OnTmpfs, OnTree
from .test_admission import ALICE, CONNECT, GROUP


class Guest:
    """An owner that writes down what it hears, and answers when it may."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.may_answer = trio.Event()
        self.may_answer.set()

    async def hear(self, message: Message) -> None:
        """Act on a notification."""
        self.heard.append(message)
        await self.may_answer.wait()


class Mount:
    """Everything but FUSE: files that are in the Tree and on the tmpfs, and a server."""

    def __init__(self, ours: OnTree, beside: OnTmpfs, root: Path, path: str, closer: Closer) -> None:
        self.ours = ours
        self.beside = beside
        self.root = root
        self.path = path
        self.registry = Registry(ours.tree, notify_timeout=30)
        self.clients = Clients(0o600, None)
        self.closer = closer

    def server(self, listener: socket.socket) -> Server:
        """The server of this mount."""
        device = os.stat(self.root).st_dev
        name = f"{os.major(device)}:{os.minor(device)}"
        return Server(listener, self.clients, self.closer, self.registry, self.ours.tree, name)

    def make(self, name: str, seals: int = 0, mode: int = stat.S_IFREG | 0o600) -> RegularFile:
        """Make a file."""
        inode = self.ours.tree.create(ROOT_INO, name.encode(), mode, 0, 0, seals=seals)
        self.beside.make(name, mode)
        assert self.beside.number(name) == inode.ino, "the tmpfs numbers its inodes in another way"
        assert isinstance(inode, RegularFile) or not stat.S_ISREG(mode)
        return inode  # type: ignore[return-value]

    async def guest_file(self, name: str) -> RegularFile:
        """Make a guest-sealed file of 16 pages, none of which is allocated."""
        inode = self.make(name, F_SEAL_GUEST)
        await inode.file.truncate(at(16))
        return inode

    def open(self, name: str, flags: int = os.O_RDWR) -> int:
        """A descriptor of a file, as an owner has it."""
        return os.open(self.root / name, flags)

    async def register(self, client: Client, name: str) -> tuple[FileId, tuple[int, ...]]:
        """Register a file; the descriptors that come are the caller's."""
        fd = self.open(name)
        try:
            registered, fds = await client.register(fd)
        finally:
            os.close(fd)
        return registered.file, fds

    @asynccontextmanager
    async def connected(self, guest: Guest | None = None) -> AsyncIterator[Client]:
        """A connection of an owner's."""
        async with connect(self.path, "test", (guest or Guest()).hear) as client:
            yield client


@pytest.fixture(params=[MemfdBacking, TmpfsBacking])
def tree_place(request: pytest.FixtureRequest) -> Iterator[OnTree]:
    """A Tree, checked in the end."""
    place = OnTree(new_backing(request.param, SIZE))
    yield place
    place.end()


@pytest.fixture
def closer() -> Iterator[Closer]:
    """A closer."""
    closer = Closer.start()
    yield closer
    closer.stop()


@pytest.fixture
async def mount(
    tree_place: OnTree, tmpfs: Path, tmp_path_factory: pytest.TempPathFactory, nursery: trio.Nursery, closer: Closer
) -> AsyncIterator[Mount]:
    """A mount whose server runs; in the end nothing is registered."""
    path = str(tmp_path_factory.mktemp("socket") / "memfs.sock")
    mount = Mount(tree_place, OnTmpfs(tmpfs), tmpfs, path, closer)
    with closing(listen([path], 0o600, None)) as listener:
        nursery.start_soon(closer.run)
        server = mount.server(listener.socket)
        nursery.start_soon(server.run)
        yield mount
        await server.end()
    await settled(mount)
    mount.registry.check()
    assert (mount.registry.owners, mount.clients.connections) == ({}, 0)
    assert all(inode.file.owner is None and not inode.holds for inode in tree_place.tree.files())


async def settled(mount: Mount) -> None:
    """Wait until the server knows that those who left have left."""
    with trio.fail_after(10):
        while mount.clients.connections:  # noqa: ASYNC110
            await trio.sleep(0.002)


# -- registering ------------------------------------------------------------------------------------------------------


async def test_owner_gets_the_memory_of_a_file(mount: Mount) -> None:
    inode = mount.make("file")
    await inode.file.allocate(at(0), at(2), keep_size=False)
    async with mount.connected() as client:
        fd = mount.open("file")
        registered, fds = await client.register(fd)
        os.close(fd)
        assert (registered.ino, registered.size, registered.seals) == (inode.ino, 2 * PAGE_SIZE, 0)
        assert len(fds) == 1
        os.pwrite(fds[0], b"from the owner", 0)
        with mount.ours.tree.holding(inode):
            assert inode.file.read(at(0), 14) == b"from the owner"
        assert inode.file.owner is not None
        await client.unregister(registered.file)
        assert inode.file.owner is None
        with raises(errno.EBADF):
            await client.unregister(registered.file)
        close_all(fds)


async def test_owner_of_a_guest_sealed_file_sees_what_is_allocated(mount: Mount) -> None:
    inode = await mount.guest_file("file")
    async with mount.connected() as client:
        file, fds = await mount.register(client, "file")
        page_map = PageMapView(fds[1])
        reply = await client.get_pfn(file, pages(2, 4), alloc=True)
        assert [(run.pages, run.pfn is not None) for run in reply.runs] == [(pages(2, 4), True)]
        assert (page_map.count(pages(0, 16)), inode.file.stat().st_blocks) == (2, 16)
        reply = await client.get_pfn(file, pages(4, 6), alloc=False)
        assert [(run.pages, run.pfn) for run in reply.runs] == [(pages(4, 6), None)]
        page_map.close()
        close_all(fds)


async def test_owner_of_a_file_sealed_against_writes_can_only_read(mount: Mount) -> None:
    mount.make("file", F_SEAL_WRITE)
    async with mount.connected() as client:
        _, fds = await mount.register(client, "file")
        with raises(errno.EBADF):
            os.pwrite(fds[0], b"x", 0)
        close_all(fds)


async def test_file_of_one_owner_is_no_other_s(mount: Mount) -> None:
    await mount.guest_file("file")
    async with mount.connected() as first, mount.connected() as second:
        file, fds = await mount.register(first, "file")
        for refused in (
            lambda: mount.register(second, "file"),
            lambda: second.get_pfn(file, pages(0, 1), alloc=True),
            lambda: second.unregister(file),
            lambda: second.launch(file),
        ):
            with raises(errno.EPERM, errno.EBADF):
                await refused()
        assert (await first.get_pfn(file, pages(0, 1), alloc=False)).runs[0].pfn is None
        close_all(fds)


REFUSED: dict[str, tuple[int, Callable[[Mount], int]]] = {
    "not of the mount": (errno.EINVAL, lambda mount: os.open("/dev/null", os.O_RDWR)),
    "only to read": (errno.EACCES, lambda mount: mount.open("file", os.O_RDONLY)),
    "only to write": (errno.EACCES, lambda mount: mount.open("file", os.O_WRONLY)),
    "no access at all": (errno.EBADF, lambda mount: mount.open("file", os.O_PATH)),
    "a directory": (errno.EINVAL, lambda mount: mount.open("d", os.O_RDONLY)),
    "a fifo": (errno.EINVAL, lambda mount: mount.open("fifo", os.O_RDWR)),
    "gone": (errno.ESTALE, lambda mount: mount.open("gone")),
    "immutable": (errno.EPERM, lambda mount: mount.open("immutable")),
    "append-only": (errno.EPERM, lambda mount: mount.open("append-only")),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refused_file_is_nobody_s(mount: Mount, name: str) -> None:
    number, open_ = REFUSED[name]
    inode = mount.make("file")
    mount.make("d", mode=stat.S_IFDIR | 0o700)
    mount.make("fifo", mode=stat.S_IFIFO | 0o600)
    mount.make("gone")
    mount.ours.unlink("gone")
    mount.make("immutable").flags = FS_IMMUTABLE_FL
    mount.make("append-only").flags = FS_APPEND_FL
    async with mount.connected() as client:
        fd = open_(mount)
        with raises(number):
            await client.register(fd)
        os.close(fd)
        assert all(inode.file.owner is None and not inode.holds for inode in mount.ours.tree.files())
        mount.registry.check()
        _, fds = await mount.register(client, "file")  # and it goes on
        assert inode.file.owner is not None
        close_all(fds)


async def test_nothing_is_left_open(mount: Mount) -> None:
    await mount.guest_file("file")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        async with mount.connected() as client:
            file, fds = await mount.register(client, "file")
            close_all(fds)
            fd = mount.open("file", os.O_RDONLY)
            with raises(errno.EACCES):
                await client.register(fd)
            os.close(fd)
            await client.unregister(file)
    with trio.fail_after(10):  # threads close what strangers sent
        while len(os.listdir("/proc/self/fd")) > before:  # noqa: ASYNC110
            await trio.sleep(0.002)


# -- what an owner hears ----------------------------------------------------------------------------------------------


async def test_owner_hears_what_happens_to_its_memory(mount: Mount) -> None:
    inode, guest = await mount.guest_file("file"), Guest()
    async with mount.connected(guest) as client:
        file, fds = await mount.register(client, "file")
        await inode.file.allocate(at(0), at(4), keep_size=False)
        await inode.file.punch(at(1), at(2))
        with trio.fail_after(10):
            while len(guest.heard) < 3:  # nobody waits for the end to be acted upon
                await trio.lowlevel.checkpoint()
        assert [(type(message), message.file, message.pages) for message in guest.heard] == [  # type: ignore[attr-defined]
            (Fallocate, file, pages(0, 4)),
            (InvalidateBegin, file, pages(1, 3)),
            (InvalidateEnd, file, pages(1, 3)),
        ]
        close_all(fds)


async def test_memory_goes_when_the_owner_has_acted(mount: Mount) -> None:
    inode, guest = await mount.guest_file("file"), Guest()
    async with mount.connected(guest) as client:
        _, fds = await mount.register(client, "file")
        await inode.file.allocate(at(0), at(4), keep_size=False)
        guest.may_answer = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inode.file.punch, at(1), at(2))
            with trio.fail_after(10):
                while len(guest.heard) < 2:
                    await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked()
            assert inode.file.stat().st_blocks == 4 * 8
            guest.may_answer.set()
        assert inode.file.stat().st_blocks == 2 * 8
        close_all(fds)


async def test_owner_that_leaves_holds_up_nobody(mount: Mount) -> None:
    inode, guest = await mount.guest_file("file"), Guest()
    await inode.file.allocate(at(0), at(4), keep_size=False)
    async with trio.open_nursery() as nursery, mount.connected(guest) as client:
        file, fds = await mount.register(client, "file")
        await client.get_pfn(file, pages(0, 4), alloc=False, lock=True)
        guest.may_answer = trio.Event()
        nursery.start_soon(inode.file.punch, at(1), at(2))
        await wait_all_tasks_blocked(0.01)
        close_all(fds)
    assert inode.file.stat().st_blocks == 2 * 8
    await settled(mount)
    assert (inode.file.owner, inode.holds) == (None, 0)


async def test_owner_whose_process_cannot_answer_any_more_is_not_waited_for(
    mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    inode, guest = await mount.guest_file("file"), Guest()
    await inode.file.allocate(at(0), at(4), keep_size=False)
    async with mount.connected(guest) as client:
        _, fds = await mount.register(client, "file")
        guest.may_answer = trio.Event()
        monkeypatch.setattr("memfs.owners.session.is_dying", lambda pid: pid == os.getpid())
        with trio.fail_after(10):
            await inode.file.punch(at(1), at(2))
            await client.ended.wait()
        assert inode.file.owner is None
        close_all(fds)


async def test_unlinked_file_lives_until_its_owner_leaves(mount: Mount) -> None:
    inode = await mount.guest_file("file")
    await inode.file.allocate(at(0), at(4), keep_size=False)
    async with mount.connected() as client:
        _, fds = await mount.register(client, "file")
        mount.ours.unlink("file")
        assert mount.ours.tree.inode(inode.ino) is inode
        close_all(fds)
    await settled(mount)
    with raises(errno.ESTALE):
        mount.ours.tree.inode(inode.ino)


# -- populating -------------------------------------------------------------------------------------------------------


def memfd(content: bytes) -> int:
    """A memfd that will not shrink."""
    fd = os.memfd_create("content", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


async def test_content_comes_before_the_launch_and_not_after(mount: Mount) -> None:
    inode = await mount.guest_file("file")
    content, fd = memfd(b"x" * PAGE_SIZE), mount.open("file")
    async with mount.connected() as client:
        file, fds = await mount.register(client, "file")
        measured = await client.populate(fd, pages(3, 4), content, ByteOffset(0))
        assert (os.pread(fds[0], PAGE_SIZE, at(3)), len(measured)) == (b"x" * PAGE_SIZE, hashlib.sha384().digest_size)
        assert await client.launch(file) == measured
        with raises(errno.EBUSY):
            await client.populate(fd, pages(4, 5), content, ByteOffset(0))
        assert (inode.file.stat().st_blocks, await client.launch(file)) == (8, measured)
        close_all((*fds, fd, content))


async def test_populate_without_a_right_to_the_file(mount: Mount) -> None:
    inode = await mount.guest_file("file")
    content, fd = memfd(b"x" * PAGE_SIZE), mount.open("file", os.O_RDONLY)
    async with mount.connected() as client:
        with raises(errno.EACCES):
            await client.populate(fd, pages(0, 1), content, ByteOffset(0))
    assert (inode.file.stat().st_blocks, inode.holds) == (0, 0)
    close_all((fd, content))


# -- connections ------------------------------------------------------------------------------------------------------


async def test_end_is_said(mount: Mount) -> None:
    inode = await mount.guest_file("file")
    with closing(listen([f"{mount.path}-2"], 0o600, None)) as listener:
        server = mount.server(listener.socket)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            async with connect(f"{mount.path}-2", "test", Guest().hear) as client:
                _, fds = await mount.register(client, "file")
                await server.end()
                with trio.fail_after(10):
                    await client.ended.wait()
                fenced = not_none(client.fenced)
                assert (fenced.errno, fenced.text) == (errno.ESHUTDOWN, "memfs has ended")
                with pytest.raises(StoreGone, match="memfs has ended"):
                    await client.launch(FileId(1))
                assert (inode.file.owner, mount.registry.owners) == (None, {})
                close_all(fds)


async def test_connections_of_a_user_that_end_together_take_many_turns(mount: Mount) -> None:
    """To end one is some work, so of those that end in one moment a few do in an event-loop iteration."""
    clients = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(100)]
    for client in clients:
        client.connect(mount.path)
    with trio.fail_after(10):
        while len(mount.registry.owners) < len(clients):
            await trio.lowlevel.checkpoint()
    for client in clients:
        client.close()
    ended = list[int]()
    with trio.fail_after(10):
        while mount.registry.owners:
            before = len(mount.registry.owners)
            await trio.lowlevel.checkpoint()
            ended.append(before - len(mount.registry.owners))
    assert sum(ended) == len(clients)
    assert max(ended) <= SHARE // 2


@pytest.mark.parametrize("datagram", [b"", b"nonsense", b"\xff" * 64, datagram(0, length=1 << 30)])
async def test_owner_that_breaks_the_protocol_is_cut_off_and_others_are_not(mount: Mount, datagram: bytes) -> None:
    await mount.guest_file("file")
    async with mount.connected() as client:
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            await sock.connect(mount.path)
            await sock.send(datagram)
            with trio.fail_after(10):
                while await sock.recv(4096):
                    pass
        _, fds = await mount.register(client, "file")
        close_all(fds)


async def nobody_asks(request: Incoming) -> None:
    raise AssertionError(request.message)


@pytest.mark.parametrize(
    ("low", "high", "theirs"),
    [(1, 1, "version 1; update the owner's program"), (99, 100, "versions 99 to 100; update memfs")],
)
async def test_owner_of_another_version_is_told(mount: Mount, low: int, high: int, theirs: str) -> None:
    peer = Peer(await open_connection(mount.path), Role.OWNER)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.serve, nobody_asks)
        with trio.fail_after(10):
            reply = await peer.call(Hello(low, high))
        assert reply.message == Failed(
            errno.EPROTONOSUPPORT, f"memfs speaks version 2 of the protocol, and this owner {theirs}"
        )
        peer.close()
        nursery.cancel_scope.cancel()


async def test_silent_connections_make_way_for_others(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memfs.owners.admission.MAX_SILENT", 2)
    silent = []
    for _ in range(3):
        silent.append(trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        await silent[-1].connect(mount.path)
    with trio.fail_after(10):
        assert await silent[0].recv(1) == b""
    async with mount.connected() as client:
        assert client.gone is None
    for sock in silent:
        sock.close()


async def test_user_that_may_not_connect_is_hung_up(mount: Mount) -> None:
    """Also when the socket's file admits it: what counts is what was asked for."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a process of another user")
    name = f"memfs-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:  # of nobody's mode
        listener.bind(f"\0{name}")
        listener.listen(1)
        listener.setblocking(False)
        server = mount.server(listener)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            with trio.fail_after(20):
                await trio.run_process([sys.executable, "-Ic", CONNECT, name, str(ALICE), str(GROUP)])
            await server.end()
    assert mount.registry.owners == {}


@pytest.mark.parametrize("step", ["memfs.owners.admission.PeerCredentials.of", "memfs.owners.server.Session"])
async def test_connection_for_which_something_is_missing_ends_and_no_other(
    mount: Mount, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "told to fail")

    async with mount.connected() as client:
        with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            patch.setattr(step, fail)
            sock.setblocking(False)
            sock.connect(mount.path)
            with trio.fail_after(10):
                await trio.lowlevel.wait_readable(sock)
            assert sock.recv(1) == b""
        assert client.gone is None
        assert mount.clients.connections == 1


@contextmanager
def no_descriptor_to_spare() -> Iterator[None]:
    """Have this process be able to open nothing more within a with statement."""
    gc.collect()  # what earlier tests left would give some back in the middle
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limit[1]))
    with ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
        with suppress(OSError):
            while True:
                opened.callback(os.close, os.open("/dev/null", os.O_RDONLY))
        yield


async def test_without_a_descriptor_a_connection_ends_rather_than_wait(mount: Mount) -> None:
    async with mount.connected() as client:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with sock, no_descriptor_to_spare():
            sock.setblocking(False)
            sock.connect(mount.path)
            with trio.fail_after(10):
                await trio.lowlevel.wait_readable(sock)
                assert sock.recv(1) == b""
        assert client.gone is None
        async with mount.connected() as another:
            assert another.gone is None


async def test_register_without_a_descriptor_to_spare_is_refused(mount: Mount) -> None:
    """The file's descriptor does not get to memfs, which has none left for it."""
    inode = mount.make("file")
    async with mount.connected() as client:
        fd = mount.open("file")
        with no_descriptor_to_spare(), trio.fail_after(10):
            reply = await client.request(Register(), [fd])
        os.close(fd)
        assert isinstance(reply.message, Failed)
        assert reply.message.errno == errno.EMFILE
        assert (inode.file.owner, inode.holds) == (None, 0)
