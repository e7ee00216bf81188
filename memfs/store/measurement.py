"""What a guest-sealed file is filled with before its guest runs, and the measurement of it.

Nobody on the host can write to a guest-sealed file, so a guest's first memory (firmware, kernel) gets there in another
way: as TDX and SNP have it, the store copies it in and measures what it copied, until the guest is launched. After that
nothing more goes in. The measurement is SHA-384 over records, in the order in which things happened; numbers are u64,
little-endian:

    page index, 4096 bytes of content       a page was populated
    2**64 - 1, first page, end of pages     allocated pages were removed before the launch (punched, truncated)
    2**64 - 2, 0, 0                         an owner unregistered the file, or was cut off
    2**64 - 3, 0, 0; the digest before      the daemon was killed before the launch, and another one goes on

Knowing the image and the order one can compute it, and a page that was put elsewhere, twice or not at all shows. No
page has such an index, so no two histories give the same bytes. Pages that were allocated and not populated are zero
and are not measured; nor is the removal of pages that were not there, which changes nothing.

Why removal is recorded: a page that is removed is zero when it is allocated again, so content that was measured would
not be there. TDX and SNP do not let such a page pass for the one that was measured, either: it has to be accepted
anew by the guest, which notices. Here no guest could, so the measurement shows it. Rejected: EBUSY for the removal, for
then one client that populates a page keeps all others from getting the file's memory back by any means but unlink; and
to begin the measurement anew, for then what stands in the file is not all measured.

Why the end of an owner is recorded: it could write to all of the file's memory, and may have done so; what the
next one launches is not what was populated, the more so if the former has run its guest in it. A guest whose first
content matters gets a file of its own.

On hugetlbfs, which has no write(2), the content goes through a mapping that is there for that moment. It is the kernel
that copies into it (process_vm_writev(2)): an owner can shrink the file by its own descriptor, and whoever touches what
is not there any more gets SIGBUS.

The content comes from a memfd, which unlike other files cannot make us wait, and which is sealed against shrinking, so
that all of it is there. What is hashed is our copy: a change of the memfd meanwhile changes both or neither.

Why it is recorded that the daemon was killed: it may have been in the middle of copying, so that there is content that
was not measured; and the state of the hash is lost, so that what follows begins with the digest. Whoever wants the
measurement of what was populated then begins anew, with another file.

When a file is populated and launched is said in owners/populate.py.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Final

import numpy as np

from memfs.contract.sys.libc import MAP_NORESERVE, write_own_memory
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageRange, bytes_to_pages

_BLOCK: Final = 512  # pages that are copied at a time: no more than IOV_MAX
_RECORD: Final = np.dtype([("page", "<u8"), ("content", "V", PAGE_SIZE)])
_EVENT: Final = struct.Struct("<3Q")
_REMOVED, _OWNER_LEFT, _RESTARTED = 2**64 - 1, 2**64 - 2, 2**64 - 3
_OPEN, _LAUNCHED = b"\0", b"\1"


class InitialImage:
    """One file's initial content, and whether that is final. `File.initial_image` has it."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self._tell_change: Final = changed
        self._hash = hashlib.sha384()
        self._last = self._hash.digest()  # what is known of it when this process has ended: nothing half copied
        self._launched = False

    @classmethod
    def of_before(cls, state: bytes, changed: Callable[[], None]) -> InitialImage:
        """Return the image of a file after the daemon was killed, from its `state`; that is empty if there was none."""
        image = cls(changed)
        image._launched = state[:1] == _LAUNCHED
        if not image.launched:
            image._hash.update(_EVENT.pack(_RESTARTED, 0, 0))
        image._hash.update(state[1:])
        image._last = image.measurement
        return image

    @property
    def state(self) -> bytes:
        """What is to be known of it when this process has ended."""
        return (_LAUNCHED if self._launched else _OPEN) + self._last

    def _changed(self) -> None:
        self._last = self.measurement
        self._tell_change()

    @property
    def launched(self) -> bool:
        """Whether it is final."""
        return self._launched

    @property
    def measurement(self) -> bytes:
        """SHA-384 of what happened so far, 48 bytes."""
        return self._hash.digest()

    def launch(self) -> bytes:
        """Make it final, and return the measurement."""
        if not self._launched:
            self._launched = True
            self._changed()
        return self.measurement

    def remove(self, pages: PageRange) -> None:
        """Record that allocated pages are about to be removed. After the launch that is the guest's own affair."""
        assert not self.launched, "the guest has been launched"
        self._hash.update(_EVENT.pack(_REMOVED, pages.start, pages.end))
        self._changed()

    def owner_left(self) -> None:
        """Record that an owner, which could write to the file, has it no longer.

        It may come while `copy_in` runs in its thread: an update of the hash is atomic, and consists of whole records.
        """
        self._hash.update(_EVENT.pack(_OWNER_LEFT, 0, 0))
        self._changed()

    def populated(self) -> None:
        """Take note that `copy_in` has ended."""
        self._changed()

    def copy_in(self, pages: PageRange, target: int, source: int, start: ByteOffset, granule: int = PAGE_SIZE) -> None:
        """Copy pages that are allocated into a file, from byte `start` of another, and measure them. Blocks for long.

        `target` and `source` are descriptors; `granule` is that of the target, in bytes. Raises OSError.
        """
        with _Mapped(target, pages, granule) if granule > PAGE_SIZE else nullcontext() as mapped:
            self._copy_in(
                pages, functools.partial(os.pwritev, target) if mapped is None else mapped.write, source, start
            )

    def _copy_in(
        self,
        pages: PageRange,
        write: Callable[[Sequence[memoryview], ByteOffset], int],
        source: int,
        start: ByteOffset,
    ) -> None:
        records = np.empty(_BLOCK, _RECORD)
        memory = memoryview(records.view(np.uint8).data)
        size, first = _RECORD.itemsize, _RECORD.itemsize - PAGE_SIZE
        contents = [memory[at + first : at + size] for at in range(0, _BLOCK * size, size)]
        for block in pages.chunks(_BLOCK):
            buffers = contents[: len(block)]
            records["page"][: len(block)] = np.arange(block.start, block.end)
            read = os.preadv(source, buffers, start + block.offset - pages.offset)
            written = write(buffers, block.offset)
            assert read == written == block.nbytes, f"{read} bytes read, {written} written of {block.nbytes}"
            self._hash.update(memory[: len(block) * size])


class _Mapped:
    """The granules around pages of a file on hugetlbfs, mapped. `target` is a descriptor. Raises OSError."""

    def __init__(self, target: int, pages: PageRange, granule: int) -> None:
        around = pages.rounded(bytes_to_pages(granule))
        self._start: Final = around.offset
        self._memory: Final = mmap.mmap(target, around.nbytes, mmap.MAP_SHARED | MAP_NORESERVE, offset=around.offset)
        self._memory.madvise(mmap.MADV_DONTDUMP)
        self._first = ctypes.c_char.from_buffer(self._memory)

    def write(self, buffers: Sequence[memoryview], offset: ByteOffset) -> int:
        """Do what os.pwritev does."""
        address = ctypes.addressof(self._first) + offset - self._start
        for buffer in buffers:
            write_own_memory(address, bytes(buffer))
            address += len(buffer)
        return sum(map(len, buffers))

    def __enter__(self) -> _Mapped:
        return self

    def __exit__(self, *_: object) -> None:
        del self._first
        self._memory.close()
