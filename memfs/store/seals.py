"""Seals: their numbers, their names, and what each forbids.

Numbers are the kernel's (linux/fcntl.h), except for one: the RFC's F_SEAL_GUEST and mainline's later F_SEAL_EXEC are
both 0x0020. memfs keeps the RFC's meaning and gives EXEC a number of its own. Names are what people write and read, in
`setfattr -n user.memfs.seals -v guest`, in `memfs seal` and in a directory's `user.memfs.default_seals`.

What a seal forbids (`_FORBIDDEN`) is what it forbids on a memfd (mm/memfd.c, mm/shmem.c), and GUEST what RFC patch 01
says. When a seal cannot be added is said in `_IN_THE_WAY`.
"""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Iterable
from typing import Final

from memfs.contract.sys.constants import F_SEAL_FUTURE_WRITE
from memfs.contract.sys.ioctl import IOC_READ, IOC_WRITE, ioc
from memfs.contract.units import ByteOffset, page_floor, page_offset

F_SEAL_SEAL: Final = 0x0001
F_SEAL_SHRINK: Final = 0x0002
F_SEAL_GROW: Final = 0x0004
F_SEAL_WRITE: Final = 0x0008
F_SEAL_GUEST: Final = 0x0020
F_SEAL_EXEC: Final = 0x0040  #: memfs's own number

NAMES: Final = {
    "seal": F_SEAL_SEAL,
    "shrink": F_SEAL_SHRINK,
    "grow": F_SEAL_GROW,
    "write": F_SEAL_WRITE,
    "future_write": F_SEAL_FUTURE_WRITE,
    "guest": F_SEAL_GUEST,
    "exec": F_SEAL_EXEC,
}
SUPPORTED: Final = sum(NAMES.values())
_MOST_TEXT: Final = 256  # characters: all names, several times
#: those that say who may change content; the kernel would not ask us if such a file's handles passed through
ON_WRITES: Final = F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_FUTURE_WRITE
#: those that forbid any change of content
NO_WRITES: Final = F_SEAL_WRITE | F_SEAL_FUTURE_WRITE
#: those that a memfd can carry itself, under the same numbers
OF_MEMFD: Final = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_FUTURE_WRITE


class Operation(enum.Enum):
    """What may be done to a file. The value completes the sentence "a file sealed with X cannot"."""

    READ = "be read"
    WRITE = "be written to"
    EXTEND = "be written to or allocated past its end"
    PUNCH = "be punched"
    SHRINK = "become smaller"
    GROW = "become larger"
    SPLIT_PAGE = "have less than a page allocated or freed"
    CHANGE_EXECUTABLE = "be made executable, or not executable"
    ADD_SEALS = "get further seals"


_FORBIDDEN: Final[dict[Operation, dict[int, int]]] = {
    Operation.READ: {F_SEAL_GUEST: errno.EPERM},
    Operation.WRITE: {F_SEAL_GUEST: errno.EPERM, F_SEAL_WRITE: errno.EPERM, F_SEAL_FUTURE_WRITE: errno.EPERM},
    Operation.EXTEND: {F_SEAL_GROW: errno.EPERM},
    Operation.PUNCH: {F_SEAL_WRITE: errno.EPERM, F_SEAL_FUTURE_WRITE: errno.EPERM},
    Operation.SHRINK: {F_SEAL_SHRINK: errno.EPERM},
    Operation.GROW: {F_SEAL_GROW: errno.EPERM},
    Operation.SPLIT_PAGE: {F_SEAL_GUEST: errno.EINVAL},
    Operation.CHANGE_EXECUTABLE: {F_SEAL_EXEC: errno.EPERM},
    Operation.ADD_SEALS: {F_SEAL_SEAL: errno.EPERM},
}


