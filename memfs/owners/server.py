"""The socket on which owners talk to memfs: accepts connections, runs the protocol, calls the registry.

A file is named by an open descriptor of it, as KVM takes an fd, so who may own a file is who may open it for writing.
What the descriptor is, the server reads from /proc/self/fdinfo: flags, inode number and mount id. It must not fstat
it, nor do anything else that asks the filesystem behind it: that is ourselves, and we would wait for us for ever. The
mount id is looked up in mountinfo, ours or, for a peer in another mount namespace, the peer's, and the device number
found there says whether the file is one of this mount's (whatever bind mount it was opened through).

A descriptor that a stranger sent may lead to a filesystem that answers nothing, and one of our own files has the kernel
ask us before close(2) returns, so descriptors are looked at and closed where that holds up nobody (admission.py). What
an owner gets is opened anew for it: a description shared with us would let it set O_APPEND on ours.

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
from collections.abc import Coroutine
from typing import Any, Final

import trio

from memfs.contract.aio.poller import Poller
from memfs.contract.logs import fields
from memfs.contract.protocol.connection import LocalProtocolError, RemoteProtocolError, Role
from memfs.contract.protocol.messages import (
    VERSION,
    Ack,
    Done,
    Failed,
    Fenced,
    GetPfn,
    Hello,
    HelloReply,
    InvalidateEnd,
    Launch,
    Measured,
    Message,
    Populate,
    PutPfn,
    Register,
    Registered,
    Unregister,
)
from memfs.contract.protocol.peer import Incoming, Peer, PeerGone, close_all
from memfs.contract.sys.fdinfo import fdinfo
from memfs.contract.sys.mountinfo import device_of_mount_id
from memfs.contract.units import PAGE_SIZE
from memfs.owners.admission import Client, Clients, Credentials, Refused
from memfs.owners.liveness import is_dying
from memfs.owners.populate import launch, populate
from memfs.owners.registry import Notification, Owner, OwnerGone, Registration, Registry
from memfs.store import seals
from memfs.store.chunks import run_now
from memfs.store.file import File
from memfs.tree import inode_flags
from memfs.tree.inode import RegularFile
from memfs.tree.tree import Tree

log = logging.getLogger(__name__)

_LOOK_INTERVAL: Final = 0.05  # seconds between two looks at the processes of owners that are being waited for
_PATIENCE: Final = 150e-6  # seconds in which nothing else is done when an owner is told: three times what it takes
_FAREWELL: Final = 0.1  # seconds: how long we try to tell a peer that is being cut off why


class Server:
    """Listens on a socket for the owners of one mount's files.

    `device` is the mount's device number as "major:minor".
    """

    def __init__(
        self, listener: trio.socket.SocketType, clients: Clients, registry: Registry, tree: Tree, device: str
    ) -> None:
        self._listener: Final = listener
        self._clients: Final = clients
        self._registry: Final = registry
        self._tree: Final = tree
        self._device: Final = device
        self._sessions: Final[dict[Owner, _Session]] = {}
        self._scope: trio.CancelScope | None = None
        self._ended: Final = trio.Event()
        Poller.here()  # now, while there is a descriptor for it
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # so that there is always one to accept with

    async def run(self) -> None:
        """Serve until cancelled, or told to end."""
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._look_for_the_dead)
                while True:
                    await trio.lowlevel.wait_readable(self._listener)  # without a descriptor left even asking is EMFILE
                    try:
                        sock, _ = await self._listener.accept()
                    except OSError as error:
                        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                            raise
                        await self._turn_away(error)
                    else:
                        self._let_in(sock, nursery)
        finally:
            if self._spare >= 0:
                os.close(self._spare)
            self._ended.set()

    async def _look_for_the_dead(self) -> None:
        """While owners are being waited for, see whether they can still answer."""
        while True:
            await self._registry.waiting.wait()
            await trio.sleep(_LOOK_INTERVAL)
            if not self._registry.pending:
                self._registry.waiting = trio.Event()
            for owner in list(self._registry.waited_for):
                if owner in self._sessions:
                    self._sessions[owner].end_if_dead()

    async def end(self) -> None:
        """Let nobody in any more, tell all owners that it is over, and forget them. Nothing waits for them then."""
        if self._scope is not None:
            async with trio.open_nursery() as nursery:
                for session in self._sessions.values():
                    nursery.start_soon(session.say_farewell, errno.ESHUTDOWN, "memfs has ended")
            self._scope.cancel()
            await self._ended.wait()

    def _let_in(self, sock: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        try:
            credentials = Credentials.of(sock)
            client = self._clients.admit(credentials, lambda: _hang_up(sock, credentials))
        except Refused as refused:
            log.warning("%s", refused)
            self._clients.turn_away(sock)
            return
        try:
            session = _Session(sock, client, self._registry, self._tree, self._device)
        except OSError as error:  # no memory, or no room in an epoll, is no reason to end everybody else
            log.error("%s is turned away: %s", credentials, error.strerror)  # noqa: TRY400
            client.left()
            self._clients.turn_away(sock)
            return
        nursery.start_soon(self._run, session)

    async def _run(self, session: _Session) -> None:
        self._sessions[session.owner] = session
        log.info("connected", extra=fields(owner=session.owner.number, pid=session.pid))
        try:
            await session.run()
        finally:
            log.info("disconnected", extra=fields(owner=session.owner.number))
            del self._sessions[session.owner]

    async def _turn_away(self, error: OSError) -> None:
        """No descriptor is left for who wants to connect: end the connection rather than let it wait."""
        log.error("a connection is turned away: %s", error.strerror)
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        with contextlib.suppress(OSError), trio.move_on_after(0.1):
            sock, _ = await self._listener.accept()
            await self._clients.turn_away(sock).wait()
        try:
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            await trio.sleep(0.1)  # somebody else took it; accepting at once would spin


def _hang_up(sock: trio.socket.SocketType, credentials: Credentials) -> None:
    """End a connection whose session then notices. It may have ended already."""
    log.warning("%s is hung up: it did not say Hello, and others came", credentials)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class _Session:
    """One connection, that is, one owner."""

    __slots__ = ("_client", "_device", "_peer", "_registry", "_tree", "owner", "pid")

    def __init__(
        self, sock: trio.socket.SocketType, client: Client, registry: Registry, tree: Tree, device: str
    ) -> None:
        self._client: Final = client
        self._peer: Final = Peer(sock, Role.STORE, client.discard)
        self.pid: Final = client.credentials.pid
        self._registry: Final = registry
        self._tree: Final = tree
        self._device: Final = device
        self.owner: Final[Owner] = registry.new_owner(self._notify, self._cut_off, self._is_dead)

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                await self._peer.serve(lambda request: self._begin(request, nursery))
                nursery.cancel_scope.cancel()
        except* RemoteProtocolError as group:
            log.warning("%s broke the protocol and is cut off: %s", self.owner, group.exceptions[0])
        except* PeerGone as group:
            log.error("%s is cut off: %s", self.owner, group.exceptions[0])  # noqa: TRY400
        except* Exception as group:
            log.exception("%s is cut off: a bug in memfs", self.owner, exc_info=group)
        finally:
            self._peer.close()
            self._registry.end(self.owner)
            self._client.left()

    def _begin(self, request: Incoming, nursery: trio.Nursery) -> Coroutine[Any, Any, None] | None:
        """Answer a request, or have a task do it; what is returned is to be awaited before the next one."""
        if self._may_wait(request.message):
            nursery.start_soon(self._answer, request)
            return None
        try:
            reply, _ = run_now(self._act(request))
        except OSError as error:
            reply = _failed(error)
        with contextlib.suppress(PeerGone):
            return self._peer.reply_now(request.id, reply)
        return None

    def _may_wait(self, message: Message) -> bool:
        """Whether somebody else may have to do something before that can be answered."""
        if isinstance(message, GetPfn):
            registration = self.owner.registrations.get(message.file)
            return registration is not None and not registration.is_quick(message.pages)
        return isinstance(message, Register | Populate | Launch)

    def end_if_dead(self) -> None:
        """End it if it cannot answer any more."""
        if self._is_dead():
            self._registry.end(self.owner)
            self._peer.close()

    def _is_dead(self) -> bool:
        return is_dying(self.pid)

    async def _answer(self, request: Incoming) -> None:
        reply: Message
        fds: tuple[int, ...] = ()
        try:
            try:
                reply, fds = await self._act(request)
            finally:
                await self._client.close(request.fds)
        except OSError as error:
            reply = _failed(error)
        try:
            with contextlib.suppress(PeerGone):
                await self._peer.reply(request.id, reply, fds)
        finally:
            close_all(fds)

    async def _act(self, request: Incoming) -> tuple[Message, tuple[int, ...]]:
        message, owner = request.message, self.owner
        match message:
            case Hello():
                if not message.min_version <= VERSION <= message.max_version:
                    raise OSError(errno.EPROTONOSUPPORT, f"memfs speaks protocol version {VERSION}")
                owner.name = message.name
                self._client.greeted()
                return HelloReply(VERSION, PAGE_SIZE), ()
            case Register():
                return await self._register(request)
            case Unregister(file):
                self._registry.unregister(owner, file)
            case GetPfn(file, pages, alloc, lock):
                return await owner.registration(file).get_pfn(pages, alloc=alloc, lock=lock), ()
            case PutPfn(file, pages):
                owner.registration(file).put_pfn(pages)
            case Populate():
                return await self._populate(message, request.fds), ()
            case Launch(file):
                return await self._launch(owner.registration(file)), ()
            case _:
                raise AssertionError(f"the protocol let {message} through")
        return Done(), ()

    async def _register(self, request: Incoming) -> tuple[Message, tuple[int, ...]]:
        if not request.fds:
            raise OSError(errno.EMFILE, "memfs has no descriptor left for the file's")
        inode = await self._identify(request.fds[0])
        with self._tree.holding(inode):
            async with inode.file.locked():  # the file is not in the middle of becoming something else
                await self._registry.make_way(inode, self.owner)
                fds = _for_owner(inode.file)
                try:
                    registration = self._registry.register(self.owner, inode)
                except OSError:
                    close_all(fds)
                    raise
                return Registered(registration.id, inode.ino, inode.file.size, inode.file.seals), fds

    async def _populate(self, message: Populate, fds: tuple[int, ...]) -> Message:
        if len(fds) < 2:
            raise OSError(errno.EMFILE, "memfs has no descriptors left for the file's and the content's")
        inode = await self._identify(fds[0])
        with self._tree.holding(inode):
            return Measured(await populate(inode.file, message.pages, fds[1], message.source))

    async def _launch(self, registration: Registration) -> Message:
        with self._tree.holding(registration.inode):
            async with registration.file.locked():
                return Measured(launch(registration.file))

    async def _identify(self, fd: int) -> RegularFile:
        """Which of our files a descriptor is of. Raises OSError as Register's documentation says."""
        info = await self._client.run_in_thread(fdinfo, fd)
        device = device_of_mount_id(info["mnt_id"], "self")
        if device is None:  # a peer may have mounted so much that to read it all takes long
            device = await self._client.run_in_thread(device_of_mount_id, info["mnt_id"], str(self.pid))
        if device != self._device:
            raise OSError(errno.EINVAL, "not a file of this mount")
        flags = int(info["flags"], 8)
        if flags & os.O_PATH:
            raise OSError(errno.EBADF, "an O_PATH descriptor")
        inode = self._tree.inode(int(info["ino"]))
        if not stat.S_ISREG(inode.mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if flags & os.O_ACCMODE != os.O_RDWR:  # an owner reads and writes, so it must have been let do both
            raise OSError(errno.EACCES, "not open for reading and writing")
        inode_flags.check_own(inode)
        return self._tree.regular(inode.ino)

    def _notify(self, message: Notification, is_alone: bool) -> Ack | Coroutine[Any, Any, Ack | None] | None:
        answer: Incoming | Coroutine[Any, Any, Incoming | None] | None
        try:
            if isinstance(message, InvalidateEnd):
                answer = self._peer.tell_now(message)
            else:
                answer = self._peer.ask(message, _PATIENCE if is_alone else 0)
        except PeerGone as error:
            raise OwnerGone from error
        return _ack(answer) if answer is None or isinstance(answer, Incoming) else _ack_to_come(answer)

    async def _cut_off(self, reason: str) -> None:
        await self.say_farewell(errno.ETIMEDOUT, reason)
        self._peer.close()

    async def say_farewell(self, number: int, reason: str) -> None:
        """Say, if that can be said soon, why it is over."""
        scope = trio.CancelScope(shield=True, deadline=trio.current_time() + _FAREWELL)
        with scope, contextlib.suppress(PeerGone, LocalProtocolError):  # the latter if it has not said Hello
            await self._peer.tell(Fenced(number, reason))


def _failed(error: OSError) -> Failed:
    return Failed(error.errno or errno.EIO, str(error.strerror))


def _ack(answer: Incoming | None) -> Ack | None:
    if answer is None:
        return None
    assert isinstance(answer.message, Ack)
    return answer.message


async def _ack_to_come(answer: Coroutine[Any, Any, Incoming | None]) -> Ack | None:
    try:
        return _ack(await answer)
    except PeerGone as error:
        raise OwnerGone from error


def _for_owner(file: File) -> tuple[int, ...]:
    """Descriptors of an owner's own: the backing file and, of a guest-sealed file, its page map. Raises OSError.

    The backing of a file sealed against writes is open for reading only.
    """
    closed_to_writes = file.seals & seals.NO_WRITES and not file.guest
    fds = [_open_anew(file.fd, os.O_RDONLY if closed_to_writes else os.O_RDWR)]
    if file.guest and file.page_map is not None:
        try:
            fds.append(_open_anew(file.page_map.fd, os.O_RDONLY))
        except OSError:
            close_all(fds)
            raise
    return tuple(fds)


def _open_anew(fd: int, flags: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
