"""The pages of a file: the one order in which they are allocated and freed, accounted for and an owner is notified.

Freeing:

    begin (the owner unmaps, acknowledges, has no page locked) -> measure -> free -> account -> end

and end comes on every path once begin was sent, also when freeing fails. Allocating: reserve -> allocate -> account ->
notify the owner; when allocating fails the kernel has freed what the call had allocated (shmem_fallocate; of a
guest-sealed file we do that, since hugetlbfs does not), and the reservation ends.

What takes long is done in chunks, in a thread, so that other requests are answered meanwhile. An operation can be
cancelled (a system call interrupted by a signal gets EINTR) between two chunks. The chunks that are done stay done and
accounted for, and the owner is notified of them, as on ext4: a caller that tries again gets further each time, and
undoing them could destroy what others have written to them since.

If a later chunk of an allocation finds no space, because others write meanwhile, those before it are undone. The file's
size changes after the last chunk, so what lay past its end nobody can have written to: the kernel does no write(2) to a
file while it waits for our fallocate, and no mapping reaches past the end. What lies before the end of an untracked
file stays, for a page that was stored to through a mapping cannot be told from one that was not. Of a guest-sealed file
on huge pages, whose pool is shared with the whole machine, all are undone, in the order of freeing.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Final, Protocol

import trio

from memfs.contract.aio.threads import Threads
from memfs.contract.page_map import ABSENT, ALLOCATED, PageMap
from memfs.contract.page_ranges import NO_PAGES, PageRanges
from memfs.contract.protocol.messages import FileId
from memfs.contract.sparse import allocated_in_each, allocated_pages, data_pages, occupied
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageIndex, PageRange, bytes_to_pages, page_ceil, page_offset
from memfs.store import chunks
from memfs.store.accounting import MAP_END, Accounting, Reservation
from memfs.store.backing import Backing
from memfs.store.backing_file import BackingFile
from memfs.store.measurement import InitialImage

log = logging.getLogger(__name__)


class Vm(Protocol):
    """An owner, as the owner of both files of a conversion. Methods as those of GuestOps."""

    async def convert_begin(self, shared: FileId, private: FileId, ranges: PageRanges, *, to_private: bool) -> None:
        """Have it unmap pages that leave one of its files for the other, map none until the end, and lock none."""

    async def convert_end(self, shared: FileId, private: FileId, done: PageRanges, *, to_private: bool) -> None:
        """Notify it that the conversion is over, and of which pages that was done."""


class GuestOps(Protocol):
    """How an owner is notified (RFC patch 01: guest_ops).

    Each method returns when the owner has acted, or has been fenced, and cannot be cancelled before.
    """

    @property
    def owner(self) -> Vm:
        """Who is notified."""

    @property
    def id(self) -> FileId:
        """The file's number, to the owner."""

    @property
    def preserves(self) -> bool:
        """Whether conversions may keep the content of pages."""

    async def invalidate_begin(self, pages: PageRange) -> None:
        """Have the owner unmap these pages, map none of them until the end, and keep none locked."""

    async def invalidate_end(self, pages: PageRange) -> None:
        """Notify the owner that the invalidation of these pages is over."""

    async def fallocate(self, pages: PageRange) -> None:
        """Notify the owner that these pages are allocated."""