class Obstacle(enum.Enum):
    """Why some seals cannot be added to a file (EBUSY). The value is a sentence."""

    CONTENT = "it is not empty"
    OWNER = "it is registered as shared memory"
    MAPPABLE = "it is open in a way that could be mapped; close it, or open it with access mode 3"
    WRITER = "it is open for writing and may be mapped"
    UNSEEN_WRITER = "it is open for writing in passthrough mode"
    GIVEN_OUT = "an owner was given a descriptor that nobody can take back"


_IN_THE_WAY: Final[dict[Obstacle, int]] = {
    Obstacle.CONTENT: F_SEAL_GUEST,
    Obstacle.OWNER: F_SEAL_GUEST,
    Obstacle.MAPPABLE: F_SEAL_GUEST,
    Obstacle.WRITER: NO_WRITES,  # through a mapping of the page cache
    Obstacle.UNSEEN_WRITER: ON_WRITES,  # the kernel does not ask us
    Obstacle.GIVEN_OUT: NO_WRITES,
}


def check(bits: int, operation: Operation) -> None:
    """Raise the OSError with which a file that has these seals refuses an operation, if it does."""
    if not bits:
        return
    for seal, number in _FORBIDDEN[operation].items():
        if bits & seal:
            raise OSError(number, f"a file sealed with {format_seals(seal)} cannot {operation.value}")


def check_addition(bits: int, added: int, obstacles: Iterable[Obstacle]) -> None:
    """Raise OSError if seals cannot be added to a file that has `bits`; those that it has are not in question.

    EINVAL: not supported. EPERM: sealed against further seals. EBUSY: one of the obstacles is in the way.
    """
    if added & ~SUPPORTED:
        raise OSError(errno.EINVAL, f"seal bits {added & ~SUPPORTED:#x} are not supported")
    check(bits, Operation.ADD_SEALS)
    for obstacle in obstacles:
        refused = added & ~bits & _IN_THE_WAY[obstacle]
        if refused:
            raise OSError(errno.EBUSY, f"cannot be sealed with {format_seals(refused)}: {obstacle.value}")


def writable_length(bits: int, size: ByteOffset, offset: ByteOffset, length: int) -> int:
    """Return how many of `length` bytes can be written at `offset` of a file of `size` bytes.

    As in the kernel, of a write across the end of a file that must not grow whole pages before the end are written.
    Raises OSError(EPERM) if there are none.
    """
    if offset + length <= size:
        return length
    allowed = page_offset(page_floor(size)) - offset
    if allowed <= 0:
        check(bits, Operation.EXTEND)
    return min(length, allowed) if bits & F_SEAL_GROW else length


def parse(text: str) -> int:
    """Return seal bits from names separated by commas, as `format_seals` writes them; the empty string is no seals.

    Raises OSError(EINVAL) for a name that is none, and for more than 256 characters: those of a directory are parsed
    whenever a file is created in it.
    """
    if not text:
        return 0
    if len(text) > _MOST_TEXT:
        raise OSError(errno.EINVAL, f"seals in {len(text)} characters; at most {_MOST_TEXT}")
    bits = 0
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in NAMES:
            raise OSError(errno.EINVAL, f"unknown seal {name!r}; known are {', '.join(NAMES)}")
        bits |= NAMES[name]
    return bits


def format_seals(bits: int) -> str:
    """Return the names of seal bits, separated by commas.

    >>> format_seals(F_SEAL_GUEST | F_SEAL_SEAL)
    'seal,guest'
    """
    return ",".join(name for name, bit in NAMES.items() if bits & bit)


#: ioctl(2) on a memfs file for what fcntl(F_ADD_SEALS) and fcntl(F_GET_SEALS) do on a memfd; both take IOC_ARGUMENT
IOC_ARGUMENT: Final = struct.Struct("=I")
MEMFS_IOC_ADD_SEALS: Final = ioc(IOC_WRITE, 0x40, IOC_ARGUMENT.size)
MEMFS_IOC_GET_SEALS: Final = ioc(IOC_READ, 0x41, IOC_ARGUMENT.size)
