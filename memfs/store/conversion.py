"""Conversion: pages of two files change sides, in one operation under both files' locks.

    check -> reserve -> begin (the owner unmaps, acknowledges, has no page locked)
          -> in chunks: allocate on one side -> account -> free on the other -> account
          -> end

Begin and end are one message each, for both files and all ranges, and come in pairs on every path. Locks are taken in
the order of the files' numbers, whichever way pages go, so two calls never wait for each other.

A page's content on the side that it leaves goes only when the other side has the page. A chunk (256 MiB) is converted
whole or not at all; a signal or an error ends a call between two of them, and who asks again gets the rest. Only if the
kernel frees a part of a chunk and then fails, that part is converted, and the rest goes back: no page is on both sides.

What is on the wanted side already costs nothing and is left alone, and what is left is looked for before all that it
takes to convert it. So whoever asks again, since memfs was killed before it could answer, hears that it is done, even
if the owner that had to allow it has gone meanwhile.

The limit counts what is there after the call. So what is about to be freed counts as free: in the account, where a file
is tracked, and by moving the border between the two tmpfs of TmpfsBacking, where it is not. There the kernel lets other
processes allocate at any moment, and one that takes what has just been freed, in the microseconds before the border is
where it should be, has the two together exceed the limit by that until something else is freed. Rejected: to free first
and allocate then, which in the same microseconds would lose pages on both sides.

A daemon that is killed in the middle leaves a page on both sides, and whoever asks again is told that it is where it
should be. So before a chunk is accounted for on the side that it comes to, it is written down what has to go from the
other one, and a successor sees to that (`settle`).

Pages arrive zeroed. With `preserve` they are copied, and the host sees what was private: only the owner can know that
the guest's memory is not encrypted, so it must have said so, and before the guest is launched nothing is copied into
private memory that is not measured (measurement.py).
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import struct
from collections.abc import Callable
from typing import Final

import trio

from memfs.contract.aio.threads import Threads, current_user
from memfs.contract.aio.turns import Turns
from memfs.contract.page_map import ABSENT, ALLOCATED
from memfs.contract.page_ranges import NO_PAGES, PageRanges
from memfs.contract.protocol.messages import NO_FILE
from memfs.contract.sparse import data_extents
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, PUNCH_HOLE
from memfs.contract.units import PAGE_SHIFT, PAGE_SIZE, ByteOffset, PageIndex, bytes_to_pages, page_ceil, page_offset
from memfs.state.journal import INTENT, Committed, Journal, number_in, numbered
from memfs.store import chunks, seals
from memfs.store.accounting import Reservation
from memfs.store.file import File
from memfs.store.pages import Pages, Vm
from memfs.store.seals import Operation

log = logging.getLogger(__name__)

_INTENT: Final = struct.Struct("=Q?7x")  # the file that pages come to, whether that is the private one; then the runs
_CALLS: Final = 10  # system calls on a page each that count as a unit of work
_LOOKED_AT: Final = 40  # ranges of a call, to look at which counts as a unit of work
_BATCH: Final = 4  # units of work between looks at whose turn it is
_COPIED_AT_ONCE: Final = 1 << 20  # bytes


async def convert(shared: File, private: File, ranges: PageRanges, *, to_private: bool, preserve: bool = False) -> None:
    """Convert pages. Raises OSError as `memfs.contract.conversion.convert` says."""
    if shared is private or shared.guest or not private.guest:
        raise OSError(errno.EINVAL, "not an ordinary file and a guest-sealed one")
    if len(ranges) >= _LOOKED_AT:
        await Turns.here().take(current_user(), len(ranges) // _LOOKED_AT)
    first, second = (shared, private) if shared.number < private.number else (private, shared)
    async with first.locked(), second.locked():
        _check_ranges(shared, private, ranges)
        page_map = private.page_map
        assert page_map is not None, "a guest-sealed file without a page map"
        left, changing = page_map.with_any(ranges, ABSENT if to_private else ALLOCATED)
        if changing:
            vm = _check(shared, private, to_private=to_private, preserve=preserve)
            with private.converting():
                await _Conversion(shared, private, vm, to_private=to_private, preserve=preserve).run(left, changing)


def _check_ranges(shared: File, private: File, ranges: PageRanges) -> None:
    if ranges.end > page_ceil(ByteOffset(min(shared.size, private.size))):
        raise OSError(errno.EINVAL, "past the end of a file")
    granule = private.granule
    if granule > PAGE_SIZE and (ranges.array % bytes_to_pages(granule)).any():
        raise OSError(errno.EINVAL, f"not a multiple of {granule} bytes")


def _check(shared: File, private: File, *, to_private: bool, preserve: bool) -> Vm | None:
    """Return who owns the files. Raises OSError if pages may not change sides."""
    seals.check((shared if to_private else private).seals, Operation.PUNCH)
    if not to_private:  # what is there of the shared file is zeroed
        seals.check(shared.seals & ~seals.F_SEAL_GUEST, Operation.WRITE)
    vm = _vm(shared, private)
    if preserve:
        _check_preserve(private, to_private=to_private)
    return vm


def _check_preserve(private: File, *, to_private: bool) -> None:
    """Raise OSError if content may not be kept."""
    if to_private and private.granule > PAGE_SIZE:
        raise OSError(errno.EOPNOTSUPP, "hugetlbfs has no write(2)")
    if not (private.owner is not None and private.owner.preserves):
        raise OSError(errno.EPERM, "the private file has no owner that lets content be preserved")
    if to_private and not private.initial_image().launched:
        raise OSError(errno.EBUSY, "the guest has not been launched")


def _vm(shared: File, private: File) -> Vm | None:
    """Return who owns the files. Raises OSError(EPERM) if two do."""
    of_shared, of_private = shared.owner, private.owner
    if of_shared is None or of_private is None:
        owner = of_shared or of_private
        return owner.owner if owner is not None else None
    if of_shared.owner is not of_private.owner:
        raise OSError(errno.EPERM, "the files have different owners")
    return of_private.owner


class _Conversion:
    """One call, once both files are locked and it may be done."""

    def __init__(self, shared: File, private: File, vm: Vm | None, *, to_private: bool, preserve: bool) -> None:
        self._to_private: Final = to_private
        self._preserve: Final = preserve
        in_shared, in_private = shared.operations(), private.operations()
        self._from, self._to = (in_shared, in_private) if to_private else (in_private, in_shared)
        assert in_private.accounting is not None, "a guest-sealed file without a page map"
        self._private: Final = in_private.accounting
        self._vm: Final = vm
        of_shared, of_private = shared.owner, private.owner
        self._shared_id: Final = of_shared.id if of_shared is not None else NO_FILE
        self._private_id: Final = of_private.id if of_private is not None else NO_FILE
        self._guest: Final = private
        self._given = 0  # pages that the private file was promised of those that the shared one gives
        self._journal: Final = shared.journal
        self._leaving, self._coming = (shared, private) if to_private else (private, shared)
        self._done = PageIndex(0)  # all that was asked for before it is on the wanted side

    async def run(self, asked: PageRanges, changing: int) -> None:
        """Convert ranges, each of which has pages that are not on the wanted side yet: `changing` pages in all."""
        reservation = await self._reserve(asked, changing) if self._to_private else None
        try:
            await self._begin(asked)
            try:
                if changing <= chunks.CHUNK and changing == asked.pages:
                    await self._convert(asked, reservation)
                    self._done = asked.end
                else:
                    await self._convert_in_chunks(asked, reservation)
            finally:
                await self._end(asked.before(self._done))
        finally:
            if reservation is not None:
                reservation.end()

    async def _convert_in_chunks(self, asked: PageRanges, reservation: Reservation | None) -> None:
        for chunk in asked.chunks(max(chunks.CHUNK, bytes_to_pages(self._guest.granule))):
            if self._done:
                await trio.lowlevel.checkpoint_if_cancelled()
                await self._turn()
            runs = self._private.page_map.select(chunk, ABSENT if self._to_private else ALLOCATED)
            if len(runs):
                await self._convert(runs, reservation)
            self._done = chunk.end

    async def _reserve(self, asked: PageRanges, pages: int) -> Reservation:
        """Reserve space in the private file for so many pages, but for what the shared one gives.

        Raises OSError(ENOSPC).
        """
        try:
            return self._private.reserve_absent(pages)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        self._given = await self._gives(asked)
        try:
            return self._private.reserve_absent(pages, self._given)
        except OSError as error:
            if error.errno != errno.ENOSPC or not await self._to.drain():
                raise
        return self._private.reserve_absent(pages, self._given)

    async def _gives(self, asked: PageRanges) -> int:
        """Return how many pages the shared file has of those that will leave it."""
        given = 0
        for chunk in asked.chunks(chunks.CHUNK):
            await self._turn()
            given += await self._from.count(self._private.page_map.select(chunk, ABSENT))
        return given

    async def _turn(self) -> None:
        """Wait for the caller's turn to look at a chunk, of which there may be very many, and to make a few calls."""
        await Turns.here().take(current_user(), _BATCH)

    async def _begin(self, asked: PageRanges) -> None:
        if self._vm is not None:
            await self._vm.convert_begin(self._shared_id, self._private_id, asked, to_private=self._to_private)

    async def _end(self, done: PageRanges) -> None:
        if self._vm is not None:
            await self._vm.convert_end(self._shared_id, self._private_id, done, to_private=self._to_private)

    async def _convert(self, runs: PageRanges, reservation: Reservation | None) -> None:
        """Convert runs of pages that are all on the side that they leave.

        If that fails, each run is on one side: on the wanted one if it was freed on the other before.
        """
        before = await self._to.written(runs) if not self._to_private else NO_PAGES
        try:
            await self._allocate(runs, before, reservation)
            if len(runs) > _BATCH * _CALLS or runs.pages > chunks.SHORT_PAGES:  # it may have to wait
                with trio.CancelScope(shield=True):
                    await self._free(runs)
            else:
                await self._free(runs)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._undo(runs.without(runs.before(self._done)).without(before))
            raise
        finally:
            self._intend(None)

    # -- the side that pages come to --------------------------------------------------------------------------------

    async def _allocate(self, runs: PageRanges, before: PageRanges, reservation: Reservation | None) -> None:
        """Allocate pages and account for them. Those that were there `before` are zeroed."""
        if self._to.accounting is not None and reservation is None:
            with self._to.accounting.reserve_absent(runs.pages - before.pages, given=runs.pages) as reservation:
                await self._fill(runs, before)
                self._intend(runs)
                self._account_allocated(runs, reservation)
            return
        try:
            await self._fill(runs, before)
        except OSError as error:
            if error.errno != errno.ENOSPC or reservation is not None:
                raise
            with self._to.borrowed(runs.pages):
                await self._fill(runs, before)
        self._intend(runs)
        self._account_allocated(runs, reservation)

    async def _fill(self, runs: PageRanges, before: PageRanges) -> None:
        await self._call(runs, self._to, FALLOC_FL_KEEP_SIZE)
        if len(before):
            await Threads.here().run(functools.partial(_zero, self._to.fd, before))
        if self._preserve:
            await Threads.here().run(functools.partial(_copy, self._from.fd, self._to.fd, runs))

    def _intend(self, runs: PageRanges | None) -> None:
        """Write down that pages are to go from the side that they leave, as far as they have come to the other one.

        None: they have gone.
        """
        if not self._journal.is_kept:
            return
        intent = numbered(INTENT, self._leaving.number)
        if runs is None:
            self._journal.note(intent, None)
        else:
            self._journal.note(intent, _INTENT.pack(self._coming.number, self._to_private) + runs.pack())
            self._journal.commit()

    def _account_allocated(self, runs: PageRanges, reservation: Reservation | None) -> None:
        if reservation is not None:
            reservation.commit(runs, all_change=self._to_private)

    async def _undo(self, runs: PageRanges) -> None:
        """Free pages that have been allocated, or were about to be."""
        await self._call(runs, self._to, PUNCH_HOLE)
        self._to.account_freed(runs)

    # -- the side that they leave -----------------------------------------------------------------------------------

    async def _free(self, runs: PageRanges) -> None:
        """Free pages, and account for that."""
        self._from.measure_removal(runs)
        try:
            await self._call(runs, self._from, PUNCH_HOLE, is_done=True)
        finally:
            self._account_freed(runs.before(self._done))

    def _account_freed(self, runs: PageRanges) -> None:
        if self._from.accounting is not None or self._given:  # else it makes no difference to anybody
            self._from.account_freed(runs, all_change=not self._to_private)

    async def _call(self, runs: PageRanges, pages: Pages, mode: int, *, is_done: bool = False) -> None:
        """Call fallocate(2) for each run: what is long in a thread, what is many in turns with what others want.

        `is_done`: then what was asked for before the end of the run is on the wanted side.
        """
        only = runs.only
        if only is not None and only.end - only.start <= chunks.SHORT_PAGES:
            pages.fallocate_now(mode, only.start << PAGE_SHIFT, (only.end - only.start) << PAGE_SHIFT)
            if is_done:
                self._done = only.end
            return
        starts, ends = runs.array.T << PAGE_SHIFT
        call, number, at_once = pages.caller(mode), 0, _BATCH * _CALLS
        try:
            for offset, nbytes in zip(starts.tolist(), (ends - starts).tolist(), strict=True):
                if number and number % at_once == 0:
                    await Turns.here().take(current_user(), _BATCH)
                if nbytes <= chunks.SHORT:
                    call(offset, nbytes)
                else:
                    await chunks.system_call(functools.partial(call, offset, nbytes), nbytes)
                number += 1
        finally:
            if is_done and number:
                self._done = PageIndex(int(runs.array[number - 1, 1]))


