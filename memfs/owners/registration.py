"""A registration: one file and its one owner (registry.py), which is notified, and asks about pages."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Final

from memfs.contract.aio.turns import SHARE, Turns
from memfs.contract.frame_numbers import by_order, cut_at
from memfs.contract.logs import current_request
from memfs.contract.protocol.messages import Fallocate, FileId, InvalidateBegin, InvalidateEnd, PfnReply, PfnRun
from memfs.contract.units import ORDER_1G, PAGE_SIZE, ByteOffset, PageRange, order_of, page_ceil
from memfs.owners import records
from memfs.owners.frame_allocator import FileFrames, FrameAllocator
from memfs.owners.owner import Owner, Unlocked
from memfs.owners.page_locks import PageLocks
from memfs.owners.populate import launch
from memfs.state.journal import Journal, numbered
from memfs.store.file import File
from memfs.tree.inode import RegularFile
from memfs.tree.tree import Tree

_MOST_RUNS: Final = 128  # in one reply: a share of work
_MOST_LOCKED_RUNS: Final = 16  # in one reply with locks, which may have to be remembered (answers.py)
_MOST_PAGES: Final = 1 << 20  # looked at for one reply: a quarter of a share


class Registration:
    """One file and its one owner; the file's `GuestOps`."""

    __slots__ = (
        "_begun",
        "_journal",
        "_tree",
        "alive",
        "conversions",
        "count",
        "frames",
        "id",
        "inode",
        "locks",
        "owner",
        "preserves",
    )

    def __init__(
        self,
        owner: Owner,
        tree: Tree,
        inode: RegularFile,
        file_id: FileId,
        allocator: FrameAllocator,
        journal: Journal,
        extents: Mapping[int, int] | None = None,
    ) -> None:
        self.owner = owner
        self._tree: Final = tree
        self._journal: Final = journal
        self.inode: Final = inode
        self.id: Final = file_id
        self.frames: Final = FileFrames(allocator, extents, _noting(journal, records.EXTENT, file_id))
        self.count = 1  #: how often it was registered
        self.alive = True
        self.locks: Final = PageLocks(_noting(journal, records.LOCKS, file_id))
        self.preserves = False  #: whether conversions may keep the content of pages
        self.conversions = 0  #: how many have taken pages away
        self._begun = False  # the owner has been notified of a beginning, and not yet of its end

    @property
    def file(self) -> File:
        """The file of the inode."""
        return self.inode.file

    def changed(self) -> None:
        """Note that what is written of it has changed."""
        self._journal.changed(records.REGISTRATION, self.id)

    def keys(self) -> Iterator[bytes]:
        """Generate the keys of what is written besides itself: its frames and its locks."""
        for gibibyte in self.frames.extents:
            yield numbered(records.EXTENT, self.id, records.part(gibibyte))
        for edge in self.locks.edges:
            yield numbered(records.LOCKS, self.id, records.part(edge))

    # -- guest_ops: the file notifies the owner ---------------------------------------------------------------------

    async def invalidate_begin(self, pages: PageRange) -> None:
        """Have the owner unmap pages and unlock them."""
        if self.alive:
            self._begun = True  # or it is fenced
            message = InvalidateBegin(self.id, pages, current_request())
            await self.owner.tell(message, self.inode.ino, Unlocked(self.locks, (pages,)))

    async def invalidate_end(self, pages: PageRange) -> None:
        """Tell the owner that the invalidation that began is over."""
        if self._begun:
            self._begun = False
            await self.owner.tell(InvalidateEnd(self.id, pages, current_request()), self.inode.ino)

    async def fallocate(self, pages: PageRange) -> None:
        """Tell the owner that pages are allocated."""
        if self.alive:
            await self.owner.tell(Fallocate(self.id, pages, current_request()), self.inode.ino)

    # -- guest_mem_ops: the owner asks about pages ------------------------------------------------------------------

    async def get_pfn(self, pages: PageRange, *, alloc: bool, lock: bool = True, again: bool = False) -> PfnReply:
        """Return which frames the pages that exist (with `alloc`, all) are in, and `lock` them.

        Covers as many pages from the start on as a turn of the event loop allows. Nothing is allocated if a conversion
        came in between: the owner asked before it knew, and what has just become private would be paid for twice. The
        same goes for what was asked of a predecessor, and is asked `again`.
        Raises OSError: EINVAL past the end of the file, ENOSPC, ENOLCK if too much is locked already, EBADF if the
        registration ended meanwhile.
        """
        asked, turns, conversions = pages, Turns.here(), self.conversions
        pages = next(asked.chunks(_MOST_PAGES))
        with self._tree.holding(self.inode):  # the registration may end meanwhile
            async with self.file.locked():
                await turns.take(self.owner.user)  # many may have waited for the lock
                if not self.alive:
                    raise OSError(errno.EBADF, "unregistered")
                if asked.end > page_ceil(ByteOffset(self.file.size)):
                    raise OSError(errno.EINVAL, "past the end of the file")
                if lock and self.locks.headroom < _MOST_RUNS:
                    raise OSError(errno.ENOLCK, "pages are locked in too many ranges")
                if self.file.guest:
                    launch(self.file)
                alloc = alloc and self.conversions == conversions and not again
                if alloc:
                    await self.file.ensure_allocated(pages)
                reply = self._reply(pages, alloc, lock)
        turns.spend(self.owner.user, len(reply.runs) * SHARE // _MOST_RUNS)
        return reply

    def _reply(self, pages: PageRange, alloc: bool, lock: bool) -> PfnReply:
        runs = self._runs(pages, alloc, _MOST_LOCKED_RUNS if lock else _MOST_RUNS)
        if lock:
            self.locks.lock(*(run.pages for run in runs if run.pfn is not None))
        return PfnReply(self.id, PageRange(pages.start, runs[-1].pages.end), tuple(runs))

    def _runs(self, pages: PageRange, alloc: bool, most: int) -> list[PfnRun]:
        return list(islice(self._all_runs(pages, alloc), most))

    def _all_runs(self, asked: PageRange, alloc: bool) -> Iterator[PfnRun]:
        for run, is_present in [(asked, True)] if alloc else self.file.allocation_runs(asked):
            if is_present:
                for part, order in self._by_order(run, asked):
                    yield PfnRun(part, self.frames.pfn(part.start), order)
            else:
                yield PfnRun(run, None)

    def _by_order(self, run: PageRange, asked: PageRange) -> Iterator[tuple[PageRange, int]]:
        """Cut a run of allocated pages into parts of one extent and one order."""
        if self.file.granule > PAGE_SIZE:  # what there is of it are whole huge pages
            order = order_of(self.file.granule)
            return ((part, order) for part in cut_at(run, ORDER_1G))
        return by_order(run, functools.partial(self._is_whole, run, asked))

    def _is_whole(self, run: PageRange, asked: PageRange, block: PageRange) -> bool:
        """Return whether all of a block is allocated, as `run` is, with absent pages around it within `asked`.

        Of a file without a page map nothing else is known.
        """
        if block.start < run.start != asked.start or block.end > run.end != asked.end:
            return False
        if run.start <= block.start and block.end <= run.end:
            return True
        page_map = self.file.page_map
        return page_map is not None and page_map.count(block) == len(block)

    def put_pfn(self, pages: PageRange) -> None:
        """Unlock pages. Raises OSError(EINVAL), changing nothing, if any of them is not locked."""
        self.locks.unlock(pages)

    def allow_preserve(self) -> None:
        """Let conversions keep the content of pages. Raises OSError(EINVAL) if the file is not guest-sealed."""
        if not self.file.guest:
            raise OSError(errno.EINVAL, "not guest-sealed")
        self.preserves = True
        self.changed()

    def describe(self) -> dict[str, Any]:
        """Return what people want to know of it, or wanted to if it has ended."""
        return {
            "file": self.id,
            "ino": self.inode.ino,
            "size": self.file.size if self.alive else 0,
            "pages": self.file.pages if self.alive else 0,
            "guest": self.file.guest,
            "locked": len(self.locks),
        }

    def end(self) -> None:
        """Release what the registration holds."""
        self._journal.drop(iter(list(self.keys())))
        self.changed()
        self.alive = False
        self.locks.clear()
        self.frames.close()


def _noting(journal: Journal, kind: bytes, file_id: FileId) -> Callable[[int], None]:
    """Return what notes that a part of a registration has changed, without referring to it: that would be a cycle."""
    return lambda number: journal.changed(kind, file_id, records.part(number))
