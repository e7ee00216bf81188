"""The address space and the stack of a Linux program, by themselves."""

from __future__ import annotations

import errno
import random
import struct

import pytest

from kvmsim.guests.elf import Elf, Segment
from kvmsim.guests.linux.layout import STACK, AddressSpace
from kvmsim.guests.linux.numbers import NAMES
from kvmsim.guests.linux.program import initial_stack
from kvmsim.guests.loading import LoadError
from memfs.contract.units import PAGE_SIZE, Gpa
from tests.helpers import raises

SIZE, END = 16 << 20, 0x40_1234
ELF = Elf(0x40_1000, 0x40_0040, 3, (Segment(0x40_0000, b"", 0x1234),))


class Memory:
    """What has been stored: pages that are not empty."""

    def __init__(self) -> None:
        self.used: set[int] = set()

    async def store(self, gpa: Gpa, data: bytes) -> None:
        assert gpa % PAGE_SIZE == 0
        assert not any(data)
        self.used -= set(range(gpa // PAGE_SIZE, (gpa + len(data)) // PAGE_SIZE))


@pytest.mark.parametrize("seed", range(6))
async def test_what_is_handed_out_is_empty_and_nobody_elses(seed: int) -> None:
    lots, memory, mapped = random.Random(seed), Memory(), dict[int, int]()
    space = AddressSpace(END, SIZE, memory.store)
    heap = await space.brk(0)
    assert heap == 0x40_2000

    def pages(start: int, end: int) -> set[int]:
        return set(range(start // PAGE_SIZE, -(-end // PAGE_SIZE)))

    for _ in range(400):
        others = set().union(*(pages(start, start + size) for start, size in mapped.items()), pages(0x40_2000, heap))
        match lots.randrange(4):
            case 0:
                wanted = 0x40_2000 + lots.randrange(4 << 20)
                before, heap = heap, await space.brk(wanted)
                assert heap in (before, wanted)
                fresh = pages(0x40_2000, heap) - pages(0x40_2000, before)  # the rest of a page stays as it is
            case 1 if mapped:
                start = lots.choice(list(mapped))
                space.unmap(start, mapped.pop(start))
                continue
            case _:
                size = lots.randint(1, 300) * PAGE_SIZE
                try:
                    start = await space.map(size)
                except OSError:
                    with raises(errno.ENOMEM):
                        await space.map(size)
                    continue
                mapped[start] = size
                assert start + size <= SIZE - STACK
                fresh = pages(start, start + size)
        assert not fresh & others, "memory of somebody else"
        assert not fresh & memory.used, "memory that is not empty"
        memory.used |= fresh
    assert mapped


async def test_mapping_that_cannot_be_is_refused() -> None:
    space = AddressSpace(END, SIZE, Memory().store)
    for size, fixed in ((SIZE, None), (PAGE_SIZE, 0x1000), (PAGE_SIZE, SIZE - PAGE_SIZE), (PAGE_SIZE, 0x80_0001)):
        with raises(errno.ENOMEM):
            await space.map(size, fixed)
    for size in (0, 1 << 70):
        with raises(errno.EINVAL, errno.ENOMEM):
            await space.map(size)
    assert await space.map(PAGE_SIZE, 0x80_0000) == 0x80_0000
    space.unmap(0x80_0000, PAGE_SIZE)


def test_program_finds_its_arguments_on_its_stack() -> None:
    rsp, content = initial_stack(ELF, SIZE, ["/bin/sh", "-c", "x"], {"A": "b"})
    assert rsp % 16 == 0
    assert rsp + len(content) <= SIZE

    def string(at: int) -> bytes:
        return content[at - rsp :].split(b"\0", 1)[0]

    count, *pointers = struct.unpack_from("=7Q", content)
    assert count == 3
    assert [string(at) for at in pointers[:3]] == [b"/bin/sh", b"-c", b"x"]
    assert (pointers[3], string(pointers[4]), pointers[5]) == (0, b"A=b", 0)
    vector = dict(struct.iter_unpack("=QQ", content[56 : 56 + 15 * 16]))
    assert (vector[3], vector[5], vector[6], vector[9]) == (0x40_0040, 3, 4096, 0x40_1000)
    assert vector[25] + 16 <= SIZE
    with pytest.raises(LoadError, match="longer than 128 KiB"):
        initial_stack(ELF, SIZE, ["x" * (1 << 18)], {})


def test_calls_have_the_numbers_of_linux() -> None:
    known = {0: "read", 12: "brk", 60: "exit", 231: "exit_group", 257: "openat", 334: "rseq", 437: "openat2"}
    assert {number: NAMES[number] for number in known} == known
