"""Seals: their numbers, their names, and what each forbids.

Numbers are the kernel's (linux/fcntl.h), except for one: the RFC's F_SEAL_GUEST and mainline's later F_SEAL_EXEC are
both 0x0020. memfs keeps the RFC's meaning and gives EXEC a number of its own. Names are what people write and read, in
`setfattr -n user.memfs.seals -v guest`, in `memfs seal` and in a directory's `user.memfs.default_seals`.

What a seal forbids is what it forbids on a memfd (mm/memfd.c, mm/shmem.c):

    SHRINK               truncate to a smaller size
    GROW                 truncate to a larger size; write or allocate past the end
    WRITE, FUTURE_WRITE  write; punch
    EXEC                 chmod that changes who may execute
    SEAL                 adding seals
"""

from __future__ import annotations

import errno
from typing import Final

F_SEAL_SEAL: Final = 0x0001
F_SEAL_SHRINK: Final = 0x0002
F_SEAL_GROW: Final = 0x0004
F_SEAL_WRITE: Final = 0x0008
F_SEAL_FUTURE_WRITE: Final = 0x0010
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
#: those that say who may change content; the kernel would not ask us if such a file's handles passed through
ON_WRITES: Final = F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_FUTURE_WRITE
#: those that forbid any change of content
NO_WRITES: Final = F_SEAL_WRITE | F_SEAL_FUTURE_WRITE
#: those that a memfd can carry itself, under the same numbers
OF_MEMFD: Final = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_FUTURE_WRITE


def parse(text: str) -> int:
    """Seal bits from names separated by commas, as `format_seals` writes them; the empty string is no seals.

    Raises OSError(EINVAL) for a name that is none.
    """
    bits = 0
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in NAMES:
            raise OSError(errno.EINVAL, f"unknown seal {name!r}; known are {', '.join(NAMES)}")
        bits |= NAMES[name]
    return bits


def format_seals(bits: int) -> str:
    """The names of seal bits, separated by commas.

    >>> format_seals(F_SEAL_GUEST | F_SEAL_SEAL)
    'seal,guest'
    """
    return ",".join(name for name, bit in NAMES.items() if bits & bit)


def _ioc(direction: int, number: int) -> int:
    """_IOC of asm-generic/ioctl.h for memfs's type 'M' and a u32 argument."""
    return direction << 30 | 4 << 16 | ord("M") << 8 | number


#: ioctl(2) on a memfs file for what fcntl(F_ADD_SEALS) and fcntl(F_GET_SEALS) do on a memfd; both take a u32
MEMFS_IOC_ADD_SEALS: Final = _ioc(1, 0x40)
MEMFS_IOC_GET_SEALS: Final = _ioc(2, 0x41)