def settle(state: Committed, files: Callable[[int], File | None], journal: Journal) -> None:
    """End the conversions in the middle of which a predecessor was killed: free what has come to the other side.

    `files` finds a file by its number.
    """
    for key, value in state.items_of(INTENT):
        journal.note(key, None)
        other, to_private = _INTENT.unpack_from(value)
        leaving, coming = files(number_in(key)), files(other)
        if leaving is None or coming is None:
            continue
        runs = PageRanges.unpack(value[_INTENT.size :])
        try:
            _leave(leaving, runs, coming if to_private else leaving)
        except OSError as error:  # no memory or no descriptor
            log.warning("files %d and %d have pages on both sides: %s", leaving.number, coming.number, error)


def _leave(leaving: File, runs: PageRanges, guest: File) -> None:
    """Free the pages of a file that the page map of `guest` shows. Raises OSError."""
    with leaving.held(), guest.held():
        private = guest.page_map
        assert private is not None, "a guest-sealed file without a page map"
        there, pages = private.select(runs, ALLOCATED), leaving.operations()
        for run in there:
            pages.fallocate_now(PUNCH_HOLE, run.offset, run.nbytes)
        pages.account_freed(there)


def _zero(fd: int, runs: PageRanges) -> None:
    """Zero what has been written to pages of a file. Blocks for long."""
    zeros = bytes(_COPIED_AT_ONCE)
    for run in runs:
        for start, end in data_extents(fd, run.offset, page_offset(run.end)):
            for at in range(start, end, _COPIED_AT_ONCE):
                os.pwrite(fd, zeros[: end - at], at)


def _copy(source: int, target: int, runs: PageRanges) -> None:
    """Copy what has been written to pages of a file into those of another, which are zero. Blocks for long."""
    for run in runs:
        for start, end in data_extents(source, run.offset, page_offset(run.end)):
            for at in range(start, end, _COPIED_AT_ONCE):
                os.pwrite(target, os.pread(source, min(_COPIED_AT_ONCE, end - at), at), at)
