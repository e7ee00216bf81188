"""The memory that memfs holds for a VM: registers files, asks for frames, passes notifications on (RFC patches 04-06).

`Backing` is the KVM side of guest_ops and guest_mem_ops. It never touches the mount itself: files are named by
descriptors that the VMM opened, and all else comes over the socket.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import trio

from kvmsim.arrays import stretches
from memfs.contract.frame_numbers import cut_at
from memfs.contract.on_memfs import naming
from memfs.contract.page_map import ALLOCATED, PageMapView
from memfs.contract.protocol import Client, StoreGone, socket_of
from memfs.contract.protocol import client as protocol
from memfs.contract.protocol.messages import (
    ConvertBegin,
    Fallocate,
    FileId,
    InvalidateBegin,
    InvalidateEnd,
    Notification,
    PfnReply,
    PfnRun,
    Registered,
)
from memfs.contract.protocol.peer import close_all
from memfs.contract.sys.libc import MAP_NORESERVE
from memfs.contract.units import (
    ORDER_1G,
    ORDER_4K,
    PAGE_SIZE,
    ByteOffset,
    PageIndex,
    PageRange,
    Pfn,
    order_of,
    page_ceil,
)

__all__ = ["Backing", "Counters", "GuestFile", "Notification", "StoreGone", "connect", "socket_of"]


class GuestFile:
    """A registered file: its memory, mapped, and for a guest-sealed file its page map. `path` is what errors say."""

    def __init__(self, registered: Registered, fds: tuple[int, ...], path: str = "") -> None:
        self.path: Final = path
        self.id: Final[FileId] = registered.file
        self.ino: Final = registered.ino
        self.size = registered.size  #: bytes, when it was last registered
        self.granule: Final = registered.granule  #: bytes: pages come and go in multiples of it
        #: the largest leaf that may map it: its own huge pages, or else what frame numbers, which are contiguous, allow
        self.largest_order: Final = order_of(self.granule) if self.granule > PAGE_SIZE else ORDER_1G
        self.registrations = 0  #: how many slots use it
        self.page_map: PageMapView | None = None
        self.measurement: bytes | None = None  #: of its first content, once the guest has been launched
        self._mapping: mmap.mmap | None = None
        self._reaches = PageIndex(0)  # it was at least so long when that was last looked at
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
        """Map a file that has another size by now. Arrays over the former mapping remain valid."""
        if self._mapping is None or size > len(self._mapping):
            self._mapping = self._map(size) if size else None
        self.size = size

    def freed(self, pages: PageRange) -> None:
        """Take notice that pages have gone, perhaps because the file was truncated."""
        self._reaches = min(self._reaches, pages.start)

    def reaches(self, end: PageIndex) -> bool:
        """Return whether all pages before `end` are within the file: to touch what is not would be a SIGBUS.

        The page map does not tell: fallocate(2) with FALLOC_FL_KEEP_SIZE allocates past the end. What is within the
        file now can be mapped, since before that changes an invalidation begins.
        """
        if end > self._reaches:
            self._reaches = page_ceil(ByteOffset(os.fstat(self.fd).st_size))
        return end <= self._reaches

    def _map(self, size: int) -> mmap.mmap:
        """Map the guest's memory, and keep it out of core dumps."""
        # Without MAP_NORESERVE, hugetlbfs would reserve pages of its pool for all holes.
        mapping = mmap.mmap(self.fd, size, mmap.MAP_SHARED | MAP_NORESERVE)
        mapping.madvise(mmap.MADV_DONTDUMP)
        return mapping

    @property
    def memory(self) -> mmap.mmap:
        """The file's bytes, shared with everybody who may reach them."""
        assert self._mapping is not None, "an empty file has no memory"
        return self._mapping

    def is_private(self, index: PageIndex) -> bool:
        """Return whether a page of a guest-sealed file is allocated, that is, private."""
        return self.page_map is not None and self.page_map.is_allocated(index)

    def cache(self, reply: PfnReply) -> None:
        """Cache where pages are: then all of the same gibibyte are known (memfs/contract/frame_numbers.py)."""
        for run in reply.runs:
            if run.pfn is not None:
                self._extents[run.pages.start >> ORDER_1G] = run.pfn - run.pages.start

    def pfn_of(self, index: PageIndex) -> Pfn | None:
        """Return the frame of a private page from the cache. None: not private, or not cached yet."""
        shift = self._extents.get(index >> ORDER_1G)
        can_be = shift is not None and self.is_private(index) and self.reaches(PageIndex(index + 1))
        return Pfn(index + shift) if shift is not None and can_be else None

    def known(self, pages: PageRange) -> PfnReply | None:
        """Return what the store would say of a range, if all of it is private and its frames are cached.

        How large a mapping may be the page map tells as well, so the largest order may be claimed here.
        """
        if self.page_map is None:
            return None
        is_all = self.is_private(pages.start) if len(pages) == 1 else self.page_map.count(pages) == len(pages)
        if not is_all or not self.reaches(pages.end):
            return None
        return self.allocated(pages, self.largest_order)

    def allocated(self, pages: PageRange, order: int = ORDER_4K) -> PfnReply | None:
        """Return what the store would say of a range that is known to be allocated, if its frames are cached."""
        runs = []
        parts = [pages] if pages.start >> ORDER_1G == pages.end - 1 >> ORDER_1G else cut_at(pages, ORDER_1G)
        for part in parts:
            shift = self._extents.get(part.start >> ORDER_1G)
            if shift is None:
                return None
            runs.append(PfnRun(part, Pfn(part.start + shift), order))
        return PfnReply(self.id, pages, tuple(runs))

    def pfns_of(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Do `pfn_of` for many pages, at one moment: shape (n,), int64, both; -1 for what is not private or not cached.

        Pages of one gibibyte should stand together: each stretch of them is one step.
        """
        if self.page_map is None or not len(pages):
            return np.full(len(pages), -1, np.int64)
        known = self.frames_of(pages)
        known[self.page_map.states(pages) != ALLOCATED] = -1
        if not self.reaches(PageIndex(int(pages.max()) + 1)):
            known[pages >= self._reaches] = -1
        return known

    def frames_of(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return where pages are if they are allocated: shape (n,), int64, both; -1 for what is not cached."""
        known = pages.copy()
        gibibytes = pages >> ORDER_1G
        for start, end in stretches(gibibytes):
            shift = self._extents.get(int(gibibytes[start]))
            if shift is None:
                known[start:end] = -1
            else:
                known[start:end] += shift
        return known

    def close(self) -> None:
        """Release the memory. It stays mapped for as long as there is a view of it (an array of an engine)."""
        os.close(self.fd)
        self._mapping = None
        if self.page_map is not None:
            self.page_map.close()


@dataclass(slots=True)
class Counters:
    """Numbers of notifications that came."""

    invalidate_begin: int = 0
    invalidate_end: int = 0
    fallocate: int = 0
    convert: int = 0  #: conversions that began


class Backing:
    """A connection to memfs, and the files that are registered over it. Use `connect`."""

    def __init__(self, client: Client, notify: Callable[[Notification], None]) -> None:
        self._client: Final = client
        self._notify: Final = notify
        self.files: dict[FileId, GuestFile] = {}
        self.counters = Counters()

    @property
    def gone(self) -> str | None:
        """Why the connection has ended; None while it has not."""
        return self._client.gone

    @property
    def resumed(self) -> int:
        """How often it came back to another memfs, since one was killed."""
        return self._client.resumed

    @property
    def ended(self) -> trio.Event:
        """Set when the connection has ended."""
        return self._client.ended

    def act(self, message: Notification) -> None:
        """Act on a notification. Raises OSError."""
        match message:
            case InvalidateBegin():
                self.counters.invalidate_begin += 1
            case InvalidateEnd():
                self.counters.invalidate_end += 1
                if (file := self.files.get(message.file)) is not None:
                    file.freed(message.pages)
            case Fallocate():
                self.counters.fallocate += 1
            case ConvertBegin():
                self.counters.convert += 1
        self._notify(message)

    def check_recipient(self, fd: int) -> None:
        """Raise OSError(EPERM) unless whoever listens on the socket may have a file's descriptor."""
        self._client.check_recipient(fd)

    async def register(self, fd: int) -> GuestFile:
        """Own the file behind a descriptor (memfd_register_guest). Raises OSError as `messages.Register` says."""
        registered, fds = await self._client.register(fd)
        file = self.files.get(registered.file)
        if file is None:
            try:
                path = os.readlink(f"/proc/self/fd/{fd}")
                file = self.files[registered.file] = GuestFile(registered, fds, path)
            except (OSError, ValueError):
                with trio.CancelScope(shield=True):
                    await self._client.unregister(registered.file)
                raise
        else:
            close_all(fds)
            file.resized(registered.size)
        file.registrations += 1
        return file

    async def unregister(self, file: GuestFile) -> None:
        """Undo one `register`. Nothing may be mapped from the file any more."""
        file.registrations -= 1
        if not file.registrations:
            del self.files[file.id]
            file.close()
        await self._client.unregister(file.id)

    async def launch(self, file: GuestFile) -> bytes:
        """Say that the guest begins to run: a guest-sealed file's initial content is measured. Returns 48 bytes."""
        file.measurement = await self._client.launch(file.id)
        return file.measurement

    async def get_pfn(self, file: GuestFile, pages: PageRange, *, alloc: bool) -> PfnReply:
        """Ask for the frames of pages (get_lock_pfn and put_unlock_pfn). May cover only a part, from the start on.

        The pages are not locked: the reply holds only under the protocol of mmu/invalidate.py. A lock would be one more
        message, to keep the pages from going between the answer and its use, which that protocol notices anyway. Raises
        OSError: EINVAL past the end of the file, ENOSPC.
        """
        with naming(file.path):
            reply = await self._client.get_pfn(file.id, pages, alloc=alloc, lock=False)
        file.cache(reply)
        return reply

    def close(self) -> None:
        """Release the memory of all files."""
        for file in self.files.values():
            file.close()
        self.files.clear()


@asynccontextmanager
async def connect(
    path: str, name: str, notify: Callable[[Notification], None], resumed: Callable[[], None] = lambda: None
) -> AsyncIterator[Backing]:
    """Connect to memfs's socket; `notify` is called with each notification and has acted when it returns.

    `resumed` is called when memfs was killed and the next one goes on, after the end of all that had begun.
    Raises OSError if nobody listens there, or the protocol versions do not match.
    """

    async def notified(message: Notification) -> None:
        backing.act(message)

    async def came_back() -> None:
        resumed()

    with ExitStack() as last:  # what is closed while a task still reads from it is a bad descriptor there
        async with protocol.connect(path, name, notified, came_back) as client:
            backing = Backing(client, notify)
            last.callback(backing.close)
            yield backing
