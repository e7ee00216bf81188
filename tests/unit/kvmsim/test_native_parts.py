"""What guests of native code are made of: the processor's tables, ELF files, and what each refuses."""

from __future__ import annotations

import struct
from importlib.resources import files

import pytest

from kvmsim.engines.registers import Registers
from kvmsim.engines.user_mode import MAX_MEMORY, PML4, SHARED_WINDOW, USER_START, leads_to, tables
from kvmsim.guests.elf import Elf, ElfError, Segment
from kvmsim.guests.loading import LoadError, check_size
from kvmsim.side import Side

SELFTEST = files("kvmsim").joinpath("guests/selftest.elf").read_bytes()
BIT = 1 << 47


def walk(content: bytes, address: int) -> int | None:
    """Return the gpa that a virtual address leads to, as a processor finds it; None: not present."""
    table = PML4
    for shift in (39, 30, 21, 12):
        (entry,) = struct.unpack_from("=Q", content, table + ((address >> shift) & 511) * 8)
        if not entry & 1:
            return None
        target = entry & ((1 << 52) - 1) & ~0xFFF
        if shift == 12 or entry & 0x80:
            return int(target) | (address & ((1 << shift) - 1))
        table = target
    raise AssertionError


@pytest.mark.parametrize("size", [8 << 20, 3 << 30, MAX_MEMORY])
def test_tables_lead_to_all_memory_on_both_sides_and_nowhere_else(size: int) -> None:
    content = tables(size, BIT)
    assert len(content) == USER_START
    for gpa in (0x1234, USER_START, (2 << 20) + 5, size // 2 + 7, size - 1):
        assert walk(content, gpa) == gpa
        assert walk(content, SHARED_WINDOW + gpa) == gpa | BIT
    for nowhere in (0, 0xFFF, size, SHARED_WINDOW + size, 1 << 46):
        assert walk(content, nowhere) is None


@pytest.mark.parametrize("size", [8 << 20, (5 << 20) + 4096, 3 << 30])
def test_arithmetic_leads_where_the_tables_lead(size: int) -> None:
    content = tables(size, BIT)
    for base in (0, SHARED_WINDOW, 1 << 46):
        for gpa in (USER_START, USER_START + 5, 2 << 20, size - 1, size, (size | (1 << 21) - 1) + 1, size * 2):
            found = leads_to(base + gpa, size)
            assert (found and found[0] | (BIT if found[1] is Side.SHARED else 0)) == walk(content, base + gpa)
    assert leads_to(USER_START - 1, size) is None


def test_user_code_does_not_reach_the_tables() -> None:
    content = tables(8 << 20, BIT)
    page_table = struct.unpack_from("=512Q", content, 0x4000)
    allowed = {7, 11}  # what syscall does, and its stack
    assert [page for page, entry in enumerate(page_table) if not entry & 1] == [0]
    assert {page for page, entry in enumerate(page_table) if entry & 5 == 5} == {*range(32, 512), *allowed}


@pytest.mark.parametrize("size", [0, USER_START, MAX_MEMORY + 1])
def test_tables_for_too_little_or_too_much_memory_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="guest memory is more than 128 KiB and at most"):
        tables(size, BIT)


def test_registers_are_in_the_order_of_kvm() -> None:
    registers = Registers(rax=1, rsi=5, rip=17)
    assert struct.unpack("=18Q", registers.pack()) == (1, 0, 0, 0, 5, *(0,) * 11, 17, 0x3002)
    assert Registers.unpack(registers.pack()) == registers


def test_test_guest_is_a_static_program() -> None:
    elf = Elf.parse(SELFTEST)
    assert elf.start == 0x40_0000
    assert elf.start <= elf.entry < elf.end
    assert elf.header_count >= 2
    assert elf.segments[0].data == SELFTEST[: len(elf.segments[0].data)]


def patched(offset: int, value: bytes) -> bytes:
    return SELFTEST[:offset] + value + SELFTEST[offset + len(value) :]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not an ELF"),
        (b"#!/bin/sh\n" * 10, "not an ELF"),
        (SELFTEST[:60], "not an ELF"),
        (SELFTEST[:100], "truncated"),
        (SELFTEST[:2000], "truncated"),
        (patched(4, b"\x01"), "not for x86-64"),
        (patched(18, b"\xb7\x00"), "not for x86-64"),
        (patched(16, b"\x01\x00"), "not a program"),
        (patched(56, b"\x00\x00"), "not a program"),
        (patched(32, b"\xff" * 8), "truncated"),
        (patched(64, b"\x03\x00\x00\x00"), "dynamically linked"),
        (patched(64 + 32, b"\xff" * 8), "truncated"),
        (patched(64 + 40, b"\x01" + bytes(7)), "truncated"),
        (patched(64 + 16, b"\xff" * 8), "no address"),
    ],
)
def test_other_files_are_refused_with_the_reason(data: bytes, why: str) -> None:
    with pytest.raises(ElfError, match=why):
        Elf.parse(data)


def test_position_independent_program_is_put_where_one_can_be() -> None:
    elf = Elf.parse(patched(16, b"\x03\x00"))
    assert elf.entry == Elf.parse(SELFTEST).entry + 0x40_0000


def test_program_must_fit_into_memory() -> None:
    def program(address: int, size: int) -> Elf:
        return Elf(address, 0, 0, (Segment(address, b"", size),))

    check_size(program(0x40_0000, 4096), 8 << 20, 1 << 20)
    with pytest.raises(LoadError, match="needs 6 MiB"):
        check_size(program(0x40_0000, 4096), 4 << 20, 1 << 20)
    with pytest.raises(LoadError, match="where the processor's tables are"):
        check_size(program(0x1000, 4096), 8 << 20, 1 << 20)
    with pytest.raises(LoadError, match="at most"):
        check_size(program(0x40_0000, 4096), MAX_MEMORY + 1, 1 << 20)
