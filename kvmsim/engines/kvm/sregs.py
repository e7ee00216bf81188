"""Segments and control registers of the real KVM (struct kvm_sregs) for the state that user_mode.py describes."""

from __future__ import annotations

import struct
from typing import Final

from kvmsim.engines.user_mode import (
    GDT,
    GDT_LIMIT,
    IDT,
    IDT_LIMIT,
    PML4,
    STAR,
    SYSCALL_ENTRY,
    TSS,
    TSS_LIMIT,
    TSS_SELECTOR,
    USER_CODE,
    USER_DATA,
)

_SEGMENT: Final = struct.Struct("=QIHBBBBBBBBBB")  # struct kvm_segment
_ORDER: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_TABLES: Final = len(_ORDER) * _SEGMENT.size  # gdt, idt: base, limit
_CONTROL: Final = _TABLES + 2 * 16  # cr0, cr2, cr3, cr4, cr8, efer

_CR0: Final = 0x80050033  # PG, AM, WP, NE, ET, MP, PE
_CR4: Final = 0x620  # PAE, OSFXSR, OSXMMEXCPT
_CR4_OSXSAVE: Final = 1 << 18
_EFER: Final = 0x501  # LMA, LME, SCE

#: MSR_STAR, MSR_LSTAR, MSR_SYSCALL_MASK
MSRS: Final = {0xC0000081: STAR, 0xC0000082: SYSCALL_ENTRY, 0xC0000084: 0}


def segment(selector: int, kind: int, *, level: int = 3, long_mode: bool = False, system: bool = False) -> bytes:
    """Return a flat segment of a descriptor type (`kind`: 3 data, 11 code, or of a system segment 11 a busy TSS)."""
    limit = TSS_LIMIT if system else 0xFFFFFFFF
    base = TSS if system else 0
    is_32_bit = not long_mode and not system
    return _SEGMENT.pack(
        *(base, limit, selector, kind, 1, level, is_32_bit, not system, long_mode, not system, 0, 0, 0)
    )


def user_mode(sregs: bytearray, *, has_xsave: bool) -> bytearray:
    """Return struct kvm_sregs of a vCPU at CPL 3, given what it was."""
    data = segment(USER_DATA, 3)
    unusable = _SEGMENT.pack(*(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0))
    by_name = {
        "cs": segment(USER_CODE, 11, long_mode=True),
        "fs": segment(0, 3),  # a null selector, and a base all the same
        "gs": segment(0, 3),
        "tr": segment(TSS_SELECTOR, 11, level=0, system=True),
        "ldt": unusable,
    }
    sregs[:_TABLES] = b"".join(by_name.get(name, data) for name in _ORDER)
    struct.pack_into("=QH6xQH6x", sregs, _TABLES, GDT, GDT_LIMIT, IDT, IDT_LIMIT)
    cr4 = _CR4 | (_CR4_OSXSAVE if has_xsave else 0)
    struct.pack_into("=QQQQQQ", sregs, _CONTROL, _CR0, 0, PML4, cr4, 0, _EFER)
    return sregs


def boot_mode(sregs: bytearray, *, page_table: int, gdt: int, code: int, data: int) -> bytearray:
    """Return struct kvm_sregs of a vCPU that starts a kernel in long mode, at CPL 0, given its tables and selectors."""
    flat = segment(data, 3, level=0)
    sregs[: 6 * _SEGMENT.size] = segment(code, 11, level=0, long_mode=True) + flat * 5
    struct.pack_into("=QH6x", sregs, _TABLES, gdt, data + 7)
    struct.pack_into("=QQQQQQ", sregs, _CONTROL, _CR0, 0, page_table, 0x20, 0, _EFER & ~1)
    return sregs


def with_fs_base(sregs: bytearray, address: int) -> bytearray:
    """Return the same with another base of FS."""
    struct.pack_into("=Q", sregs, _ORDER.index("fs") * _SEGMENT.size, address)
    return sregs


def cr2(sregs: bytearray) -> int:
    """Return the address that the last page fault was about."""
    return int(struct.unpack_from("=Q", sregs, _CONTROL + 8)[0])