class Pages:
    """The pages of one file, for as long as the caller has its inode lock. Raises OSError as the kernel would.

    `accounting` is None for an untracked file, `owner` for a file without one. The measurement of `image` shows what is
    freed; it is None for a file that has not been populated, or whose guest has been launched.
    """

    __slots__ = ("_accounting", "_backing", "_file", "_guest", "_image", "_owner")

    def __init__(
        self,
        backing: Backing,
        file: BackingFile,
        accounting: Accounting | None,
        owner: GuestOps | None,
        image: InitialImage | None,
        *,
        guest: bool,
    ) -> None:
        self._backing: Final = backing
        self._file: Final = file
        self._accounting: Final = accounting
        self._owner: Final = owner
        self._image: Final = image
        self._guest: Final = guest

    @property
    def _needs_steps(self) -> bool:
        """Whether a single call would allocate more than it is asked for."""
        return self._guest and self._backing.guest_needs_steps

    @property
    def _granule(self) -> int:
        """In what multiples of pages it gets and loses such."""
        return bytes_to_pages(self._backing.guest_granule) if self._guest else 1

    @property
    def _page_map(self) -> PageMap | None:
        return self._accounting.page_map if self._accounting is not None else None

    def runs(self, pages: PageRange) -> Iterator[tuple[PageRange, bool]]:
        """Split a range into runs of pages that are allocated (True) or absent (False), in order.

        Of an untracked file, pages that were allocated and never written count as absent (as SEEK_HOLE has it).
        """
        page_map = self._page_map
        position = pages.start
        for run in page_map.runs(pages) if page_map is not None else data_pages(self._file.fd, pages):
            if position < run.start:
                yield PageRange(position, run.start), False
            yield run, True
            position = run.end
        if position < pages.end:
            yield PageRange(position, pages.end), False

    # -- for conversions (conversion.py) ----------------------------------------------------------------------------

    @property
    def accounting(self) -> Accounting | None:
        """The account of a tracked file."""
        return self._accounting

    @property
    def fd(self) -> int:
        """The descriptor of the backing file."""
        return self._file.fd

    def fallocate_now(self, mode: int, offset: int, nbytes: int) -> None:
        """Allocate whole pages, or punch them, without accounting for that."""
        if mode == PUNCH_HOLE:
            fallocate(self._file.fd, mode, offset, nbytes)
        else:
            self._fallocate(mode, ByteOffset(offset), nbytes)

    def caller(self, mode: int) -> Callable[[int, int], None]:
        """Return a function that does what `fallocate_now` does with many ranges: offset and length, in bytes."""
        if mode == PUNCH_HOLE or not self._needs_steps:
            return functools.partial(fallocate, self._file.fd, mode)
        return functools.partial(self.fallocate_now, mode)

    async def written(self, ranges: PageRanges) -> PageRanges:
        """Return which pages of some ranges may not be zero; of an untracked file, the ranges that have any."""
        if self._page_map is not None:
            return self._page_map.select(ranges, ALLOCATED)
        if ranges.only is not None and len(ranges.only) == 1:
            content = os.pread(self._file.fd, PAGE_SIZE, ranges.only.offset)
            return ranges if content.strip(b"\0") else NO_PAGES
        counts = await self._counts(ranges)
        if not any(counts):
            return NO_PAGES
        return PageRanges.of(pages for pages, count in zip(ranges, counts, strict=True) if count)

    async def count(self, ranges: PageRanges) -> int:
        """Return how many pages of some ranges there are."""
        return self._accounting.count(ranges) if self._accounting is not None else sum(await self._counts(ranges))

    async def _counts(self, ranges: PageRanges) -> list[int]:
        if ranges.pages <= chunks.LONG_PAGES:
            return allocated_in_each(self._file.fd, ranges)
        return await Threads.here().run(functools.partial(allocated_in_each, self._file.fd, ranges))

    def borrowed(self, pages: int) -> AbstractContextManager[None]:
        """Have space for pages of an untracked file that a guest-sealed file will free after the block."""
        return self._backing.lend(pages)

    async def drain(self) -> bool:
        """Wait for files that are being freed. Returns whether there were any."""
        return await self._backing.reaper.drain()

    def measure_removal(self, ranges: PageRanges) -> None:
        """Have the measurement show that pages are about to be freed."""
        for pages in ranges if self._image is not None else ():
            self._measure_removal(pages)

    def account_freed(self, ranges: PageRanges, *, all_change: bool = False) -> None:
        """Account for pages that were freed. `all_change` as for `Accounting.enter`."""
        if self._accounting is not None:
            self._accounting.forget(ranges, all_change=all_change)
        else:
            self._backing.unreserve(0)  # what others may have now

    # -- allocating -------------------------------------------------------------------------------------------------

    def write(self, offset: ByteOffset, data: bytes | memoryview) -> int:
        """Write as much as there is space for and return its length. Raises OSError(ENOSPC) if there is none."""
        if self._accounting is None or not data:
            return os.pwrite(self._file.fd, data, offset)
        data = data[: self._accounting.space_for(offset, len(data))]
        if not data:
            raise OSError(errno.ENOSPC, "no space")
        pages = PageRange.covering(offset, len(data))
        with self._accounting.reserve(pages) as reservation:
            written = os.pwrite(self._file.fd, data, offset)
            reservation.commit(pages)
            return written

    async def allocate(self, offset: ByteOffset, length: int, *, keep_size: bool) -> None:
        """Allocate every page that [offset, offset + length) touches, and notify the owner of those.

        On ENOSPC nothing was allocated; a call that is cancelled has allocated a part, from the start on.
        """
        mode = FALLOC_FL_KEEP_SIZE if keep_size else 0
        allocated: list[PageRange] = []
        try:
            await self._allocate(offset, length, mode, allocated)
        finally:
            if self._owner is not None and allocated:
                await self._owner.fallocate(PageRange(allocated[0].start, allocated[-1].end))

    async def ensure_allocated(self, pages: PageRange) -> PageRange:
        """Allocate the absent pages of a range within the file's size, all or none. The owner is not notified.

        Returns the range, or the granules around it, which are allocated then.
        """
        pages = pages.rounded(self._granule)
        await self._allocate(pages.offset, pages.nbytes, FALLOC_FL_KEEP_SIZE, [])
        return pages

    async def _allocate(self, offset: ByteOffset, length: int, mode: int, allocated: list[PageRange]) -> None:
        """Allocate in chunks and append those to `allocated`; if there is no space, wait for files being freed."""
        try:
            await self._allocate_in_chunks(offset, length, mode, allocated)
        except OSError as error:
            if error.errno != errno.ENOSPC or not await self._backing.reaper.drain():
                raise
            await self._allocate_in_chunks(offset, length, mode, allocated)

    async def _allocate_in_chunks(self, offset: ByteOffset, length: int, mode: int, allocated: list[PageRange]) -> None:
        pages = PageRange.covering(offset, length)
        with self._reserve(pages) as reservation:
            if length <= chunks.LONG:
                await self._allocate_chunk(mode, offset, length, pages, reservation, allocated)
                return
            with self._backing.earmarked(len(pages)) as has_space:
                # Where space may run out it is one call, for the kernel frees what a single call has allocated.
                at_once = len(pages)
                if has_space or self._accounting is not None:
                    at_once = max(chunks.CHUNK, self._granule)
                end_of_file = page_ceil(ByteOffset(self._file.size))
                fresh: list[PageRange] = []  # of a file on huge pages, what was absent of the chunks that are done
                try:
                    for chunk in pages.chunks(at_once):
                        if allocated:
                            await trio.lowlevel.checkpoint_if_cancelled()
                        absent = self._absent(chunk) if self._granule > 1 else []
                        start, stop = max(offset, chunk.offset), min(offset + length, page_offset(chunk.end))
                        keep_size = FALLOC_FL_KEEP_SIZE if chunk.end < pages.end else 0
                        await self._allocate_chunk(mode | keep_size, start, stop - start, chunk, reservation, allocated)
                        fresh += absent
                except OSError:
                    with trio.CancelScope(shield=True):
                        if self._accounting is None:
                            await self._undo(allocated, end_of_file)
                        elif fresh:
                            await self._undo_huge(allocated, fresh)
                    raise
                except trio.Cancelled:  # what is done stays, so the size says how far that is
                    if allocated:
                        fallocate(self._file.fd, mode, ByteOffset(page_offset(allocated[-1].end) - 1), 1)
                    raise

    async def _undo(self, allocated: list[PageRange], end_of_file: PageIndex) -> None:
        """Free what was allocated past the end of an untracked file, and take it from the list."""
        done = tuple(allocated)
        allocated.clear()
        for chunk in done:
            if chunk.start < end_of_file:
                allocated.append(PageRange(chunk.start, min(chunk.end, end_of_file)))
            if end_of_file < chunk.end:
                rest = PageRange(max(chunk.start, end_of_file), chunk.end)
                await chunks.system_call(functools.partial(self._punch, rest.offset, rest.nbytes), rest.nbytes)

    async def _undo_huge(self, allocated: list[PageRange], fresh: list[PageRange]) -> None:
        """Free what was allocated to a guest-sealed file on huge pages: the owner may have seen it in the map."""
        allocated.clear()
        around = PageRange(fresh[0].start, fresh[-1].end)
        await self._begin(around)
        try:
            for run in fresh:
                self._punch(run.offset, run.nbytes)
                self._account_freed(run)
                await trio.lowlevel.checkpoint()
        finally:
            await self._end(around)

    def _reserve(self, pages: PageRange) -> AbstractContextManager[Reservation | None]:
        if self._accounting is not None:
            return self._accounting.reserve(pages)
        if len(pages) > self._backing.total_pages:
            raise OSError(errno.ENOSPC, f"{len(pages)} pages are more than there may be")
        return nullcontext()

    async def _allocate_chunk(
        self,
        mode: int,
        offset: ByteOffset,
        length: int,
        chunk: PageRange,
        reservation: Reservation | None,
        allocated: list[PageRange],
    ) -> None:
        """Allocate what [offset, offset + length) touches, which is `chunk`, and account for it."""
        try:
            await chunks.system_call(functools.partial(self._fallocate, mode, offset, length), length)
        except OSError:
            if self._guest:
                with trio.CancelScope(shield=True):
                    await chunks.system_call(functools.partial(self._give_back, chunk), length)
            raise
        self._account_allocated(reservation, allocated, chunk)

    def _fallocate(self, mode: int, offset: ByteOffset, length: int) -> None:
        """Allocate what [offset, offset + length) touches, and nothing besides."""
        if not self._needs_steps:
            fallocate(self._file.fd, mode, offset, length)
            return
        for start, nbytes, within in self._backing.guest_steps(offset, length):
            keep_size = FALLOC_FL_KEEP_SIZE if start + nbytes < offset + length else 0
            with within:
                fallocate(self._file.fd, mode | keep_size, start, nbytes)

    def _absent(self, pages: PageRange) -> list[PageRange]:
        assert self._page_map is not None
        return list(self._page_map.runs(pages, ABSENT))

    def _give_back(self, pages: PageRange) -> None:
        """Free what a guest-sealed file has of a range and is not accounted for."""
        with suppress(OSError):  # what is left shows as stray
            for run in self._absent(pages):
                self._punch(run.offset, run.nbytes)

    def _account_allocated(self, reservation: Reservation | None, allocated: list[PageRange], chunk: PageRange) -> None:
        allocated.append(chunk)
        if reservation is not None:
            reservation.commit(chunk)

    def make_true(self) -> None:
        """Have the file have the pages that its map shows, and no others.

        A part of the file that has as many pages as are shown is not looked at more closely: they are others only if an
        owner has added as many as were being freed. Pages that the file does not have were being freed: those for which
        there is no space now leave the map.
        """
        assert self._accounting is not None, "an untracked file has no map"
        for pages, is_shown in self._differences(PageRange(PageIndex(0), MAP_END)):
            try:
                if is_shown:
                    self._fallocate(FALLOC_FL_KEEP_SIZE, pages.offset, pages.nbytes)
                else:
                    self._punch(pages.offset, pages.nbytes)
            except OSError as error:
                log.warning("file %d, %d pages from %d on: %s", self._file.number, len(pages), pages.start, error)
                if is_shown:
                    self._accounting.enter(pages, ABSENT)

    def _differences(self, pages: PageRange) -> Iterator[tuple[PageRange, bool]]:
        """Generate what of a range the file has and the map does not show (False), and the other way round (True)."""
        page_map = self._page_map
        assert page_map is not None
        if self._granule > 1:  # the kernel does not say what it has of a range (cachestat(2))
            yield from ((run, False) for run in page_map.runs(pages, ABSENT))
            for run in page_map.runs(pages):
                for start in range(run.start, run.end, self._granule):
                    yield PageRange(PageIndex(start), PageIndex(start + self._granule)), True
            return
        shown, there = page_map.count(pages), allocated_pages(self._file.fd, pages)
        if shown == there:
            return
        if not shown or (shown == len(pages) and not there):
            yield pages, bool(shown)
            return
        middle = PageIndex((pages.start + pages.end) // 2)
        yield from self._differences(PageRange(pages.start, middle))
        yield from self._differences(PageRange(middle, pages.end))

    # -- freeing ----------------------------------------------------------------------------------------------------

    async def punch(self, offset: ByteOffset, length: int) -> None:
        """Free the whole pages in [offset, offset + length) and zero the rest. Cancelled, frees a part."""
        pages = PageRange.inside(offset, length)
        await self._free_in_order(functools.partial(self._punch, offset, length), notified=pages, freed=pages)

    def _punch(self, offset: ByteOffset, length: int) -> None:
        fallocate(self._file.fd, PUNCH_HOLE, offset, length)

    async def truncate(self, size: int, *, by_path: bool) -> None:
        """Set the size in bytes; `by_path` as truncate(2), which leaves the times alone if the size stays.

        Raises OSError(EFBIG) if the file would be larger than memfs can track.
        """
        old, first = self._file.size, page_ceil(ByteOffset(size))
        fd = self._file.fd
        truncate = functools.partial(os.truncate, f"/proc/self/fd/{fd}" if by_path else fd, size)
        if size > old and self._accounting is not None:
            self._accounting.check_size(first)
        if size > old and self._granule == 1:
            truncate()
            return
        end = page_ceil(ByteOffset(old))
        notified = PageRange(first, end) if first < end else None
        # Pages beyond the old size (FALLOC_FL_KEEP_SIZE allocates such) go as well, even if the size stays (on
        # hugetlbfs even if it grows), but no owner can have those.
        freed = PageRange(first, chunks.END) if first < chunks.END else None
        await self._free_in_order(truncate, notified=notified, freed=freed)

    async def _free_in_order(
        self, free_rest: Callable[[], None], *, notified: PageRange | None, freed: PageRange | None
    ) -> None:
        """Free pages, in the one order in which that may be done.

        The owner is `notified` of these pages, and the `freed` ones leave the page map; None is no whole page. If the
        range is long most of it is freed in chunks; `free_rest` is the system call that frees what is left, or all.
        """
        await self._begin(notified)
        try:
            await self._free(free_rest, notified, freed)
        finally:
            await self._end(notified)

    async def _begin(self, pages: PageRange | None) -> None:
        if self._owner is not None and pages is not None:
            await self._owner.invalidate_begin(pages)

    async def _free(self, free_rest: Callable[[], None], notified: PageRange | None, freed: PageRange | None) -> None:
        if notified is not None:
            self._measure_removal(notified)
        if freed is not None:
            await self.free_most(freed)
        free_rest()
        self._account_freed(freed)

    def _measure_removal(self, pages: PageRange) -> None:
        if self._image is not None and self._page_map is not None and any(self._page_map.runs(pages, ALLOCATED)):
            self._image.remove(pages)

    async def _end(self, pages: PageRange | None) -> None:
        if self._owner is not None and pages is not None:
            await self._owner.invalidate_end(pages)

    async def free_most(self, pages: PageRange) -> None:
        """Free a range that has many pages in chunks, so that one call for all of it finds little left to do.

        Of one that has few, nothing is freed: it is waited for the turn to do so.

        Where writes are accounted for, not in a thread: a write could come during a chunk, and nobody could say whether
        the pages that it allocated were freed again.
        """
        nbytes = pages.nbytes
        if nbytes > chunks.LONG:
            in_backing = self._file.pages
            nbytes = min(nbytes, in_backing * PAGE_SIZE)
        if nbytes <= chunks.LONG:
            await chunks.turn(nbytes)
            return
        in_thread = self._accounting is None or self._guest
        has_strays = self._accounting is not None and self._accounting.pages < in_backing
        parts: Iterable[PageRange]
        if has_strays and not in_thread:
            fd = self._file.fd
            parts = await Threads.here().run(lambda: list(occupied(fd, pages, chunks.LONG_PAGES)))
        else:
            page_map = None if has_strays else self._page_map
            end = page_ceil(ByteOffset(self._file.size))
            parts = chunks.to_free(pages, page_map, end, guest=self._guest, granule=self._granule)
        for part in parts:
            punch = functools.partial(self._punch, part.offset, part.nbytes)
            if in_thread:
                await chunks.system_call(punch, part.nbytes)
            else:
                await chunks.turn(min(part.nbytes, chunks.LONG))
                punch()
            self._account_freed(part)
            await trio.lowlevel.checkpoint()

    def _account_freed(self, pages: PageRange | None) -> None:
        if self._accounting is not None and pages is not None:
            self._accounting.forget(pages)
