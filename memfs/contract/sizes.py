"""Sizes as people write them, in tmpfs's spelling: on both command lines and in mount options."""

from __future__ import annotations

import os
import re
from typing import Final

from memfs.contract.units import PAGE_SIZE, pages_to_bytes

#: what a number's last letter multiplies it by
SUFFIXES: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def total_ram() -> int:
    """Return the machine's memory in bytes."""
    return pages_to_bytes(os.sysconf("SC_PHYS_PAGES")) * (os.sysconf("SC_PAGE_SIZE") // PAGE_SIZE)


def parse_size(text: str) -> int:
    """Return a size in bytes, from a number with k, m, g, t, or % of the machine's memory; rounded up to whole pages.

    >>> parse_size("64m")
    67108864

    Raises ValueError, also for 0.
    """
    nbytes = parse_bytes(text)
    if not nbytes:
        raise ValueError("not a size that memory can have")
    return (nbytes + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE


def parse_bytes(text: str) -> int:
    """Return a number of bytes, from text like that of a size. Raises ValueError."""
    match = re.fullmatch(r"(\d+)([kmgt%]?)", text.lower())
    if not match:
        raise ValueError("not a size; give bytes, or a number with k, m, g, t or %")
    number, suffix = int(match[1]), match[2]
    nbytes = total_ram() * number // 100 if suffix == "%" else number * SUFFIXES[suffix]
    if nbytes >= 1 << 62:
        raise ValueError("not a size that memory can have")
    return nbytes
