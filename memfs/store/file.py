"""One regular file: its content, its pages, its seals, who has it open and who owns it.

State, and where it belongs
---------------------------
Size, times and, of an ordinary file, the set of allocated pages belong to the **backing file** (backing_file.py). A
**tracked** file has a page map as well, and then the map is the truth. Tracked are guest-sealed files (only their owner
touches the backing, and only pages that the map shows) and all files on an accounted backing (every allocation goes
through this module).

`locked` is the inode lock: it serialises truncate, allocate, punch, seal and an owner's page look-ups, and is kept
while owners are notified, so that two changes of one file never interleave. It is held across awaits; everything
between two awaits is atomic because the daemon has one thread. In which order pages come and go while it is held, and
what is left of an operation that is cancelled, is said in pages.py. Half a truncation would be a loss, so that runs to
its end. A task that has the lock holds the file, so a lock need not outlive the descriptor, and most files have none.

Guest seal (RFC patch 01): set on an empty file that nobody could have mapped. A handle that could be mapped counts as
a mapping, since the kernel does not tell a FUSE server about mmap. The file gets a fresh backing file at that moment,
so that a descriptor or passthrough handle of the old one leads nowhere.

The other seals (seals.py) are enforced here; on an accounted backing the memfd carries them as well, so that the kernel
does. In passthrough mode nobody asks us, so a file sealed on writes is not opened in that way any more (open_files.py).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

import trio

from memfs.contract.aio.lock import Lock
from memfs.contract.page_map import ABSENT, ALLOCATED, PageMap
from memfs.contract.sys.libc import fallocate
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageIndex, PageRange, page_ceil, page_floor
from memfs.state.journal import INODE, NO_JOURNAL, Journal
from memfs.store import chunks, seals
from memfs.store.accounting import Accounting
from memfs.store.backing import Backing
from memfs.store.backing_file import BackingFile
from memfs.store.converted import NO_CONVERSION
from memfs.store.measurement import InitialImage
from memfs.store.opens import Opens
from memfs.store.pages import GuestOps, Pages
from memfs.store.seals import Obstacle, Operation

log = logging.getLogger(__name__)

_ALL: Final = PageRange(PageIndex(0), chunks.END)


class File:
    """A regular file. Sizes and offsets are bytes; ranges are pages. All methods raise OSError as the kernel would.

    `number` is this file's for ever, and no other's in the backing; `initial_seals` are F_SEAL_* bits. A new file may
    be `held` from the beginning. One that `exists` was another process's, and must be recovered (`recover`).
    """

    __slots__ = (
        "_accounting",
        "_backing",
        "_backing_file",
        "_image",
        "_is_given_out",
        "_is_stale",
        "_journal",
        "_lock",
        "_owner",
        "opens",
        "seals",
    )

    def __init__(
        self,
        backing: Backing,
        number: int,
        initial_seals: int = 0,
        *,
        journal: Journal = NO_JOURNAL,
        exists: bool = False,
        held: bool = False,
    ) -> None:
        self._backing: Final = backing
        self._journal: Final = journal
        self.seals = initial_seals
        self._is_given_out = False  # an owner has been given a descriptor of the backing file
        self._backing_file: Final = BackingFile(backing, number, guest=self.guest, exists=exists, held=held)
        self._accounting = Accounting(backing, str(number)) if backing.accounted or self.guest else None
        try:
            self._seal_backing_file(initial_seals)
        except OSError:
            if held:
                self._backing_file.release()
            self._backing_file.free()
            raise
        self.opens: Final = Opens()
        self._lock: Lock | None = None
        self._image: InitialImage | None = None
        self._owner: GuestOps | None = None
        self._is_stale = False

    @property
    def guest(self) -> bool:
        """Whether only the guest reaches the content (F_SEAL_GUEST)."""
        return bool(self.seals & seals.F_SEAL_GUEST)

    @property
    def granule(self) -> int:
        """In what multiples, in bytes, it gets and loses pages; of an ordinary file fewer bytes are zeroed instead."""
        return self._backing.guest_granule if self.guest else PAGE_SIZE

    @property
    def is_tracked(self) -> bool:
        """Whether it has a page map, open or not."""
        return self._accounting is not None

    @property
    def page_map(self) -> PageMap | None:
        """Which pages are allocated; None for an untracked file. Call while it is held. Raises OSError(EMFILE)."""
        return self._accounting.page_map if self._accounting is not None else None

    def open_page_map(self) -> int:
        """Return a descriptor of a tracked file's page map for an owner, to whom it is read-only. Raises OSError."""
        assert self._accounting is not None, "an untracked file has no page map"
        return self._accounting.open_for_owner()

    # -- the backing file -------------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """The file's number in the backing."""
        return self._backing_file.number

    @property
    def fd(self) -> int:
        """The descriptor of the backing file, while the file is held."""
        return self._backing_file.fd

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return self._backing_file.size

    @property
    def pages(self) -> int:
        """How many pages are allocated, those beyond the file's size included."""
        return self._backing_file.pages

    @property
    def stray_pages(self) -> int:
        """How many pages an owner has allocated by itself, of a tracked file."""
        return max(0, self.pages - self._accounting.pages) if self._accounting is not None else 0

    def stat(self) -> os.stat_result:
        """Return size, blocks and times. The other fields are not this file's."""
        return self._backing_file.stat()

    def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set access and modification time, in nanoseconds since the epoch."""
        self._backing_file.set_times(atime_ns, mtime_ns)

    def touch_ctime(self) -> None:
        """Set the ctime to now, because the inode was changed."""
        self._backing_file.touch_ctime()

    def hold(self) -> None:
        """Keep `fd` open until `release`. Can be nested. Raises OSError(EMFILE), changing nothing."""
        self._backing_file.hold()
        if self._backing_file.holds == 1:
            self._backing.reaper.forget(self)

    def release(self) -> None:
        """Undo one `hold`."""
        self._backing_file.release()
        if not self._backing_file.holds:
            self._lock = None  # nobody waits for it, since a task that does holds the file
            if self._accounting is not None:
                self._accounting.put_away(is_given_out=self._is_given_out)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the file within a with statement."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def locked(self) -> _Locked:
        """Hold the file and have its inode lock within an async with statement."""
        self._lock = self._lock or Lock()
        return _Locked(self, self._lock)

    # -- the owner --------------------------------------------------------------------------------------------------

    @property
    def owner(self) -> GuestOps | None:
        """The owner that is notified when pages come and go."""
        return self._owner

    @property
    def is_given_out(self) -> bool:
        """Whether an owner may change it by a descriptor of the backing file, which nobody can take back."""
        return self._is_given_out

    def bind(self, owner: GuestOps) -> None:
        """Give the file, which has none, an owner. It receives descriptors of the backing file, if it has not."""
        assert self._owner is None, f"file {self.number} has two owners"
        self._owner = owner
        self._is_stale = self._is_given_out = True
        self._backing.watch(self)

    def unbind(self) -> None:
        """Take the owner from the file. What it has of descriptors nobody can take back."""
        if self._owner is not None and self.guest:
            self.initial_image().owner_left()
        self._owner = None

    def take_stale(self) -> bool:
        """Return whether the kernel's page cache may be wrong; the caller is about to empty it.

        It may be where an owner may have written past it.
        """
        stale, self._is_stale = self._is_stale, self._owner is not None
        return stale

    def has_stale_cache(self) -> None:
        """Note that what the kernel's page cache has is to be emptied when the file is opened."""
        self._is_stale = True

    def initial_image(self) -> InitialImage:
        """Return what the file is populated with before its guest runs. Raises OSError(EINVAL) if not guest-sealed."""
        if not self.guest:
            raise OSError(errno.EINVAL, "not guest-sealed")
        if self._image is None:
            self._image = InitialImage(self._image_changed)
        return self._image

    def _image_changed(self) -> None:
        self._journal.changed(INODE, self.number)

    @property
    def image_state(self) -> bytes:
        """What is to be known of the initial image when this process has ended; empty if there is none."""
        return self._image.state if self._image is not None else b""

    # -- content ----------------------------------------------------------------------------------------------------

    def read(self, offset: ByteOffset, length: int) -> bytes:
        """Return up to `length` bytes. EPERM if guest-sealed."""
        seals.check(self.seals, Operation.READ)
        return os.pread(self.fd, length, offset)

    def write(self, offset: ByteOffset, data: bytes | memoryview) -> int:
        """Write as much as there is space for and return its length. EPERM if sealed against it, ENOSPC if none."""
        seals.check(self.seals, Operation.WRITE)
        if self.seals & seals.F_SEAL_GROW:
            data = data[: seals.writable_length(self.seals, ByteOffset(self.size), offset, len(data))]
        return self._pages().write(offset, data)

    def seek(self, offset: ByteOffset, whence: int) -> ByteOffset:
        """Seek as lseek(2) with SEEK_DATA and SEEK_HOLE. For a guest-sealed file, data is what is allocated."""
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

    # -- pages ------------------------------------------------------------------------------------------------------

    def _pages(self) -> Pages:
        if self._accounting is not None:
            self._accounting.take_out()  # or OSError, before anything has changed
        image = self._image if self._image is not None and not self._image.launched else None
        return Pages(self._backing, self._backing_file, self._accounting, self._owner, image, guest=self.guest)

    @property
    def journal(self) -> Journal:
        """Where its changes are noted."""
        return self._journal

    def operations(self) -> Pages:
        """Return what can be done to its pages. Call within `locked`. Raises OSError: EMFILE, ENOSPC."""
        return self._pages()

    def allocation_runs(self, pages: PageRange) -> Iterator[tuple[PageRange, bool]]:
        """Split a range into runs of pages that are allocated (True) or absent (False). Call within `locked`.

        Of an untracked file, pages that were allocated and never written count as absent (as SEEK_HOLE has it).
        """
        return self._pages().runs(pages)

    async def ensure_allocated(self, pages: PageRange) -> PageRange:
        """Allocate the absent pages of a range within the file's size, all or none. Call within `locked`.

        Returns the range, or the granules around it, which are allocated then.
        """
        return await self._pages().ensure_allocated(pages)

    def fallocate_now(self, mode: int, offset: ByteOffset, length: int) -> bool:
        """Allocate or punch as `allocate` and `punch`, if that is a short call, and nobody else's business.

        So it is if only the kernel counts the file's pages, nobody owns them or has the lock, and nothing forbids it: a
        balloon makes thousands of such calls. Returns whether it is done. Raises OSError as the kernel does.
        """
        if (
            length > chunks.SHORT
            or self._accounting is not None
            or self._owner is not None
            or self.seals & ~seals.F_SEAL_SEAL
            or (self._lock is not None and self._lock.is_taken)
            or not self._backing_file.holds
        ):
            return False
        try:
            fallocate(self._backing_file.fd, mode, offset, length)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return False  # space may be about to be freed
            raise
        return True

    async def allocate(self, offset: ByteOffset, length: int, *, keep_size: bool) -> None:
        """Allocate every page that [offset, offset + length) touches: fallocate(2), mode 0 or FALLOC_FL_KEEP_SIZE.

        ENOSPC: nothing was allocated. EINVAL: guest-sealed and not in granules. Cancelled, it has allocated a part,
        from the start on.
        """
        async with self.locked():
            self._check_alignment(offset, length)
            if self.seals & seals.F_SEAL_GROW and offset + length > self.size:
                seals.check(self.seals, Operation.EXTEND)
            with self.converting():
                await self._pages().allocate(offset, length, keep_size=keep_size)

    async def punch(self, offset: ByteOffset, length: int) -> None:
        """Free whole pages and zero partial ones: fallocate(2), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE.

        EINVAL: guest-sealed and not in granules. Cancelled, it may have freed a part.
        """
        async with self.locked():
            self._check_alignment(offset, length)
            seals.check(self.seals, Operation.PUNCH)
            with self.converting():
                await self._pages().punch(offset, length)

    async def truncate(self, size: int, *, by_path: bool = False) -> None:
        """Set the size in bytes: ftruncate(2), or truncate(2), which leaves the times alone if the size stays.

        EINVAL: guest-sealed and not in granules. EFBIG: larger than memfs can track.
        """
        async with self.locked():
            self._check_alignment(ByteOffset(size), 0)
            old = self.size
            if size != old:
                seals.check(self.seals, Operation.GROW if size > old else Operation.SHRINK)
            with trio.CancelScope(shield=True):
                await self._pages().truncate(size, by_path=by_path)

    def converting(self) -> AbstractContextManager[None]:
        """Count what changes sides within a with statement, if the file is guest-sealed. Call within `locked`."""
        if not self.guest:
            return NO_CONVERSION
        assert self._accounting is not None
        return self._backing.converted.during(self._accounting)

    def _check_alignment(self, offset: ByteOffset, length: int) -> None:
        if self.guest and (offset % self.granule or length % self.granule):
            seals.check(self.seals, Operation.SPLIT_PAGE)

    # -- seals ------------------------------------------------------------------------------------------------------

    async def add_seals(self, bits: int) -> None:
        """Add seals: fcntl(F_ADD_SEALS). Adding seals that are set already is fine.

        EINVAL: unknown bits. EPERM: sealed against sealing. EBUSY: for the guest seal, not empty, or mappable; for a
        seal on writes, somebody holds the file open for writing in a way that we could not stop.
        """
        async with self.locked():
            seals.check_addition(self.seals, bits, self._obstacles())
            if bits & ~self.seals & seals.F_SEAL_GUEST:
                await self._pages().free_most(_ALL)  # an empty file may have pages past its end
                seals.check_addition(self.seals, bits, self._obstacles())  # somebody may have opened it meanwhile
                self._become_guest()
            self._seal_backing_file(self.seals | bits)
            self.seals |= bits

    def _obstacles(self) -> Iterator[Obstacle]:
        if self.size:
            yield Obstacle.CONTENT
        if self._owner is not None:
            yield Obstacle.OWNER
        if self._is_given_out and not self._backing.accounted:
            yield Obstacle.GIVEN_OUT
        if self.opens.mappable:
            yield Obstacle.MAPPABLE
        if self.opens.writable:
            yield Obstacle.UNSEEN_WRITER if self.opens.backing_id is not None else Obstacle.WRITER

    def _become_guest(self) -> None:
        if self._accounting is not None:
            self._accounting.take_out()  # or OSError, before anything has changed
        self._journal.defer(self._backing_file.replace_with_guest())
        accounting = self._accounting or Accounting(self._backing, str(self.number))
        accounting.forget()  # what KEEP_SIZE had allocated
        self._accounting, self._is_given_out = accounting, False
        self._backing.unwatch(self)

    def _seal_backing_file(self, bits: int) -> None:
        """Let the kernel enforce what it can: a memfd can carry seals, a file of a tmpfs cannot.

        Raises OSError(EBUSY) if an owner has it mapped for writing, and F_SEAL_WRITE is to be added.
        """
        if self._backing.accounted and bits & seals.OF_MEMFD:
            with self.held():
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, bits & seals.OF_MEMFD)

    def check_chmod(self, old: int, new: int) -> None:
        """Raise OSError(EPERM) if the EXEC seal forbids a change of permission bits."""
        if (old ^ new) & 0o111:
            seals.check(self.seals, Operation.CHANGE_EXECUTABLE)

    @property
    def tracked_pages(self) -> int:
        """How many pages the page map shows; none of an untracked file."""
        return self._accounting.pages if self._accounting is not None else 0

    def recover(self, *, is_given_out: bool, image: bytes) -> None:
        """Put in order what another process has left, which may have been killed at any moment.

        What the page map shows is the truth. Pages that it does not show were being allocated, and nobody was told of
        them; they are freed. Pages that are not there were being freed, which will be asked for again; until then they
        are there once more, and zero.
        """
        self._is_stale = self._is_given_out = is_given_out
        if self._accounting is not None:
            try:
                self._accounting.recover()
                if self._accounting.pages != self.pages:
                    with self.held():
                        self._pages().make_true()
            except OSError as error:  # no memory or no descriptor: it stays as it is, and others are not concerned
                log.warning("file %d is not put in order: %s", self.number, error)
            self._accounting.put_away(is_given_out=self._is_given_out)
        if is_given_out:
            self._backing.watch(self)
        if self.guest and (image or is_given_out or self.tracked_pages):
            self._image = InitialImage.of_before(image, self._image_changed)
            self._image_changed()

    # -- life -------------------------------------------------------------------------------------------------------

    def unlinked(self) -> None:
        """Prepare for being freed: the file has no name any more, and nobody has it open."""
        if pages := self.pages:
            self._backing.reaper.expect(self, pages)

    def free(self) -> None:
        """Free a file that nobody refers to any more; the memory of a large one later. No owner may be left."""
        pages = self.pages
        if pages <= chunks.LONG_PAGES or not self._backing.reaper.take(self, pages):
            self._backing.reaper.forget(self)
            chunks.count(pages * PAGE_SIZE)
            self.close()

    async def empty(self) -> None:
        """Free the memory of a file that nobody refers to any more, in chunks.

        Raises OSError, and then some may be left.
        """
        async with self.locked():
            await self._pages().free_most(_ALL)

    def close(self) -> None:
        """Free a file that nobody refers to any more, immediately. No owner may be left."""
        assert self._owner is None, f"file {self.number} is freed while registered"
        self._backing.unwatch(self)
        self._image = None  # which refers to this file
        self._backing_file.free()
        if self._accounting is not None:
            self._accounting.close()

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant. Costs time proportional to the file's pages."""
        assert not self.guest or self._accounting is not None, "guest-sealed without a page map"
        if self._accounting is not None:
            self._accounting.check(self.pages, exactly=not self._is_given_out)


class _Locked:
    """`File.locked`. Does not yield if the lock is free."""

    __slots__ = ("_file", "_lock")

    def __init__(self, file: File, lock: Lock) -> None:
        self._file: Final = file
        self._lock: Final = lock

    async def __aenter__(self) -> None:
        self._file.hold()
        try:
            await self._lock.acquire()
        except BaseException:
            self._file.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()
        self._file.release()
