"""What several commands are told, and say, as people write it. What is none raises argparse.ArgumentTypeError."""

from __future__ import annotations

import argparse
import re

from memfs.contract.sizes import parse_bytes
from memfs.contract.units import PAGE_SIZE, ByteOffset, PageRange, is_page_aligned


def size(text: str) -> int:
    """Return a number of bytes, which may be written with k, m, g, t or %."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def address(text: str) -> tuple[str, int]:
    """Return the parts of ADDRESS:PORT, where the address may be in brackets; that of this machine if it is left out.

    >>> address("[::1]:80"), address(":80")
    (('::1', 80), ('127.0.0.1', 80))
    """
    match = re.fullmatch(r"\[?([^\[\]]*?)\]?:(\d{1,5})", text)
    if not match or int(match[2]) > 65535:
        raise argparse.ArgumentTypeError(f"{text}: not ADDRESS:PORT, such as 127.0.0.1:9753")
    return match[1] or "127.0.0.1", int(match[2])


def listening_at(host: str, port: int) -> str:
    """Return ADDRESS:PORT, as in a URL.

    >>> listening_at("::1", 80), listening_at("127.0.0.1", 80)
    ('[::1]:80', '127.0.0.1:80')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def page_range(text: str) -> PageRange:
    """Return the pages of OFFSET:LENGTH, both in bytes or with k, m, g, t.

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
