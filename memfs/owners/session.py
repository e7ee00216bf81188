"""A session: one connection to memfs's socket, that is, one owner, and the answers to its requests.

A file is named by an open descriptor of it, as KVM takes an fd, so who may own a file is who may open it for writing.
What the descriptor is, fdinfo says: flags and inode number; and statx(2) the device number, by which it is known to be
a file of this mount. Nothing may ask the filesystem behind it: that is ourselves, and we would wait for us for ever.
The descriptor alone is asked: where its owner is does not matter, nor through which mount it was opened. Rejected: to
look up its mount id in /proc/PID/mountinfo (an owner in another pid namespace has no PID here, and one that went into a
container after it opened its files is not where they are mounted).

A descriptor that a stranger sent may lead to a filesystem that answers nothing, and one of our own files has the kernel
ask us before close(2) returns, so another process has them (closer.py). What an owner gets is opened anew for it: a
description shared with us would let it set O_APPEND on ours.

Requests are acted upon in order, and one that has to wait (for a file, or for a descriptor to be looked at) holds up
none behind it: an Ack or a PutPfn there may be what others wait for.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
from typing import Final

import trio

from memfs.contract.aio.threads import working_for
from memfs.contract.aio.turns import Turns
from memfs.contract.protocol.call import Call, Incoming, PeerGone
from memfs.contract.protocol.connection import REPEATED, LocalProtocolError, RemoteProtocolError, RequestId, Role
from memfs.contract.protocol.messages import (
    NO_TOKEN,
    VERSION,
    AllowPreserve,
    Done,
    Failed,
    Fenced,
    GetPfn,
    Hello,
    HelloReply,
    Launch,
    Measured,
    Message,
    Notification,
    Populate,
    PutPfn,
    Register,
    Registered,
    Unregister,
)
from memfs.contract.protocol.peer import Peer, close_all
from memfs.contract.units import PAGE_SIZE
from memfs.owners.admission import Client
from memfs.owners.answers import must_not_be_repeated
from memfs.owners.closer import Closer
from memfs.owners.liveness import is_dying, is_stopped
from memfs.owners.owner import UNITS_TO_END, Owner
from memfs.owners.populate import launch, populate
from memfs.owners.registration import Registration
from memfs.owners.registry import Registry
from memfs.owners.sent import Sent
from memfs.store import seals
from memfs.store.file import File
from memfs.tree import inode_flags
from memfs.tree.inode import RegularFile
from memfs.tree.tree import Tree

log = logging.getLogger(__name__)

_FINAL_TIMEOUT: Final = 0.1  # seconds for which we try to send the final message


class Session(Owner):
    """An owner's connection. `device` is the mount's device number as "major:minor"."""

    def __init__(
        self, sock: socket.socket, client: Client, closer: Closer, registry: Registry, tree: Tree, device: str
    ) -> None:
        self._client: Final = client
        self._sent: Final = Sent(client, closer)
        self._peer: Final = Peer(sock, Role.STORE, self._sent)
        self.pid: Final = client.credentials.pid
        self._tree: Final = tree
        self._device: Final = device
        super().__init__(registry)
        self.user = client.credentials.uid

    async def run(self) -> None:
        """Serve the connection until it ends."""
        try:
            await self._peer.serve(self._handle)
        except RemoteProtocolError as error:
            log.warning("%s broke the protocol and is cut off: %s", self, error)
        except PeerGone as error:
            log.error("%s is cut off: %s", self, error)  # noqa: TRY400
        except Exception:
            log.exception("%s is cut off: a bug in memfs", self)
        finally:
            with trio.CancelScope(shield=True):  # all connections of a user may end in one moment
                await Turns.here().take(self.user, UNITS_TO_END)
            self._peer.close()
            self._registry.end(self)
            self._client.disconnected()

    # -- what the registry asks of an owner -------------------------------------------------------------------------

    def notify(self, message: Notification) -> Call:
        """Send a notification, without waiting. Raises PeerGone."""
        return self._peer.post(message)

    async def cut_off(self, reason: str) -> None:
        """Say why, if that can be sent soon, and end the connection."""
        await self.send_final(errno.ETIMEDOUT, reason)
        self._peer.close()

    def has_thread(self, number: int) -> bool:
        """Return whether a thread is one of the process that connected."""
        return os.path.exists(f"/proc/{self.pid}/task/{number}")

    def is_stopped(self) -> bool:
        """Return whether the process that connected is stopped."""
        return is_stopped(self.pid)

    def is_dead(self) -> bool:
        """Return whether the process that connected is gone."""
        return is_dying(self.pid)

    # -- what the server does with it -------------------------------------------------------------------------------

    def end_if_dead(self) -> None:
        """End it if its process cannot answer any more."""
        if self.is_dead():
            self._registry.end(self)
            self._peer.close()

    async def send_final(self, number: int, reason: str) -> None:
        """Send the final message: an errno and why it is over. Gives up soon."""
        scope = trio.CancelScope(shield=True, deadline=trio.current_time() + _FINAL_TIMEOUT)
        with scope, contextlib.suppress(PeerGone, LocalProtocolError):  # the latter if it has not said Hello
            await self._peer.tell(Fenced(number, reason))

    # -- requests ---------------------------------------------------------------------------------------------------

    async def _handle(self, request: Incoming) -> None:
        """Act on a request and answer it."""
        if self._client.is_clogged:
            self._sent.discard(request.fds)
            raise PeerGone("too many descriptors of its user are being closed")
        reply: Message
        fds: tuple[int, ...] = ()
        try:
            try:
                with self._client.request(), working_for(lambda: self.user):
                    reply, fds = await self._act_once(request)
            except OSError as error:
                reply = Failed(error.errno or errno.EIO, str(error.strerror))
            finally:
                self._tree.commit()
                await self._sent.close_all(request.fds)
            with contextlib.suppress(PeerGone):
                await self._peer.reply(request.id, reply, fds)
        finally:
            close_all(fds)

    async def _act_once(self, request: Incoming) -> tuple[Message, tuple[int, ...]]:
        """Act on a request, or answer it as a predecessor has that had acted on it and was killed."""
        number, answers = RequestId(request.id & ~REPEATED), self.last_answers
        if request.id & REPEATED and answers is not None and (answer := answers.of(number)) is not None:
            return answer, self._descriptors_for(answer)
        reply, fds = await self._act(request)
        if self.last_answers is not None and must_not_be_repeated(request.message):
            self.last_answers.add(number, reply)  # in the step in which it was done
        return reply, fds

    def _descriptors_for(self, answer: Message) -> tuple[int, ...]:
        """Return the descriptors that travel with an answer. Raises OSError."""
        if not isinstance(answer, Registered):
            return ()
        return _for_owner(self.registration(answer.file).file)

    async def _act(self, request: Incoming) -> tuple[Message, tuple[int, ...]]:
        message = request.message
        match message:
            case Hello():
                _check_version(message)
                self.name = message.name
                if message.token == NO_TOKEN:
                    self._registry.coming_back.greet(self)
                else:
                    self._registry.coming_back.resume(self, message.token)
                self._client.greeted()
                return HelloReply(VERSION, PAGE_SIZE, self.token), ()
            case Register():
                return await self._register(request)
            case Unregister(file):
                self._registry.unregister(self, file)
            case GetPfn(file, pages, alloc, lock):
                again = bool(request.id & REPEATED)
                return await self.registration(file).get_pfn(pages, alloc=alloc, lock=lock, again=again), ()
            case PutPfn(file, pages):
                self.registration(file).put_pfn(pages)
            case Populate():
                return await self._populate(message, request.fds), ()
            case Launch(file):
                return await self._launch(self.registration(file)), ()
            case AllowPreserve(file):
                self.registration(file).allow_preserve()
            case _:
                raise AssertionError(f"the protocol let {message} through")
        return Done(), ()

    async def _register(self, request: Incoming) -> tuple[Message, tuple[int, ...]]:
        if not request.fds:
            raise OSError(errno.EMFILE, "memfs has no descriptor left for the file's")
        inode = await self._identify(request.fds[0])
        with self._tree.holding(inode):
            async with inode.file.locked():  # the file is not in the middle of becoming something else
                await self._registry.evict_dead(inode, self)
                fds = _for_owner(inode.file)
                try:
                    registration = self._registry.register(self, inode)
                except OSError:
                    close_all(fds)
                    raise
                file = inode.file
                return Registered(registration.id, inode.ino, file.size, file.seals, file.granule), fds

    async def _populate(self, message: Populate, fds: tuple[int, ...]) -> Message:
        if len(fds) < 2:
            raise OSError(errno.EMFILE, "memfs has no descriptors left for the file's and the content's")
        inode = await self._identify(fds[0])
        with self._tree.holding(inode):
            source = self._sent.fetch(fds[1])
            try:
                return Measured(await populate(inode.file, message.pages, source, message.source))
            finally:
                os.close(source)

    async def _launch(self, registration: Registration) -> Message:
        with self._tree.holding(registration.inode):
            async with registration.file.locked():
                return Measured(launch(registration.file))

    async def _identify(self, fd: int) -> RegularFile:
        """Return the file that a descriptor is of. Raises OSError as `messages.Register` says."""
        info = await self._sent.look(fd)
        if info["device"] != self._device:
            raise OSError(errno.EINVAL, "not a file of this mount")
        flags = int(info["flags"], 8)
        if flags & os.O_PATH:
            raise OSError(errno.EBADF, "an O_PATH descriptor")
        inode = self._tree.inode(int(info["ino"]))
        if not stat.S_ISREG(inode.mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if flags & os.O_ACCMODE != os.O_RDWR:  # an owner reads and writes, so it must be allowed to do both
            raise OSError(errno.EACCES, "not open for reading and writing")
        inode_flags.check_own(inode)
        return self._tree.regular(inode.ino)


def _check_version(hello: Hello) -> None:
    """Raise OSError(EPROTONOSUPPORT) unless an owner speaks our version of the protocol."""
    if not hello.min_version <= VERSION <= hello.max_version:
        low, high = hello.min_version, hello.max_version
        theirs = f"version {low}" if low == high else f"versions {low} to {high}"
        older = "the owner's program" if high < VERSION else "memfs"
        raise OSError(
            errno.EPROTONOSUPPORT,
            f"memfs speaks version {VERSION} of the protocol, and this owner {theirs}; update {older}",
        )


def _for_owner(file: File) -> tuple[int, ...]:
    """Open descriptors of an owner's own: the backing file and, of a guest-sealed file, its page map. Raises OSError.

    The backing of a file sealed against writes is open for reading only.
    """
    closed_to_writes = file.seals & seals.NO_WRITES and not file.guest
    flags = os.O_RDONLY if closed_to_writes else os.O_RDWR
    fds = [os.open(f"/proc/self/fd/{file.fd}", flags | os.O_CLOEXEC)]
    if file.guest:
        try:
            fds.append(file.open_page_map())
        except OSError:
            close_all(fds)
            raise
    return tuple(fds)
