"""The open handles of one file, as far as the file must know of them: which could be mapped, and which could write.

The kernel does not tell a FUSE server about mmap(2), so every handle that could be mapped counts as a mapping. Handles
that cannot be, since each read and write is a request (Access.DIRECT, tree/open_files.py), are not counted.
"""

from __future__ import annotations


class Opens:
    """The mappable handles of one file, and its backing id while they are in passthrough mode."""

    __slots__ = ("backing_id", "mappable", "writable")

    def __init__(self) -> None:
        self.mappable = 0  #: how many handles there are
        self.writable = 0  #: how many of those can write
        self.backing_id: int | None = None  #: the kernel's number for the backing file; None: not in passthrough mode

    def add(self, *, writable: bool) -> None:
        """Count a handle that was opened."""
        self.mappable += 1
        self.writable += writable

    def remove(self, *, writable: bool) -> int | None:
        """Count a handle that was closed, and with the last one return the backing id, which is not used any more."""
        self.mappable -= 1
        self.writable -= writable
        if self.mappable:
            return None
        unused, self.backing_id = self.backing_id, None
        return unused

    def pass_through(self, backing_id: int | None) -> None:
        """Put the first handle, which is about to be added, into passthrough mode. None: that cannot be had."""
        assert not self.mappable, "passthrough mode begins with the first handle"
        self.backing_id = backing_id
