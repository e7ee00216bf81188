"""What a guest of native code finds itself in: long mode, at CPL 3, with page tables that never change.

Its first 128 KiB of private memory hold tables that the processor reads, and a few instructions at CPL 0. Virtual
addresses are two windows on guest physical memory: from 0 on all of it as private memory, from `SHARED_WINDOW` on all
of it as shared memory, that is, with the shared bit in the page table entries. Nothing is at address 0.

CPL 3 is where all kinds of KVM run native code at full speed (where KVM is PVM, CPL 0 is emulated, an instruction at a
time). The guest may use `in` and `out`: by IOPL, and by the I/O bitmap of its TSS, which is all that PVM looks at.

    syscall      out PORT_SYSCALL, so that the VMM answers with registers; then iretq, since PVM refuses sysretq
    exceptions   out PORT_EXCEPTION: nothing comes back; what happened is on the stack (`exception_at`)
"""

from __future__ import annotations

import struct
from typing import Final

from kvmsim.side import Side
from memfs.contract.units import PAGE_SIZE, Gpa

PORT_SYSCALL: Final = 0x4C
PORT_EXCEPTION: Final = 0x4D
EXCEPTION_SIZE: Final = 24  #: bytes

SHARED_WINDOW: Final = 1 << 40  #: virtual address of shared memory of gpa 0
USER_START: Final = 0x2_0000  #: guest memory below is what this module describes

PML4: Final = 0x1000
_PDPT_PRIVATE, _PDPT_SHARED, _PAGE_TABLE = 0x2000, 0x3000, 0x4000
GDT: Final = 0x5000
IDT: Final = 0x6000
_STUBS: Final = 0x7000
STUBS_END: Final = _STUBS + PAGE_SIZE
TSS: Final = 0x8000
_STACK_TOP: Final = 0xC000
_SAVED_RSP: Final = _STACK_TOP - PAGE_SIZE
_DIRECTORIES: Final = 0xC000

#: PVM runs what follows a syscall with the rights of CPL 3; what is in these pages is no secret, nor of harm to others
_USER_PAGES: Final = (_STUBS, _SAVED_RSP)

SYSCALL_ENTRY: Final = _STUBS
_EXCEPTION_STUBS: Final = _STUBS + 0x100
_STUB_SIZE: Final = 16
_VECTORS: Final = 32
_WITH_ERROR_CODE: Final = {8, 10, 11, 12, 13, 14, 17, 21, 29, 30}

KERNEL_CODE, KERNEL_DATA, USER_DATA, USER_CODE, TSS_SELECTOR = 0x10, 0x18, 0x2B, 0x33, 0x38
_GDT: Final = {
    KERNEL_CODE: 0x00AF9B000000FFFF,
    KERNEL_DATA: 0x00CF93000000FFFF,
    USER_DATA & ~3: 0x00CFF3000000FFFF,
    USER_CODE & ~3: 0x00AFFB000000FFFF,
}
GDT_LIMIT: Final = TSS_SELECTOR + 16 - 1
IDT_LIMIT: Final = _VECTORS * 16 - 1
_BITMAP: Final = 104  # offset in the TSS, of one bit a port
TSS_LIMIT: Final = _BITMAP + 0x10000 // 8
#: which segments syscall and sysret load (MSR_STAR)
STAR: Final = (USER_DATA - 8) << 48 | KERNEL_CODE << 32

_GIB: Final = 1 << 30
_2M: Final = 1 << 21
MAX_MEMORY: Final = (USER_START - _DIRECTORIES) // PAGE_SIZE // 2 * _GIB  #: bytes
#: present, writable, accessed and dirty already, so that no walk has to store
_TABLE_FLAGS: Final = 0x63
_USER: Final = 0x4
_LARGE: Final = 0x80


