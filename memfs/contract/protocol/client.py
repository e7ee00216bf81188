"""The client: an owner's connection to memfs, for programs that are VMMs.

    async def on_notification(message: Notification) -> None:
        if isinstance(message, InvalidateBegin):
            unmap(message.file, message.pages)

    with locate(path) as file:
        fd = file.open(os.O_RDWR)
    async with connect(socket_of(fd), "vm-1", on_notification) as client:
        registered, fds = await client.register(fd)
        reply = await client.get_pfn(registered.file, pages, alloc=True)

A descriptor is sent only to those who may have it (memfs/contract/on_memfs.py): else EPERM, before it is.

RFC patch 01 calls these functions guest_mem_ops, and the notifications guest_ops. Errors are what the system calls
would say: OSError with the errno that memfs gave. When the connection has ended, everything raises StoreGone: the guest
has no memory any more.

If memfs is killed and another one goes on in its place (survive=), the client connects to that one by itself, as the
same owner: registrations, locks and frames are as they were, what is asked meanwhile waits, and what was asked and not
answered is asked again. What has begun ends then, with nothing done: for each InvalidateBegin and ConvertBegin the end
is made up, and memfs begins anew what it has still to do. `on_resumed` is awaited next. Whoever maps shared pages of a
file with a page map unmaps there those that are private by now, for their Fallocate may have been lost.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeVar

import trio

from memfs.contract import on_memfs
from memfs.contract.aio.nurseries import open_flat_nursery
from memfs.contract.aio.poller import Poller
from memfs.contract.logs import fields, working_on
from memfs.contract.protocol.call import Incoming, LateReply, PeerGone
from memfs.contract.protocol.connection import RemoteProtocolError, Role, is_answered
from memfs.contract.protocol.messages import (
    NO_TOKEN,
    SOCKET_XATTR,
    Ack,
    AllowPreserve,
    Done,
    Failed,
    Fenced,
    FileId,
    GetPfn,
    Hello,
    HelloReply,
    Launch,
    Measured,
    Message,
    Notification,
    PfnReply,
    Populate,
    PutPfn,
    Register,
    Registered,
    Request,
    Unregister,
)
from memfs.contract.protocol.peer import Peer, close_all, open_connection
from memfs.contract.sys.peer_credentials import PeerCredentials
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageRange

log = logging.getLogger(__name__)

#: Acts on a notification, which is acknowledged when it returns. It may wait; other notifications are acted upon
#: meanwhile. OSError: it could not, and the connection ends, for memfs must not believe that it did
OnNotification = Callable[[Notification], Awaitable[object]]

#: Called when the owner has come back to the memfs that follows one which was killed
OnResumed = Callable[[], Awaitable[object]]

_RETURN_TIMEOUT: Final = 60.0  #: seconds: a mount with very many files is back after some of them
_RETRY: Final = 0.02  # seconds
_TRIES: Final = 3

_Reply = TypeVar("_Reply", bound=Message)


class StoreGone(Exception):
    """The connection to memfs has ended: the guest has no memory any more."""


class Client:
    """A connection to memfs. Use `connect`."""

    def __init__(self, path: str, name: str, on_notification: OnNotification, on_resumed: OnResumed) -> None:
        self._path: Final = path
        self._name: Final = name
        self._on_notification: Final = on_notification
        self._on_resumed: Final = on_resumed
        self._peer: Peer
        self._listening_user: int
        self._token = NO_TOKEN
        self._is_closed = False
        self.resumed = 0  #: how often it came back to another memfs
        self._poller: Final = Poller.here()
        self.fenced: Fenced | None = None  #: memfs's final message, if it sent one
        self.gone: str | None = None  #: why the connection has ended; None while it has not
        self.ended: Final = trio.Event()

    def check_recipient(self, fd: int) -> None:
        """Raise OSError(EPERM) unless the process that listens on the socket may have a file's descriptor."""
        on_memfs.check_recipient(self._listening_user, fd)

    async def register(self, fd: int) -> tuple[Registered, tuple[int, ...]]:
        """Own the file behind a descriptor (memfd_register_guest).

        Returns what memfs says, and descriptors, the caller's from now on: of the backing file and, for a guest-sealed
        file, its page map. There are none if this process has no space for them. Raises OSError as
        `messages.Register` says.
        """
        self.check_recipient(fd)
        reply = await self._request(Register(), [fd], self._undo_register)
        return _expect(Registered, reply), reply.fds

    def _undo_register(self, reply: Incoming) -> None:
        """Unregister a file that was registered when nobody waited for that any more."""
        close_all(reply.fds)
        if isinstance(reply.message, Registered):
            self._post(Unregister(reply.message.file))

    async def unregister(self, file: FileId) -> None:
        """Undo one `register`. Nothing may be mapped from the file any more. Raises OSError(EBADF)."""
        _expect(Done, await self._request(Unregister(file)))

    async def get_pfn(self, file: FileId, pages: PageRange, *, alloc: bool, lock: bool = False) -> PfnReply:
        """Return which frames pages are in (get_lock_pfn); perhaps of a part only, from the start on.

        With `alloc`, absent pages are allocated first; with `lock`, pages stay until `put_pfn`. Raises OSError as
        `messages.GetPfn` says.
        """
        late = self._undo_lock if lock else None
        return _expect(PfnReply, await self._request(GetPfn(file, pages, alloc, lock), late=late))

    def _undo_lock(self, reply: Incoming) -> None:
        """Unlock pages that were locked when nobody waited for that any more."""
        if isinstance(reply.message, PfnReply):
            for run in reply.message.runs:
                if run.pfn is not None:
                    self._post(PutPfn(reply.message.file, run.pages, dirty=False))

    async def put_pfn(self, file: FileId, pages: PageRange, *, dirty: bool) -> None:
        """Unlock pages, and say whether they were written (put_unlock_pfn). Raises OSError(EINVAL)."""
        _expect(Done, await self._request(PutPfn(file, pages, dirty)))

    async def populate(self, fd: int, pages: PageRange, content: int, source: ByteOffset) -> bytes:
        """Fill pages of a guest-sealed file with what is in a memfd from byte `source` on.

        `fd` and `content` are descriptors of the file and of the memfd. Returns the measurement so far, 48 bytes.
        Raises OSError as `messages.Populate` says.
        """
        self.check_recipient(fd)
        return _expect(Measured, await self._request(Populate(pages, source), [fd, content])).measurement

    async def launch(self, file: FileId) -> bytes:
        """Say that the guest begins to run. Returns the measurement of what was populated, 48 bytes."""
        return _expect(Measured, await self._request(Launch(file))).measurement

    async def allow_preserve(self, file: FileId) -> None:
        """Let conversions of a guest-sealed file keep the content of pages. Not for a guest whose memory is encrypted.

        Raises OSError(EINVAL) if it is not guest-sealed.
        """
        _expect(Done, await self._request(AllowPreserve(file)))

    async def request(self, message: Request, fds: Sequence[int] = (), late: LateReply | None = None) -> Incoming:
        """Send any request and return what comes, which may be Failed; its descriptors are the caller's.

        When cancelled, what was asked for happens all the same; `late` then gets what comes. Raises StoreGone;
        OSError(EBADF) for a descriptor that is closed.
        """
        if self.gone is not None:
            raise StoreGone(self.gone)
        try:
            return await self._peer.call(message, fds, late)
        except PeerGone as error:
            await self.ended.wait()  # why it has gone may still be there to be read
            raise StoreGone(self.gone or f"memfs has gone: {error}") from error

    def _post(self, message: Request) -> None:
        """Send a request whose reply says nothing new."""
        with suppress(PeerGone):
            self._peer.post(message)

    async def _request(self, message: Request, fds: Sequence[int] = (), late: LateReply | None = None) -> Incoming:
        reply = await self.request(message, fds, late)
        if isinstance(reply.message, Failed):
            raise OSError(reply.message.errno, reply.message.text)
        return reply

    async def open(self) -> None:
        """Connect, and agree on the protocol version. Raises OSError(EPROTONOSUPPORT) if that cannot be."""
        for is_last in (*(False,) * _TRIES, True):
            try:
                self._peer = await self._connected_peer()
            except (PeerGone, RemoteProtocolError) as error:  # killed just now, or it does not want us
                if is_last:
                    raise OSError(errno.ECONNRESET, f"memfs did not answer: {error}") from error
            else:
                return

    async def _connected_peer(self) -> Peer:
        """Connect, and say who we are. Raises PeerGone, RemoteProtocolError, OSError.

        ESTALE: memfs does not know us any more. EPERM: somebody else listens there now, who must not get the token.
        """
        sock = await open_connection(self._path)
        peer = Peer(sock, Role.OWNER, outlived=True)
        try:
            user = PeerCredentials.of(sock).uid
            if self._token != NO_TOKEN and user != self._listening_user:
                raise OSError(errno.EPERM, f"user {user} listens on its socket")
            self._listening_user = user
            reply = await peer.exchange(Hello(name=self._name, token=self._token))
            if isinstance(reply.message, Failed):
                raise OSError(reply.message.errno, reply.message.text)
            hello = _expect(HelloReply, reply)
            if hello.page_size != PAGE_SIZE:
                raise OSError(errno.EPROTONOSUPPORT, f"memfs has pages of {hello.page_size} bytes, not {PAGE_SIZE}")
        except BaseException:
            peer.close()
            peer.end_calls()
            raise
        self._token = hello.token
        return peer

    async def serve(self) -> None:
        """Act on notifications until the connection ends and there is no memfs to come back to."""
        try:
            while True:
                try:
                    await self._peer.serve(self._act)
                    if self.gone is not None or not await self._come_back():
                        return
                except RemoteProtocolError as error:
                    self.gone = f"memfs broke the protocol: {error}"
                    return
                except PeerGone as error:
                    self.gone = self.gone or f"memfs has gone: {error}"
                    return
                except OSError as error:  # then memfs must not believe that we have unmapped anything
                    self.gone = f"memfs was left: a notification could not be acted upon: {error.strerror}"
                    return
        finally:
            self.gone = self.gone or "memfs has closed the connection"
            self._peer.end_calls()
            self.ended.set()

    async def _come_back(self) -> bool:
        """Go on with the memfs that goes on where the last one was killed. Returns whether there is one."""
        if self._token == NO_TOKEN or self._is_closed:
            return False
        log.info("memfs has gone, the next is waited for")
        try:
            with trio.fail_after(_RETURN_TIMEOUT):
                peer = await self._connected_again()
        except (OSError, trio.TooSlowError) as error:
            why = error.strerror if isinstance(error, OSError) else f"none came within {_RETURN_TIMEOUT:g} s"
            self.gone = f"memfs has gone, and there is no other to come back to: {why}"
            return False
        try:
            for message in self._peer.protocol.ends:
                await self._on_notification(message)
            await self._on_resumed()
        except BaseException:
            peer.close()
            raise
        peer.take_calls(self._peer)
        self._peer = peer
        self.resumed += 1
        log.info("back at memfs")
        return True

    async def _connected_again(self) -> Peer:
        while True:
            try:
                return await self._connected_peer()
            except (PeerGone, RemoteProtocolError):  # that one was killed as well
                await trio.sleep(_RETRY)

    async def _act(self, request: Incoming) -> None:
        message = request.message
        if isinstance(message, Fenced):
            self.fenced = message
            self.gone = f"memfs has cut us off: {message.text}"
            return
        assert isinstance(message, Notification)
        logs = log.isEnabledFor(logging.INFO)
        with working_on(message.cause):
            if logs:
                _log("notified", message)
            await self._on_notification(message)
            self._poller.expect()
            if not is_answered(message):
                return
            with suppress(PeerGone):  # why it has gone comes next, if it said so
                await self._peer.reply(request.id, Ack())
                if logs:
                    _log("acknowledged", message)

    def close(self) -> None:
        """End the connection; memfs then forgets all that was registered."""
        self._is_closed = True
        self._peer.close()


