"""Ranges of memory as people write them."""

from __future__ import annotations

import argparse

from memfs.contract.sizes import parse_bytes
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageRange, is_page_aligned


def page_range(text: str) -> PageRange:
    """Return the pages of OFFSET:LENGTH, both in bytes or with k, m, g, t. Raises argparse.ArgumentTypeError.

    >>> page_range("1m:8k")
    PageRange(start=256, end=258)
    """
    offset, colon, length = text.partition(":")
    try:
        if not colon:
            raise ValueError("not OFFSET:LENGTH")
        start, nbytes = parse_bytes(offset), parse_bytes(length)
        if not (is_page_aligned(start | nbytes) and nbytes):
            raise ValueError(f"not whole pages: multiples of {PAGE_SIZE} bytes, at least one")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return PageRange.covering(ByteOffset(start), nbytes)
