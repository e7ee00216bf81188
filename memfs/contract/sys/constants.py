"""Constants of Linux that Python's modules lack, and that belong to no system call in libc.py."""

from __future__ import annotations

from typing import Final

F_SEAL_FUTURE_WRITE: Final = 0x0010  #: linux/fcntl.h
XATTR_NAME_MAX: Final = 255  #: bytes; linux/limits.h
XATTR_SIZE_MAX: Final = 65536  #: bytes; linux/limits.h