async def _nothing() -> None:
    pass


@asynccontextmanager
async def connect(
    path: str, name: str, on_notification: OnNotification, on_resumed: OnResumed = _nothing
) -> AsyncIterator[Client]:
    """Connect to the memfs that listens on a socket; the connection ends with the block.

    `name` is for logs. `on_notification` is awaited with each notification, in tasks of this event loop; those that
    are answered (`InvalidateBegin`, `Fallocate`, `ConvertBegin`) are acknowledged, and memfs goes on, when it returns.
    `on_resumed` is awaited when memfs was killed and the next one goes on; what it asked memfs would not be answered.

    While the block runs, no file operation on a file that is owned through it may be made in the thread of this event
    loop: fallocate(2) and ftruncate(2) return when notifications are acknowledged, which that thread does. Have
    `trio.to_thread.run_sync` make them; memfs would wait for `notify_timeout=` and then disconnect the owner.

    Raises OSError if nobody listens there, or the protocol versions do not match.
    """
    client = Client(path, name, on_notification, on_resumed)
    with on_memfs.naming(path):
        await client.open()
    async with open_flat_nursery() as nursery:
        nursery.start_soon(client.serve)
        try:
            yield client
        finally:
            client.close()
        nursery.cancel_scope.cancel()


def socket_of(fd: int) -> str:
    """Return the path of the socket of the memfs that a descriptor's file lies on. Blocking: not for the event loop.

    Raises OSError(EOPNOTSUPP) if it lies on something else.
    """
    on_memfs.check(fd)
    return os.fsdecode(os.getxattr(fd, SOCKET_XATTR))


def _expect(kind: type[_Reply], reply: Incoming) -> _Reply:
    """Return a reply's message, of the kind that the protocol has it be."""
    assert isinstance(reply.message, kind), f"the protocol let {reply.message} through"
    return reply.message


def _log(what: str, message: Notification) -> None:
    log.info(what, extra=fields(notification=type(message).__name__, **message.subject))
