"""Guest memory in mainline's words: guest_memfds, and the attributes that say which pages are private.

A guest_memfd is a guest-sealed file without a name, on the memfs that the service was told of. A page of a memslot is
private if and only if it is allocated there (RFC), so KVM_SET_MEMORY_ATTRIBUTES is a conversion, in one operation for
each slot that the range touches; pages arrive zeroed. For that the service keeps descriptors of both files of a slot.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Final

from kvmsim import ioctls
from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot, Memslots
from kvmsim.vmm.convert import Converter
from kvmsim.vmm.file_calls import FileCalls
from memfs.contract.units import PAGE_SIZE, GfnRange, Gpa, gpa_to_gfn, is_page_aligned

_U64: Final = 1 << 64


def make_guest_memfd(directory: str | None, size: int, flags: int) -> int:
    """Return a descriptor of a new guest-sealed file of so many bytes. Blocking: not for the event loop.

    Raises OSError: EINVAL as KVM_CREATE_GUEST_MEMFD, EOPNOTSUPP if there is no memfs to make it on, or it is none.
    """
    if flags or size <= 0 or not is_page_aligned(size) or size >= 1 << 63:
        raise OSError(errno.EINVAL, "flags, or a size that is 0 or no multiple of a page")
    if directory is None:
        raise OSError(errno.EOPNOTSUPP, "the service was not told of a memfs (kvmsim serve --memfs DIR)")
    path = f"{directory}/.guest_memfd-{os.urandom(16).hex()}"
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        os.setxattr(path, "user.memfs.seals", b"guest")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.unlink(path)
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


@dataclass(frozen=True, slots=True)
class _Files:
    """Descriptors of the files of a slot, and who converts it."""

    fds: tuple[int, ...]  # shared, private
    converter: Converter


class Conversions:
    """The slots of a VM that have private memory, and their files."""

    def __init__(self) -> None:
        self._calls: Final = FileCalls()
        self._files: dict[Memslot, _Files] = {}

    def add(self, slot: Memslot, fds: tuple[int, ...]) -> None:
        """Take notice of a slot with private memory; owns the descriptors from now on."""
        self._files[slot] = _Files(fds, Converter(slot, fds[0], fds[1], PAGE_SIZE, self._calls))

    def drop(self, slot: Memslot) -> tuple[int, ...]:
        """Forget a slot, which may have no private memory. Returns descriptors to be closed."""
        files = self._files.pop(slot, None)
        return () if files is None else files.fds

    async def set_attributes(self, slots: Memslots, gpa: int, size: int, attributes: int, flags: int) -> None:
        """Make a range private or shared (KVM_SET_MEMORY_ATTRIBUTES); one after the other, of several slots.

        Raises OSError: EINVAL, changing nothing, as KVM and for gfns that no slot with private memory has; ENOSPC.
        """
        if flags or attributes & ~ioctls.KVM_MEMORY_ATTRIBUTE_PRIVATE:
            raise OSError(errno.EINVAL, "flags or attributes that there are not")
        if not size or gpa + size >= _U64 or not (is_page_aligned(gpa) and is_page_aligned(size)):
            raise OSError(errno.EINVAL, "a range that is empty, wraps, or is not page-aligned")
        wanted = GfnRange(gpa_to_gfn(Gpa(gpa)), gpa_to_gfn(Gpa(gpa + size)))
        to = Side.PRIVATE if attributes else Side.SHARED
        for slot, part in self._parts(slots, wanted):
            await self._files[slot].converter.convert(slot.pages_of(part), to)

    def _parts(self, slots: Memslots, wanted: GfnRange) -> list[tuple[Memslot, GfnRange]]:
        """Return which gfns of a range lie in which slot. Raises OSError(EINVAL) unless each has private memory."""
        parts, gfn = [], wanted.start
        while gfn < wanted.end:
            slot = slots.find(gfn)
            if slot is None or slot not in self._files:
                raise OSError(errno.EINVAL, "a part of the range is no memory that could be private")
            end = min(slot.gfns.end, wanted.end)
            parts.append((slot, GfnRange(gfn, end)))
            gfn = end
        return parts

    def take_all(self) -> tuple[int, ...]:
        """Forget all slots. Returns descriptors to be closed."""
        files, self._files = self._files, {}
        return tuple(fd for each in files.values() for fd in each.fds)
