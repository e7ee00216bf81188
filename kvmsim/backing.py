"""The connection to memfs: registers files, asks for frames, and passes notifications on (RFC patches 04 to 06).

`Store` is the KVM side of guest_ops and guest_mem_ops. It never touches the mount itself: files are named by
descriptors that the VMM opened, and all else comes over the socket.
"""

from __future__ import annotations

import errno
import itertools
import logging
import mmap
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import trio

from kvmsim.arrays import firsts
from memfs.contract.aio.poller import Poller
from memfs.contract.faults import Point, reach_at_once
from memfs.contract.frame_numbers import cut_at
from memfs.contract.logs import fields, working_on
from memfs.contract.page_map import ALLOCATED, PageMapView
from memfs.contract.protocol.connection import RemoteProtocolError, Role
from memfs.contract.protocol.messages import (
    Ack,
    Failed,
    Fallocate,
    Fenced,
    FileId,
    GetPfn,
    Hello,
    HelloReply,
    InvalidateBegin,
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
from memfs.contract.protocol.peer import Incoming, Peer, PeerGone, close_all, open_connection
from memfs.contract.units import ORDER_1G, PAGE_SIZE, PageIndex, PageRange, Pfn

log = logging.getLogger(__name__)

# After a notification we look for the next one, in seconds: less than it takes to sleep and be woken; and who converts
# much memory goes on with the next piece of it, which takes as long as so many pages take to be allocated.
_PATIENCE: Final = 300e-6
_PATIENCE_A_PAGE: Final = 1.5e-6
_MOST_PATIENCE: Final = 1200e-6

Notification = InvalidateBegin | InvalidateEnd | Fallocate

SOCKET_ATTRIBUTE: Final = "user.memfs.socket"


class StoreGone(Exception):
    """The connection to memfs has ended: the VM has no memory any more."""


class StoreFile:
    """A registered file: its memory, mapped, and for a guest-sealed file its page map."""

    def __init__(self, registered: Registered, fds: tuple[int, ...]) -> None:
        self.id: Final[FileId] = registered.file
        self.ino: Final = registered.ino
        self.size = registered.size  #: bytes, when it was last registered
        self.registrations = 0  #: how many slots use it
        self.page_map: PageMapView | None = None
        self.measurement: bytes | None = None  #: of its first content, once the guest has been launched
        self._mapping: mmap.mmap | None = None
        #: how much larger a frame's number is than its page's, by gibibyte of the file; true until it is unregistered
        self._extents: dict[int, int] = {}
        if not fds:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        #: the backing file: the same bytes as `memory`, for system calls
        self.fd: Final = fds[0]
        try:
            if self.size:
                self._mapping = self._map(self.size)
            if len(fds) > 1:
                self.page_map = PageMapView(fds[1])
        except (OSError, ValueError):
            os.close(self.fd)
            raise
        finally:
            close_all(fds[1:])

    def resized(self, size: int) -> None:
        """It has another size by now. Who still reads through the former mapping may go on to do so."""
        if size > self.size:
            self._mapping = self._map(size)
        self.size = size

    def _map(self, size: int) -> mmap.mmap:
        """The guest's memory; it is not for our core dumps."""
        mapping = mmap.mmap(self.fd, size)
        mapping.madvise(mmap.MADV_DONTDUMP)
        return mapping

    @property
    def memory(self) -> mmap.mmap:
        """The file's bytes, shared with everybody who may reach them."""
        assert self._mapping is not None, "an empty file has no memory"
        return self._mapping

    def is_private(self, index: PageIndex) -> bool:
        """Whether a page of a guest-sealed file is allocated, that is, private."""
        return self.page_map is not None and self.page_map.is_allocated(index)

    def learn(self, reply: PfnReply) -> None:
        """The store said where pages are: then all of the same gibibyte are known (memfs/contract/frame_numbers.py)."""
        for run in reply.runs:
            if run.pfn is not None:
                self._extents[run.pages.start >> ORDER_1G] = run.pfn - run.pages.start

    def pfn_of(self, index: PageIndex) -> Pfn | None:
        """The frame of a private page, without asking the store. None: not private, or not known yet."""
        shift = self._extents.get(index >> ORDER_1G)
        return Pfn(index + shift) if shift is not None and self.is_private(index) else None

    def known(self, pages: PageRange) -> PfnReply | None:
        """What the store would say of a range, if all of it is private and its frames are known.

        How large a mapping may be the page map tells as well, so any order may be claimed here.
        """
        if self.page_map is None or self.page_map.count(pages) != len(pages):
            return None
        runs = []
        for part in cut_at(pages, ORDER_1G):
            shift = self._extents.get(part.start >> ORDER_1G)
            if shift is None:
                return None
            runs.append(PfnRun(part, Pfn(part.start + shift), ORDER_1G))
        return PfnReply(self.id, pages, tuple(runs))

    def pfns_of(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """`pfn_of` for many pages, of one moment: shape (n,), int64, both; -1 for what is not private or not known.

        Pages of one gibibyte should stand together: each stretch of them is one step.
        """
        if self.page_map is None or not len(pages):
            return np.full(len(pages), -1, np.int64)
        known = pages.copy()
        gibibytes = pages >> ORDER_1G
        for start, end in itertools.pairwise([*firsts(gibibytes).tolist(), len(pages)]):
            shift = self._extents.get(int(gibibytes[start]))
            if shift is None:
                known[start:end] = -1
            else:
                known[start:end] += shift
        known[self.page_map.states(pages) != ALLOCATED] = -1
        return known

    def close(self) -> None:
        """Let go of the memory. It stays mapped for as long as somebody has a view of it (an array of an engine)."""
        os.close(self.fd)
        self._mapping = None
        if self.page_map is not None:
            self.page_map.close()


@dataclass(slots=True)
class Counters:
    """Notifications that came."""

    invalidate_begin: int = 0
    invalidate_end: int = 0
    fallocate: int = 0


class Store:
    """A connection. Use `connect`."""

    def __init__(self, peer: Peer, notify: Callable[[Notification], None]) -> None:
        self._peer: Final = peer
        self._notify: Final = notify
        self._poller: Final = Poller.here()
        self.files: dict[FileId, StoreFile] = {}
        self.counters = Counters()
        self.gone: str | None = None  #: why the connection has ended; None while it has not
        self.ended: Final = trio.Event()

    async def serve(self) -> None:
        """Act on notifications until the connection ends."""
        try:
            await self._peer.serve(self._act)
            self.gone = self.gone or "memfs has closed the connection"
        except RemoteProtocolError as error:
            self.gone = f"memfs broke the protocol: {error}"
        except PeerGone as error:
            self.gone = self.gone or f"memfs has gone: {error}"
        except OSError as error:  # then memfs must not believe that we have let go of anything
            self.gone = f"memfs was left: a notification could not be acted upon: {error.strerror}"
        finally:
            self.ended.set()

    def _act(self, request: Incoming) -> Coroutine[Any, Any, None] | None:
        match request.message:
            case Fenced() as fenced:
                self.gone = f"memfs has cut us off: {fenced.text}"
                return None
            case InvalidateBegin() as message:
                self.counters.invalidate_begin += 1
                before, after = Point.BEFORE_BEGIN, Point.AFTER_BEGIN
            case InvalidateEnd() as message:
                self.counters.invalidate_end += 1
                before, after = Point.BEFORE_END, Point.AFTER_END
            case Fallocate() as message:
                self.counters.fallocate += 1
                before, after = Point.BEFORE_TELL, Point.AFTER_TELL
            case _:
                raise AssertionError(f"the protocol let {request.message} through")
        with working_on(message.cause):
            self._log("notified", message)
            reach_at_once(before)
            self._notify(message)
            reach_at_once(after)
            self._poller.stay(min(_PATIENCE + _PATIENCE_A_PAGE * len(message.pages), _MOST_PATIENCE))
            if isinstance(message, InvalidateEnd):
                return None
            with suppress(PeerGone):  # why it has gone comes next, if it said so
                rest = self._peer.reply_now(request.id, Ack())
                self._log("acknowledged", message)
                return rest
        return None

    def _log(self, what: str, message: Notification) -> None:
        if log.isEnabledFor(logging.INFO):
            kind = type(message).__name__
            log.info(what, extra=fields(notification=kind, file=message.file, pages=message.pages))

    async def greet(self, name: str) -> None:
        """Agree on the protocol version. Raises OSError(EPROTONOSUPPORT) if that cannot be."""
        reply = await self._call(Hello(name=name))
        assert isinstance(reply.message, HelloReply)
        if reply.message.page_size != PAGE_SIZE:
            raise OSError(errno.EPROTONOSUPPORT, f"memfs has pages of {reply.message.page_size} bytes, not {PAGE_SIZE}")

    async def register(self, fd: int) -> StoreFile:
        """Own the file behind a descriptor (memfd_register_guest). Raises OSError as `messages.Register` says."""
        reply = await self._call(Register(), [fd])
        assert isinstance(reply.message, Registered)
        file = self.files.get(reply.message.file)
        if file is None:
            try:
                file = self.files[reply.message.file] = StoreFile(reply.message, reply.fds)
            except (OSError, ValueError):
                await self._call(Unregister(reply.message.file))
                raise
        else:
            close_all(reply.fds)
            file.resized(reply.message.size)
        file.registrations += 1
        return file

    async def unregister(self, file: StoreFile) -> None:
        """Undo one `register`. Nothing may be mapped from the file any more."""
        file.registrations -= 1
        if not file.registrations:
            del self.files[file.id]
            file.close()
        await self._call(Unregister(file.id))

    async def launch(self, file: StoreFile) -> bytes:
        """The guest begins to run: a guest-sealed file's first content is what it is. Returns its measurement."""
        reply = await self._call(Launch(file.id))
        assert isinstance(reply.message, Measured)
        file.measurement = reply.message.measurement
        return file.measurement

    async def get_pfn(self, file: StoreFile, pages: PageRange, *, alloc: bool) -> PfnReply:
        """Learn the frames of pages (get_lock_pfn and put_unlock_pfn). May cover only a part, from the start on.

        The pages are not locked: what is learnt holds only under the protocol of mmu/invalidate.py. A lock would be
        one more message, to keep the pages from going between the answer and its use, which that protocol notices
        anyway. Raises OSError: EINVAL past the end of the file, ENOSPC.
        """
        reply = await self._call(GetPfn(file.id, pages, alloc, lock=False))
        assert isinstance(reply.message, PfnReply)
        file.learn(reply.message)
        return reply.message

    def close(self) -> None:
        """End the connection; memfs then forgets all that was registered."""
        self._peer.close()
        for file in self.files.values():
            file.close()
        self.files.clear()

    async def _call(self, message: Message, fds: list[int] | None = None) -> Incoming:
        if self.gone is not None:
            raise StoreGone(self.gone)
        try:
            reply = await self._peer.call(message, fds or [])
        except PeerGone as error:
            await self.ended.wait()  # why it has gone may still be there to be read
            raise StoreGone(self.gone or f"memfs has gone: {error}") from error
        if isinstance(reply.message, Failed):
            words, text = os.strerror(reply.message.errno), reply.message.text
            raise OSError(reply.message.errno, words if text == words else f"{words}: {text}")
        return reply


@asynccontextmanager
async def connect(path: str, name: str, notify: Callable[[Notification], None]) -> AsyncIterator[Store]:
    """Connect to memfs's socket; `notify` is called with each notification and has acted when it returns.

    Raises OSError if nobody listens there, or the protocol versions do not match.
    """
    sock = await open_connection(path)
    failure: Exception | None = None  # leaves as it is, not in the nursery's ExceptionGroup
    with ExitStack() as last:  # what is closed while somebody still reads from it is a bad descriptor to him
        async with trio.open_nursery() as nursery:
            store = Store(Peer(sock, Role.OWNER), notify)
            last.callback(store.close)
            nursery.start_soon(store.serve)
            try:
                await store.greet(name)
                yield store
            except Exception as error:
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def socket_of(path: str) -> str:
    """The socket of the memfs that a file lies on. Blocking: not for the event loop.

    Raises OSError(ENODATA or EOPNOTSUPP) if it lies on something else.
    """
    return os.getxattr(path, SOCKET_ATTRIBUTE).decode()
