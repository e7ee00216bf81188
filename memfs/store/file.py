"""One regular file: where its bytes are, which pages it has, its seals, and the one order in which pages come and go.

State and who owns it
---------------------
Size, times and, of an ordinary file, the set of allocated pages belong to the **backing file** (backing_file.py). A
**tracked** file has a page map as well, and then the map is the truth. Tracked are guest-sealed files (only their owner
touches the backing, and only pages that the map shows) and all files on an accounted backing (every allocation goes
through this module).

`locked` is the inode lock: it serialises truncate, allocate, punch, seal and an owner's page look-ups, and is kept
while owners are notified, so that two changes of one file never interleave. It is held across awaits; everything
between two awaits is atomic because the daemon has one thread.

What takes long is done in pieces, in a thread, so that others are answered meanwhile. An operation can be cancelled (a
system call interrupted by a signal gets EINTR) while it waits for the lock and between two pieces. The pieces that were
done stay done, accounted for and told to the owner, as on ext4: who tries again gets further each time, and to undo
them could destroy what others have written to them since. Half a truncation would be a loss, so that runs to its end.

Taking memory away has one order, in `_take_away`:

    check seals -> begin (the owner unmaps, acknowledges, has no page locked) -> free -> account -> end

and end comes on every path once begin was sent, also when freeing fails. Allocating: reserve -> allocate ->
account -> tell the owner; when allocating fails the kernel has taken back what the call had allocated (shmem_fallocate)
and we return the reservation.

Guest seal (RFC patch 01): set on an empty file that nobody could have mapped. A handle that could be mapped counts as
a mapping, since the kernel does not tell a FUSE server about mmap. The file gets a fresh backing file at that moment,
so that a descriptor or passthrough handle of the old one leads nowhere.

The other seals are enforced here; on an accounted backing the memfd carries them as well, so that the kernel does. What
passes through never asks us, so a file sealed on writes is not opened in that way any more (open_files.py).
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Final, Protocol

import trio

from memfs.contract import faults
from memfs.contract.faults import Point, reach, reach_at_once
from memfs.contract.page_map import ABSENT, ALLOCATED, PageMap
from memfs.contract.sparse import data_pages
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from memfs.contract.units import (
    ByteOffset,
    PageIndex,
    PageRange,
    is_page_aligned,
    page_ceil,
    page_floor,
    page_offset,
)
from memfs.store import chunks, seals
from memfs.store.accounting import MAP_END, Accounting
from memfs.store.backing import Backing
from memfs.store.backing_file import Backed
from memfs.store.measurement import InitialImage
from memfs.store.opens import Opens

_PUNCH: Final = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


class GuestOps(Protocol):
    """What an owner is told (RFC patch 01: guest_ops).

    Each returns when the owner has acted, or has been fenced, and until then cannot be cancelled.
    """

    async def invalidate_begin(self, pages: PageRange) -> None:
        """Unmap these pages, map none of them until the end, and keep none locked."""

    async def invalidate_end(self, pages: PageRange) -> None:
        """What was begun for these pages is over."""

    async def fallocate(self, pages: PageRange) -> None:
        """These pages are allocated now."""


class File(Backed):
    """A regular file. Sizes and offsets are bytes; ranges are pages. All methods raise OSError as the kernel would.

    `number` as for Backed; `born_with` are seals (F_SEAL_* bits).
    """

    __slots__ = (
        "_accounting",
        "_image",
        "_is_given_out",
        "_is_stale",
        "_owner",
        "opens",
        "seals",
    )

    def __init__(self, backing: Backing, number: int, born_with: int = 0) -> None:
        self.seals = born_with
        super().__init__(backing, number, backing.create(number, guest=self.guest))
        try:
            self._seal_backing(born_with)
            self._accounting = Accounting(backing, str(number)) if backing.accounted or self.guest else None
        except OSError:
            backing.free(self._content)
            raise
        self.opens: Final = Opens()
        self._image: InitialImage | None = None
        self._owner: GuestOps | None = None
        self._is_stale = False
        self._is_given_out = False  # an owner has been given a descriptor of the backing file

    @property
    def guest(self) -> bool:
        """Whether only the guest reaches the content (F_SEAL_GUEST)."""
        return bool(self.seals & seals.F_SEAL_GUEST)

    @property
    def page_map(self) -> PageMap | None:
        """Which pages are allocated; None if that is not tracked."""
        return self._accounting.page_map if self._accounting is not None else None

    @property
    def owner(self) -> GuestOps | None:
        """The owner that is notified when pages come and go."""
        return self._owner

    def bind(self, owner: GuestOps) -> None:
        """Give the file, which has none, an owner. It receives descriptors of the backing file, if it has not."""
        assert self._owner is None, f"file {self.number} has two owners"
        self._owner = owner
        self._is_stale = self._is_given_out = True

    def unbind(self) -> None:
        """Take the owner from the file. What it has of descriptors nobody can take back."""
        self._owner = None

    def take_stale(self) -> bool:
        """Return whether an owner may have written past the kernel's page cache, which the caller is about to empty."""
        stale, self._is_stale = self._is_stale, self._owner is not None
        return stale

    def initial_image(self) -> InitialImage:
        """Return what the file is populated with before its guest runs. Raises OSError(EINVAL) if not guest-sealed."""
        if not self.guest:
            raise OSError(errno.EINVAL, "not guest-sealed")
        if self._image is None:
            self._image = InitialImage()
        return self._image

    def hold(self) -> None:
        super().hold()
        if self._holds == 1:
            self._backing.reaper.forget(self)

    # -- content ----------------------------------------------------------------------------------------------------

    def read(self, offset: ByteOffset, length: int) -> bytes:
        """Up to `length` bytes. EPERM if guest-sealed."""
        self._refuse_if_guest("read")
        return os.pread(self.fd, length, offset)

    def write(self, offset: ByteOffset, data: bytes) -> int:
        """Write what there is room for and return how much that was. EPERM if guest-sealed, ENOSPC if none."""
        self._refuse_if_guest("written")
        self._forbid(seals.NO_WRITES, "written")
        allowed = self._before_sealed_end(offset, len(data))
        room = self._room_for(offset, allowed)
        if allowed and not room:
            raise OSError(errno.ENOSPC, "no room")
        if not room:
            return os.pwrite(self.fd, b"", offset)
        pages = PageRange.covering(offset, room)
        with self._giving(pages) as given:
            written = os.pwrite(self.fd, data[:room], offset)
            given(pages)
            return written

    def _before_sealed_end(self, offset: ByteOffset, length: int) -> int:
        """How much of a write the GROW seal allows: as the kernel, whole pages before the end. EPERM if nothing."""
        size = ByteOffset(self.size)
        if not self.seals & seals.F_SEAL_GROW or offset + length <= size:
            return length
        allowed = page_offset(page_floor(size)) - offset
        if allowed <= 0:
            raise OSError(errno.EPERM, "sealed against growing")
        return allowed

    def seek(self, offset: ByteOffset, whence: int) -> ByteOffset:
        """SEEK_DATA and SEEK_HOLE (lseek(2)). For a guest-sealed file, data is what is allocated."""
        if not self.guest:
            return ByteOffset(os.lseek(self.fd, offset, whence))
        assert self.page_map is not None
        size = self.size
        if not 0 <= offset < size:
            raise OSError(errno.ENXIO, "past the end of the file")
        rest = PageRange(page_floor(offset), page_ceil(ByteOffset(size)))
        first = next(self.page_map.runs(rest, ALLOCATED if whence == os.SEEK_DATA else ABSENT), None)
        if first is not None:
            return max(offset, first.offset)
        if whence == os.SEEK_HOLE:
            return ByteOffset(size)
        raise OSError(errno.ENXIO, "no data from there on")

    # -- giving and taking pages ------------------------------------------------------------------------------------

    async def allocate(self, offset: ByteOffset, length: int, *, keep_size: bool) -> None:
        """fallocate(2) with mode 0 or FALLOC_FL_KEEP_SIZE: every page that [offset, offset + length) touches.

        ENOSPC: nothing was allocated. EINVAL: guest-sealed and not page-aligned. Cancelled, it has allocated a part,
        from the start on.
        """
        async with self.locked():
            self._check_alignment(offset, length)
            if self.seals & seals.F_SEAL_GROW and offset + length > self.size:
                self._forbid(seals.F_SEAL_GROW, "allocated past its end")
            done: list[PageRange] = []
            try:
                await self._allocate(offset, length, FALLOC_FL_KEEP_SIZE if keep_size else 0, done.append)
            finally:
                if self.owner is not None and done:
                    await self.owner.fallocate(PageRange(done[0].start, done[-1].end))

    async def punch(self, offset: ByteOffset, length: int) -> None:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE: free whole pages, zero partial ones.

        EINVAL: guest-sealed and not page-aligned. Cancelled, it may have freed a part.
        """
        async with self.locked():
            self._check_alignment(offset, length)
            self._forbid(seals.NO_WRITES, "punched")
            pages = PageRange.inside(offset, length)

            async def free() -> None:
                if pages is not None:
                    await self._free_piecewise(pages)
                fallocate(self.fd, _PUNCH, offset, length)

            await self._take_away(free, told=pages, freed=pages)

    async def truncate(self, size: int, *, by_path: bool = False) -> None:
        """ftruncate(2), in bytes; or truncate(2), which leaves the times alone if the size stays.

        EINVAL: guest-sealed and not page-aligned. EFBIG: larger than memfs can track.
        """
        async with self.locked():
            self._check_alignment(ByteOffset(size), 0)
            old, first = self.size, page_ceil(ByteOffset(size))
            if size != old:
                self._forbid(seals.F_SEAL_GROW if size > old else seals.F_SEAL_SHRINK, "resized so")
            if size > old:
                if self._accounting is not None:
                    self._accounting.check_size(first)
                self._truncate_backing(size, by_path)
                return
            end = page_ceil(ByteOffset(old))
            told = PageRange(first, end) if first < end else None
            # Pages beyond the old size (FALLOC_FL_KEEP_SIZE allocates such) go as well, even if the size stays, but no
            # owner can have those.
            freed = PageRange(first, MAP_END) if first < MAP_END else None

            async def free() -> None:
                if told is not None:
                    await self._free_piecewise(told)
                self._truncate_backing(size, by_path)

            with trio.CancelScope(shield=True):
                await self._take_away(free, told=told, freed=freed)

    def _truncate_backing(self, size: int, by_path: bool) -> None:
        os.truncate(f"/proc/self/fd/{self.fd}" if by_path else self.fd, size)

    def present(self, pages: PageRange) -> Iterator[tuple[PageRange, bool]]:
        """Which pages of a range are allocated: runs in order, True for allocated. Call within `locked`.

        Of an untracked file, pages that were allocated and never written count as absent (as SEEK_HOLE has it).
        """
        runs = self.page_map.runs(pages) if self.page_map is not None else data_pages(self.fd, pages)
        position = pages.start
        for run in runs:
            if position < run.start:
                yield PageRange(position, run.start), False
            yield run, True
            position = run.end
        if position < pages.end:
            yield PageRange(position, pages.end), False

    async def make_present(self, pages: PageRange) -> None:
        """Allocate whatever is absent in a range within the file's size, all or nothing. Call within `locked`."""
        await self._allocate(pages.offset, pages.nbytes, FALLOC_FL_KEEP_SIZE, lambda _: None)

    async def _allocate(self, offset: ByteOffset, length: int, mode: int, done: Callable[[PageRange], None]) -> None:
        """Allocate what [offset, offset + length) touches, in pieces; `done` is called after each.

        Where there is no room while files are being freed, that is waited for.
        """
        try:
            await self._allocate_now(offset, length, mode, done)
        except OSError as error:
            if error.errno != errno.ENOSPC or not await self._backing.reaper.drain():
                raise
            await self._allocate_now(offset, length, mode, done)

    async def _allocate_now(
        self, offset: ByteOffset, length: int, mode: int, done: Callable[[PageRange], None]
    ) -> None:
        pages = PageRange.covering(offset, length)
        with self._giving(pages) as given:

            async def allocate(piece: PageRange) -> None:
                start, stop = max(offset, piece.offset), min(offset + length, page_offset(piece.end))
                await reach(Point.BEFORE_ALLOCATE)
                await chunks.system_call(functools.partial(fallocate, self.fd, mode, start, stop - start), stop - start)
                try:
                    await reach(Point.AFTER_ALLOCATE)
                    reach_at_once(Point.BEFORE_ACCOUNT)
                finally:  # they are there
                    given(piece)
                    done(piece)
                await reach(Point.AFTER_ACCOUNT)

            if length <= chunks.LONG:
                await allocate(pages)
                return
            with self._backing.promised(len(pages)) as has_room:
                # Where room may run out it is one piece, for the kernel takes back what a single call has allocated.
                for piece in pages.chunks(chunks.PIECE) if has_room or self.page_map is not None else [pages]:
                    if piece.start > pages.start:
                        await trio.lowlevel.checkpoint_if_cancelled()
                    await allocate(piece)

    def _giving(self, pages: PageRange) -> AbstractContextManager[Callable[[PageRange], None]]:
        return self._accounting.reserve(pages) if self._accounting is not None else nullcontext(lambda _: None)

    async def _take_away(
        self, free: Callable[[], Awaitable[None]], *, told: PageRange | None, freed: PageRange | None
    ) -> None:
        """The order of taking memory away, around what frees it.

        The owner is `told` of these pages; the map loses the `freed` ones. None: no whole page.
        """
        owner = self.owner if told is not None else None
        if owner is not None and told is not None:
            await owner.invalidate_begin(told)
        try:
            await reach(Point.BEFORE_FREE)
            await free()
            try:
                reach_at_once(Point.AFTER_FREE)
                reach_at_once(Point.BEFORE_ACCOUNT)
            finally:  # they are gone
                if freed is not None:
                    self._forget_pages(freed)
            await reach(Point.AFTER_ACCOUNT)
        finally:
            if owner is not None and told is not None:
                await owner.invalidate_end(told)

    async def _free_piecewise(self, pages: PageRange) -> None:
        """Free a range of many pages, so that the one call for all of it finds little left to do; of few pages none.

        Where writes are tracked, not in a thread: of a write that came during a piece nobody could say whether the
        pages it allocated were freed again.
        """
        if len(pages) <= chunks.LONG_PAGES or self.pages <= chunks.LONG_PAGES:
            return
        for piece in chunks.to_free(pages, self.page_map, guest=self.guest):
            punch = functools.partial(fallocate, self.fd, _PUNCH, piece.offset, piece.nbytes)
            if self.page_map is None or self.guest:
                await chunks.system_call(punch, piece.nbytes)
            else:
                punch()
            self._forget_pages(piece)
            await trio.lowlevel.checkpoint()

    def _forget_pages(self, pages: PageRange) -> None:
        if self._accounting is not None:
            self._accounting.forget(pages)

    def _room_for(self, offset: ByteOffset, length: int) -> int:
        """How many of `length` bytes from `offset` on can be written before memory runs out."""
        if self._accounting is None or not length:
            return length  # the kernel knows
        return self._accounting.room_for(offset, length)

    # -- seals ------------------------------------------------------------------------------------------------------

    async def add_seals(self, bits: int) -> None:
        """fcntl(F_ADD_SEALS). Adding seals that are set already is fine.

        EINVAL: unknown bits. EPERM: sealed against sealing. EBUSY: for the guest seal, not empty, or mappable; for a
        seal on writes, somebody holds the file open for writing in a way that we could not stop.
        """
        async with self.locked():
            if bits & ~seals.SUPPORTED:
                raise OSError(errno.EINVAL, f"seal bits {bits & ~seals.SUPPORTED:#x} are not supported")
            if self.seals & seals.F_SEAL_SEAL:
                raise OSError(errno.EPERM, "sealed against further seals")
            new = bits & ~self.seals
            # What passes through never asks us; what is cached may be written to through a mapping.
            unstoppable = seals.ON_WRITES if self.opens.backing_id is not None else seals.NO_WRITES
            if new & unstoppable and self.opens.writable:
                raise OSError(errno.EBUSY, "open for writing")
            if new & seals.NO_WRITES and self._is_given_out and not self._backing.accounted:
                raise OSError(errno.EBUSY, "an owner was given a descriptor that nobody can take back")
            if new & seals.F_SEAL_GUEST:
                self._become_guest()
            self._seal_backing(self.seals | bits)
            self.seals |= bits

    def _seal_backing(self, bits: int) -> None:
        """Let the kernel enforce what it can: a memfd can carry seals, a file of a tmpfs cannot.

        Raises OSError(EBUSY) if an owner has it mapped for writing, and F_SEAL_WRITE is to be added.
        """
        if self._backing.accounted and bits & seals.OF_MEMFD:
            with self.held():
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, bits & seals.OF_MEMFD)

    def check_chmod(self, old: int, new: int) -> None:
        """Raise OSError(EPERM) if the EXEC seal forbids a change of permission bits."""
        if (old ^ new) & 0o111:
            self._forbid(seals.F_SEAL_EXEC, "made executable or not")

    def _become_guest(self) -> None:
        if self.size != 0:
            raise OSError(errno.EBUSY, "the guest seal is for empty files")
        if self.opens.mappable:
            raise OSError(errno.EBUSY, "open in a way that could be mapped; close it, or open it with O_DIRECT")
        if self.owner is not None:
            raise OSError(errno.EBUSY, "registered as shared memory")
        old = self.stat()
        with ExitStack() as undo:
            content = self._backing.create(self.number, guest=True)
            undo.callback(self._backing.free, content)
            fd = self._backing.open(content)
            undo.callback(self._backing.shut, fd)
            accounting = self._accounting or Accounting(self._backing, str(self.number))
            undo.pop_all()
        accounting.forget()  # what KEEP_SIZE had allocated, and the next lines free
        self._backing.shut(self.fd)
        self._backing.free(self._content)
        self._content, self.fd, self._accounting, self._is_given_out = content, fd, accounting, False
        self.set_times(old.st_atime_ns, old.st_mtime_ns)

    def _refuse_if_guest(self, verb: str) -> None:
        if self.guest:
            raise OSError(errno.EPERM, f"a guest-sealed file cannot be {verb}")

    def _forbid(self, bits: int, what: str) -> None:
        if self.seals & bits:
            raise OSError(errno.EPERM, f"a file sealed with {seals.format_seals(self.seals & bits)} cannot be {what}")

    def _check_alignment(self, offset: ByteOffset, length: int) -> None:
        if self.guest and not (is_page_aligned(offset) and is_page_aligned(length)):
            raise OSError(errno.EINVAL, "offset and length of a guest-sealed file must be page-aligned")

    # -- life -------------------------------------------------------------------------------------------------------

    def is_quick(self, length: int) -> bool:
        """Whether to allocate `length` bytes for the owner would not wait for anything: it does not yield then."""
        is_busy = self.is_locked or not self._backing.reaper.is_idle or faults.are_injected()
        return length <= chunks.LONG and not is_busy

    def unlinked(self) -> None:
        """It has no name any more, and nobody has it open."""
        if self._is_large:
            self._backing.reaper.expect(self)

    def free(self) -> None:
        """The file is gone: free its memory, if that takes long beside everything else. No owner may be left."""
        if not self._is_large or not self._backing.reaper.take(self):
            self._backing.reaper.forget(self)
            self.close()

    @property
    def _is_large(self) -> bool:
        return self.pages > chunks.LONG_PAGES

    async def empty(self) -> None:
        """Free the memory of a file that nobody has any more, in pieces. Raises OSError, and then some may be left."""
        end = page_ceil(ByteOffset(self.size))
        if end:
            async with self.locked():
                await self._free_piecewise(PageRange(PageIndex(0), end))

    def close(self) -> None:
        """Free the memory of a file that is gone, at once. No owner may be left."""
        assert self.owner is None, f"file {self.number} is freed while registered"
        assert not self._holds, f"file {self.number} is freed while held"
        self._backing.free(self._content)
        if self._accounting is not None:
            self._accounting.close()

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant. Costs time proportional to the file's pages."""
        assert not self.guest or self._accounting is not None, "guest-sealed without a page map"
        if self._accounting is not None:
            self._accounting.check(self.pages)
