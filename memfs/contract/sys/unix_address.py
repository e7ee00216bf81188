"""Sockets whose paths are longer than an address may be (unix(7)), reached by a descriptor of their directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

MAX_ADDRESS: Final = 107  #: bytes


@contextmanager
def address_of(path: str) -> Iterator[str]:
    """Yield an address for bind(2) or connect(2) within the block, however long the path is. Raises OSError."""
    if len(os.fsencode(path)) <= MAX_ADDRESS:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
