"""What the structures of calls say, as far as that takes more than to unpack them."""

from __future__ import annotations

import errno
from typing import Any

from kvmsim import ioctls
from kvmsim.service.wire import Call
from kvmsim.uapi import KVM_MEM_FD, UserspaceMemoryRegion
from memfs.contract.units import ByteOffset, Gpa


def region_of(call: Call, fds: tuple[int, ...]) -> UserspaceMemoryRegion:
    """Return the region of a call, with descriptors of this process. Raises OSError(EINVAL)."""
    if len(call.payload) == ioctls.REGION_MAPPED.size:
        slot, flags, gpa, size, _, offset = ioctls.REGION_MAPPED.unpack(call.payload)
        flags, named, private = flags | KVM_MEM_FD, [1], -1
    elif len(call.payload) == ioctls.REGION_EXT.size:
        slot, flags, gpa, size, offset, fd, private = ioctls.REGION_EXT.unpack(call.payload)
        named = [fd, private]
    else:
        slot, flags, gpa, size, offset = unpack(ioctls.REGION, call)
        if size:
            raise OSError(errno.EINVAL, "memory of the VMM's own cannot be reached: map a file, and say which")
        return UserspaceMemoryRegion(slot, flags & ~KVM_MEM_FD, Gpa(gpa), 0, ByteOffset(0))
    if len(fds) != sum(number >= 0 for number in named) or (private >= 0 and len(fds) != 2):
        raise OSError(errno.EBADF, "descriptors that are named have not come, or others have")
    return UserspaceMemoryRegion(
        *(slot, flags, Gpa(gpa), size, ByteOffset(offset)),
        fd=fds[0] if fds else -1,
        private_fd=fds[1] if private >= 0 else -1,
    )


def unpack(layout: Any, call: Call, *, exact: bool = True) -> tuple[int, ...]:
    """Return the fields of a call's structure; unless `exact`, more may follow. Raises OSError(EINVAL) for its size."""
    if len(call.payload) < layout.size or (exact and len(call.payload) != layout.size):
        raise OSError(errno.EINVAL, f"a structure of {layout.size} bytes is expected")
    values: tuple[int, ...] = layout.unpack_from(call.payload)
    return values


def region2_of(call: Call, fds: tuple[int, ...]) -> UserspaceMemoryRegion:
    """Return the region of KVM_SET_USER_MEMORY_REGION2, with descriptors of ours. Raises OSError(EINVAL, EBADF).

    A slot lies at one offset in both files here, so mainline's two must be the same.
    """
    if len(call.payload) == ioctls.REGION2.size:
        slot, flags, gpa, size, *_ = unpack(ioctls.REGION2, call)
        if size:
            raise OSError(errno.EINVAL, "memory of the VMM's own cannot be reached: map a file, and say which")
        return UserspaceMemoryRegion(slot, flags & ~KVM_MEM_FD, Gpa(gpa), 0, ByteOffset(0))
    slot, flags, gpa, size, _, private_offset, private, offset = unpack(ioctls.REGION2_MAPPED, call)
    has_private = bool(flags & ioctls.KVM_MEM_GUEST_MEMFD)
    if len(fds) != 1 + has_private or (has_private and private < 0):
        raise OSError(errno.EBADF, "descriptors that are named have not come, or others have")
    if has_private and private_offset != offset:
        raise OSError(errno.EINVAL, "guest_memfd_offset is not the offset of what is mapped at userspace_addr")
    return UserspaceMemoryRegion(
        *(slot, flags | KVM_MEM_FD, Gpa(gpa), size, ByteOffset(offset)),
        fd=fds[0],
        private_fd=fds[1] if has_private else -1,
    )
