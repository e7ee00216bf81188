"""The files of a memslot, by side: what engines for native code map. It must lie on files."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from kvmsim.backing import GuestFile
from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot


def files_of(slot: Memslot) -> Iterator[tuple[Side, GuestFile]]:
    """Generate the files of a slot. Raises OSError(EINVAL) for a classic one."""
    if slot.is_classic:
        raise OSError(errno.EINVAL, f"slot {slot.id} lies on host virtual addresses, and native code needs files")
    for side in (Side.PRIVATE, Side.SHARED):
        file = slot.file(side)
        if file is not None:
            yield side, file
