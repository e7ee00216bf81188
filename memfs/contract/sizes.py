"""Sizes as people write them, in tmpfs's spelling: on both command lines and in mount options."""

from __future__ import annotations

import os
import re
from typing import Final

from memfs.contract.units import PAGE_SIZE, pages_to_bytes

#: what a number's last letter multiplies it by
_SUFFIXES: Final = {letter: 1 << 10 * power for power, letter in enumerate(("", *"kmgtpe"))}


def total_ram() -> int:
    """Return the machine's memory in bytes."""
    return pages_to_bytes(os.sysconf("SC_PHYS_PAGES")) * (os.sysconf("SC_PAGE_SIZE") // PAGE_SIZE)


def parse_size(text: str, whole: int | None = None) -> int:
    """Return a size in bytes, from a number with k, m, g, t, or % of `whole`; rounded up to whole pages.

    >>> parse_size("64m")
    67108864

    `whole` is in bytes; None is the machine's memory. Raises ValueError, also for 0.
    """
    nbytes = parse_bytes(text, whole)
    if not nbytes:
        raise ValueError("not a size that memory can have")
    return (nbytes + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE


def parse_number(text: str) -> int:
    """Return a number as the kernel reads it (kstrtouint(), base 0): 0x is hexadecimal, a leading 0 octal.

    >>> parse_number("0x10"), parse_number("010"), parse_number("10")
    (16, 8, 10)

    Raises ValueError.
    """
    match = re.fullmatch(r"(0x(?=[0-9a-f])|0(?=.))?([0-9a-f]+)", text.lower(), re.ASCII)
    if not match:
        raise ValueError("not a number")
    return int(match[2], {None: 10, "0": 8, "0x": 16}[match[1]])


def parse_count(text: str) -> int:
    """Return a number, which may have k, m, g, t, p or e, as the kernel reads it (memparse()). Raises ValueError."""
    # The letter e may be a digit.
    number, suffix = text.lower(), ""
    if number[-1:] in _SUFFIXES and not (number[-1:] == "e" and number.startswith("0x")):
        number, suffix = number[:-1], number[-1:]
    return parse_number(number) * _SUFFIXES[suffix]


def parse_bytes(text: str, whole: int | None = None) -> int:
    """Return a number of bytes, from text like that of a size. Raises ValueError."""
    try:
        if text.endswith("%"):
            nbytes = (total_ram() if whole is None else whole) * parse_number(text[:-1]) // 100
        else:
            nbytes = parse_count(text)
    except ValueError:
        raise ValueError("not a size; give bytes, or a number with k, m, g, t or %") from None
    if nbytes >= 1 << 62:
        raise ValueError("not a size that memory can have")
    return nbytes


def format_size(nbytes: int) -> str:
    """Return a size as people write it, exactly.

    >>> format_size(2 << 20), format_size(5000)
    ('2M', '5000')
    """
    power = max(power for power in range(len("kmgt") + 1) if nbytes % (1 << 10 * power) == 0) if nbytes else 0
    return f"{nbytes >> 10 * power}{('', *'KMGT')[power]}"


def shown_bytes(nbytes: int) -> str:
    """Return a number of bytes as people read it in a table, in three digits or four, as df -h does.

    >>> [shown_bytes(each) for each in (0, 4096, 3 << 29, 1 << 40, 1 << 70)]
    ['0', '4.0K', '1.5G', '1.0T', '1024E']
    """
    power = min(len("KMGTPE"), max(0, (nbytes.bit_length() - 1) // 10))
    if not power:
        return str(nbytes)
    number = nbytes / (1 << 10 * power)
    return f"{number:.1f}{'KMGTPE'[power - 1]}" if number < 99.95 else f"{number:.0f}{'KMGTPE'[power - 1]}"
