"""The argument of MEMFS_IOC_CONVERT: what can be packed comes out again, and anything else is EINVAL."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from memfs.contract.conversion import (
    MAX_RANGES,
    MEMFS_IOC_CONVERT,
    MEMFS_IOC_GET_KEY,
    Conversion,
    Key,
    convert,
    is_convert,
    key_of,
)
from memfs.contract.page_ranges import PageRanges
from memfs.contract.units import PAGE_SIZE
from memfs.store import seals
from tests.helpers import one, pages, raises


def argument(*numbers: int, key: int = 7, attributes: int = 8, flags: int = 0) -> bytes:
    return struct.pack(f"={3 + len(numbers)}Q", key, attributes, flags, *numbers)


@pytest.mark.parametrize("to_private", [True, False])
@pytest.mark.parametrize("preserve", [True, False])
def test_there_and_back(to_private: bool, preserve: bool) -> None:
    asked = Conversion(Key(7), PageRanges.of([pages(1, 3), pages(5, 6)]), to_private, preserve)
    packed = asked.pack()
    assert Conversion.unpack(packed) == asked
    expected = (PAGE_SIZE, 2 * PAGE_SIZE, 5 * PAGE_SIZE, PAGE_SIZE)
    assert packed == argument(*expected, attributes=8 * to_private, flags=int(preserve))


def test_ranges_in_any_order() -> None:
    asked = Conversion.unpack(argument(8192, 4096, 0, 4096, 4096, 4096))
    assert asked.ranges == PageRanges.of([pages(0, 3)])


@pytest.mark.parametrize(
    "wrong",
    {
        "nothing": b"",
        "no range": argument(),
        "half a range": argument(0),
        "a byte too many": argument(0, 4096) + b"x",
        "unaligned offset": argument(1, 4096),
        "unaligned length": argument(0, 4095),
        "empty": argument(0, 0),
        "overlapping": argument(0, 8192, 4096, 4096),
        "the same twice": argument(0, 4096, 0, 4096),
        "beyond any file": argument(1 << 63, 4096),
        "a length beyond any file": argument(0, 1 << 63),
        "another attribute": argument(0, 4096, attributes=9),
        "an unknown flag": argument(0, 4096, flags=2),
        "too many": argument(*(n * 4096 for at in range(MAX_RANGES + 1) for n in (2 * at, 1))),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_anything_else_is_einval(wrong: tuple[str, bytes]) -> None:
    with raises(errno.EINVAL):
        Conversion.unpack(wrong[1])


def test_commands_are_distinct_whatever_their_size() -> None:
    numbers = {MEMFS_IOC_CONVERT(number) for number in range(MAX_RANGES + 1)}
    assert len(numbers) == MAX_RANGES + 1
    assert all(map(is_convert, numbers))
    others = (MEMFS_IOC_GET_KEY, seals.MEMFS_IOC_ADD_SEALS, seals.MEMFS_IOC_GET_SEALS)
    assert not any(map(is_convert, others))
    assert MEMFS_IOC_CONVERT(1) == 0x40284D43, "_IOW('M', 0x43, 40 bytes), as a C compiler has it"


def test_other_files_know_no_conversions() -> None:
    """And what could not be one is not even asked for."""
    fd = os.memfd_create("other")
    try:
        with raises(errno.ENOTTY):
            key_of(fd)
        with raises(errno.ENOTTY):
            convert(fd, Key(1), [one(0)], to_private=True)
        for wrong in ([one(0), pages(0, 2)], [one(2 * at) for at in range(MAX_RANGES + 1)]):
            with raises(errno.EINVAL):
                convert(fd, Key(1), wrong, to_private=True)
    finally:
        os.close(fd)