def tables(memory_size: int, shared_bit: int) -> bytes:
    """Return what guest memory of so many bytes begins with, USER_START bytes.

    `shared_bit`: its mask. Raises ValueError for more memory than fits into these tables.
    """
    if not USER_START < memory_size <= MAX_MEMORY:
        raise ValueError(f"guest memory is more than {USER_START >> 10} KiB and at most {MAX_MEMORY >> 30} GiB")
    content = bytearray(USER_START)
    gibibytes = -(-memory_size // _GIB)
    for window, (pdpt, bit) in enumerate(((_PDPT_PRIVATE, 0), (_PDPT_SHARED, shared_bit))):
        _put(content, PML4 + (SHARED_WINDOW >> 39) * 8 * window, pdpt | _TABLE_FLAGS | _USER)
        for number in range(gibibytes):
            directory = _DIRECTORIES + (window * gibibytes + number) * PAGE_SIZE
            _put(content, pdpt + number * 8, directory | _TABLE_FLAGS | _USER)
            for index in range(512):
                gpa = number * _GIB + index * _2M
                if gpa < memory_size:
                    _put(content, directory + index * 8, gpa | bit | _TABLE_FLAGS | _USER | _LARGE)
    _put(content, _DIRECTORIES, _PAGE_TABLE | _TABLE_FLAGS | _USER)
    for page in range(1, 512):
        user = _USER if page * PAGE_SIZE >= USER_START or page * PAGE_SIZE in _USER_PAGES else 0
        _put(content, _PAGE_TABLE + page * 8, page * PAGE_SIZE | _TABLE_FLAGS | user)
    for selector, descriptor in _GDT.items():
        _put(content, GDT + selector, descriptor)
    content[GDT + TSS_SELECTOR : GDT + TSS_SELECTOR + 16] = struct.pack(
        "=HHBBBBII", TSS_LIMIT, TSS & 0xFFFF, TSS >> 16, 0x8B, 0, 0, 0, 0
    )
    struct.pack_into("=Q", content, TSS + 4, _STACK_TOP)
    struct.pack_into("=H", content, TSS + 102, _BITMAP)
    content[TSS + TSS_LIMIT] = 0xFF  # all ports are allowed, and this byte ends the bitmap
    content[SYSCALL_ENTRY : SYSCALL_ENTRY + len(_SYSCALL)] = _SYSCALL
    for vector in range(_VECTORS):
        stub = _EXCEPTION_STUBS + vector * _STUB_SIZE
        code = b"" if vector in _WITH_ERROR_CODE else b"\x6a\x00"  # push 0
        code += bytes((0x6A, vector, 0xE6, PORT_EXCEPTION, 0xEB, 0xFE))  # push vector; out; jmp .
        content[stub : stub + len(code)] = code
        gate = struct.pack("=HHBBHII", stub & 0xFFFF, KERNEL_CODE, 0, 0xEE, stub >> 16, 0, 0)
        content[IDT + vector * 16 : IDT + vector * 16 + 16] = gate
    return bytes(content)


def _put(content: bytearray, at: int, value: int) -> None:
    struct.pack_into("=Q", content, at, value)


#: out PORT_SYSCALL, al; mov [_SAVED_RSP], rsp; mov rsp, _STACK_TOP; push USER_DATA; push [_SAVED_RSP]; push r11;
#: push USER_CODE; push rcx; iretq
_SYSCALL: Final = (
    bytes((0xE6, PORT_SYSCALL))
    + struct.pack("=4sI", b"\x48\x89\x24\x25", _SAVED_RSP)
    + struct.pack("=3sI", b"\x48\xc7\xc4", _STACK_TOP)
    + bytes((0x6A, USER_DATA))
    + struct.pack("=3sI", b"\xff\x34\x25", _SAVED_RSP)
    + bytes((0x41, 0x53, 0x6A, USER_CODE, 0x51, 0x48, 0xCF))
)


def exception_at(stack: bytes) -> tuple[int, int]:
    """Return vector and rip of an exception, given what lies on the stack when it is reported: EXCEPTION_SIZE bytes."""
    vector, _, rip = struct.unpack_from("=3Q", stack)
    return vector, rip


def leads_to(address: int, memory_size: int) -> tuple[Gpa, Side] | None:
    """Return which memory a virtual address is of, by tables for so many bytes of it. None: a page fault at CPL 3.

    What an engine needs that does not walk these tables itself.
    """
    side = Side.of(address < SHARED_WINDOW)
    gpa = address if side is Side.PRIVATE else address - SHARED_WINDOW
    is_mapped = gpa < -(-memory_size // _2M) * _2M and (side is Side.SHARED or gpa >= USER_START)
    return (Gpa(gpa), side) if is_mapped else None
