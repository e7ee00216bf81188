"""The socket on which owners talk to memfs: accepts connections, runs the protocol, calls the registry.

A file is named by an open descriptor of it, as KVM takes an fd, so who may own a file is who may open it for writing.
What the descriptor is, the server reads from /proc/self/fdinfo: flags, inode number and mount id. It must not fstat
it, nor do anything else that asks the filesystem behind it: that is ourselves, and we would wait for us for ever. The
mount id is looked up in mountinfo, ours or, for a peer in another mount namespace, the peer's, and the device number
found there says whether the file is one of this mount's (whatever bind mount it was opened through).

Requests that may have to wait for a file (Register, GetPfn, Populate, Launch) run as tasks, so that a PutPfn or an Ack
behind them on the same connection, for which somebody may be waiting, is not held up. The rest is answered in order.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from typing import Final

import trio

from memfs.guest.death import is_dying
from memfs.guest.image import launch, populate
from memfs.guest.messages import (
    VERSION,
    Ack,
    Done,
    Failed,
    Fenced,
    GetPfn,
    Hello,
    HelloReply,
    Launch,
    Measured,
    Message,
    Populate,
    PutPfn,
    Register,
    Registered,
    Unregister,
)
from memfs.guest.peer import Incoming, Peer, PeerGone, close_all
from memfs.guest.protocol import RemoteProtocolError, Role
from memfs.guest.registry import Notification, Owner, OwnerGone, Registration, Registry
from memfs.inode import RegularFile
from memfs.mountinfo import device_of_mount_id
from memfs.tree import Tree
from memfs.units import PAGE_SIZE

log = logging.getLogger(__name__)

_LOOK_INTERVAL: Final = 0.05  # seconds between two looks at the process of an owner that is being waited for
_FAREWELL: Final = 0.1  # seconds: how long we try to tell a peer that is being cut off why


class Server:
    """Listens on a socket for the owners of one mount's files.

    `device` is the mount's device number as "major:minor".
    """

    def __init__(self, listener: trio.socket.SocketType, registry: Registry, tree: Tree, device: str) -> None:
        self._listener: Final = listener
        self._registry: Final = registry
        self._tree: Final = tree
        self._device: Final = device

    async def run(self) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = await self._listener.accept()
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        raise
                    log.error("cannot accept a connection: %s", error.strerror)  # noqa: TRY400
                    await trio.sleep(0.1)  # until some descriptor is closed; accepting at once would spin
                    continue
                nursery.start_soon(self._serve, sock)

    async def _serve(self, sock: trio.socket.SocketType) -> None:
        await _Session(sock, self._registry, self._tree, self._device).run()


class _Session:
    """One connection, that is, one owner."""

    def __init__(self, sock: trio.socket.SocketType, registry: Registry, tree: Tree, device: str) -> None:
        self._peer: Final = Peer(sock, Role.STORE)
        self._pid: Final = _peer_pid(sock)
        self._registry: Final = registry
        self._tree: Final = tree
        self._device: Final = device
        self._waited_for = trio.Event()  # replaced when nothing is unanswered any more
        self._owner: Final[Owner] = registry.new_owner(self._notify, self._cut_off)

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery, contextlib.aclosing(self._peer.requests()) as requests:
                nursery.start_soon(self._end_with_process)
                async for request in requests:
                    if isinstance(request.message, GetPfn | Register | Populate | Launch):
                        nursery.start_soon(self._answer, request)
                    else:
                        await self._answer(request)
                nursery.cancel_scope.cancel()
        except* RemoteProtocolError as group:
            log.warning("%s broke the protocol and is cut off: %s", self._owner, group.exceptions[0])
        except* Exception as group:
            log.exception("%s is cut off: a bug in memfs", self._owner, exc_info=group)
        finally:
            self._peer.close()
            self._registry.end(self._owner)

    async def _end_with_process(self) -> None:
        """While the owner is being waited for, see whether it can still answer."""
        while True:
            await self._waited_for.wait()
            await trio.sleep(_LOOK_INTERVAL)
            if self._peer.protocol.unanswered == 0:
                self._waited_for = trio.Event()
            elif is_dying(self._pid):
                self._registry.end(self._owner)
                self._peer.close()
                return

    async def _answer(self, request: Incoming) -> None:
        reply: Message
        fds: tuple[int, ...] = ()
        try:
            try:
                reply, fds = await self._act(request)
            finally:
                close_all(request.fds)
        except OSError as error:
            reply = Failed(error.errno or errno.EIO, str(error.strerror))
        with contextlib.suppress(PeerGone):
            await self._peer.reply(request.id, reply, fds)

    async def _act(self, request: Incoming) -> tuple[Message, tuple[int, ...]]:
        message, owner = request.message, self._owner
        match message:
            case Hello():
                if not message.min_version <= VERSION <= message.max_version:
                    raise OSError(errno.EPROTONOSUPPORT, f"memfs speaks protocol version {VERSION}")
                owner.name = message.name
                return HelloReply(VERSION, PAGE_SIZE), ()
            case Register():
                return await self._register(request.fds[0])
            case Unregister(file):
                self._registry.unregister(owner, file)
            case GetPfn(file, pages, alloc):
                return await owner.registration(file).get_pfn(pages, alloc=alloc), ()
            case PutPfn(file, pages):
                owner.registration(file).put_pfn(pages)
            case Populate():
                return await self._populate(message, *request.fds), ()
            case Launch(file):
                return await self._launch(owner.registration(file)), ()
            case _:
                raise AssertionError(f"the protocol let {message} through")
        return Done(), ()

    async def _register(self, fd: int) -> tuple[Message, tuple[int, ...]]:
        inode = self._identify(fd)
        async with inode.file.locked():  # the file is not in the middle of becoming something else
            registration = self._registry.register(self._owner, inode)
            file = inode.file
            fds = (file.fd,) if not file.guest or file.page_map is None else (file.fd, file.page_map.fd)
            return Registered(registration.id, inode.ino, file.size, file.seals), fds

    async def _populate(self, message: Populate, fd: int, source: int) -> Message:
        inode = self._identify(fd)
        with self._tree.holding(inode):
            return Measured(await populate(inode.file, message.pages, source, message.source))

    async def _launch(self, registration: Registration) -> Message:
        with self._tree.holding(registration.inode):
            async with registration.file.locked():
                return Measured(launch(registration.file))

    def _identify(self, fd: int) -> RegularFile:
        """Which of our files a descriptor is of. Raises OSError as Register's documentation says."""
        info = _fdinfo(fd)
        device = device_of_mount_id(info["mnt_id"], "self") or device_of_mount_id(info["mnt_id"], str(self._pid))
        if device != self._device:
            raise OSError(errno.EINVAL, "not a file of this mount")
        flags = int(info["flags"], 8)
        if flags & os.O_PATH:
            raise OSError(errno.EBADF, "an O_PATH descriptor")
        inode = self._tree.inode(int(info["ino"]))
        if not stat.S_ISREG(inode.mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EACCES, "not open for writing")
        return self._tree.regular(inode.ino)

    async def _notify(self, message: Notification) -> Ack:
        self._waited_for.set()
        try:
            incoming = await self._peer.call(message)
        except PeerGone as error:
            raise OwnerGone from error
        assert isinstance(incoming.message, Ack)
        return incoming.message

    async def _cut_off(self, reason: str) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _FAREWELL), contextlib.suppress(PeerGone):
            await self._peer.tell(Fenced(errno.ETIMEDOUT, reason))
        self._peer.close()


def _fdinfo(fd: int) -> dict[str, str]:
    """/proc/self/fdinfo of a descriptor (proc_pid_fdinfo(5))."""
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _peer_pid(sock: trio.socket.SocketType) -> int:
    pid, _, _ = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)
