"""Numbers of memfs's own ioctl(2) commands, as asm-generic/ioctl.h makes them: type 'M', and the argument's size.

The kernel copies as many bytes as the number says, so a command whose argument may be long has a number for each size.
"""

from __future__ import annotations

from typing import Final

IOC_WRITE: Final = 1  #: the caller's argument is read by memfs
IOC_READ: Final = 2  #: and written
_SIZE_SHIFT: Final = 16
_SIZE_MASK: Final = 0x3FFF << _SIZE_SHIFT


def ioc(direction: int, number: int, size: int) -> int:
    """Return _IOC(direction, 'M', number, size); `size` in bytes."""
    return direction << 30 | size << _SIZE_SHIFT | ord("M") << 8 | number


def without_size(command: int) -> int:
    """Return a command as if its argument had no bytes: one number for those of all sizes."""
    return command & ~_SIZE_MASK
