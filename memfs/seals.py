"""Seals: their numbers, their names, and which may be set on a memfs file.

Numbers are the kernel's (linux/fcntl.h; F_SEAL_GUEST from RFC patch 01). Names are what people write and read, in
`setfattr -n user.memfs.seals -v guest`, in `memfs seal` and in a directory's `user.memfs.default_seals`.
"""

from __future__ import annotations

import errno
from typing import Final

F_SEAL_SEAL: Final = 0x0001
F_SEAL_GUEST: Final = 0x0020

NAMES: Final = {"seal": F_SEAL_SEAL, "guest": F_SEAL_GUEST}
SUPPORTED: Final = F_SEAL_SEAL | F_SEAL_GUEST


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
