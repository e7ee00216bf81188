"""A Linux kernel in guest memory, ready to run by the 64-bit boot protocol (Documentation/arch/x86/boot.rst).

0x7000     boot_params, the "zero page"      0x9000   page tables: 4 GiB, virtual address being gpa
0x8000     GDT                               0x20000  command line
pref_address of the kernel, 16 MiB           the initrd as high as it fits
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from kvmsim.guests.loading import LoadError
from memfs.contract.units import PAGE_SIZE

BOOT_PARAMS: Final = 0x7000
GDT: Final = 0x8000
PML4: Final = 0x9000
COMMAND_LINE: Final = 0x2_0000
CODE, DATA = 0x10, 0x18  #: __BOOT_CS, __BOOT_DS
MAX_MEMORY: Final = 3 << 30  #: bytes; above are the interrupt controllers

_SETUP_HEADER: Final = 0x1F1
_MAGIC: Final = 0x202
_XLOADFLAGS, _XLF_KERNEL_64 = 0x236, 1
_LOWEST_VERSION: Final = 0x20C  # in which there is a 64-bit entry point
_ENTRY_64: Final = 0x200
_LOW_END: Final = 0x9_FC00
_HIGH_START: Final = 1 << 20
_RAM: Final = 1


@dataclass(frozen=True, slots=True)
class BootImage:
    """What goes where in guest memory, and where the kernel starts."""

    pieces: tuple[tuple[int, bytes], ...]  #: by gpa
    entry: int


def boot_image(kernel: bytes, initrd: bytes, command_line: str, memory_size: int) -> BootImage:
    """Return a kernel with its initrd and command line, for guest memory of so many bytes. Raises LoadError."""
    if len(kernel) < 0x268 or kernel[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise LoadError("the kernel is no bzImage")
    version = _u16(kernel, 0x206)
    if version < _LOWEST_VERSION or not _u16(kernel, _XLOADFLAGS) & _XLF_KERNEL_64:
        raise LoadError("the kernel has no 64-bit entry point")
    setup_size = ((kernel[_SETUP_HEADER] or 4) + 1) * 512
    load_at, init_size = struct.unpack_from("=Q", kernel, 0x258)[0], _u32(kernel, 0x260)
    text = command_line.encode() + b"\0"
    if len(text) > min(_u32(kernel, 0x238), 4096):
        raise LoadError("the command line is too long")
    ramdisk = (memory_size - len(initrd)) & -PAGE_SIZE
    if memory_size > MAX_MEMORY:
        raise LoadError(f"guest memory is too large: at most {MAX_MEMORY >> 30} GiB")
    if setup_size >= len(kernel) or load_at < _HIGH_START or load_at + init_size > ramdisk:
        needed = (load_at + init_size + len(initrd) >> 20) + 1
        raise LoadError(f"guest memory is too small: kernel and initrd need {needed} MiB")
    params = bytearray(PAGE_SIZE)
    header_end = 0x202 + kernel[0x201]
    params[_SETUP_HEADER:header_end] = kernel[_SETUP_HEADER:header_end]
    params[0x210] = 0xFF  # type_of_loader: none that is registered
    params[0x211] |= 0x81  # loadflags: loaded high, heap
    struct.pack_into("=II", params, 0x218, ramdisk if initrd else 0, len(initrd))
    struct.pack_into("=I", params, 0x228, COMMAND_LINE)
    regions = [(0, _LOW_END), (_HIGH_START, memory_size - _HIGH_START)]
    params[0x1E8] = len(regions)
    for number, (start, size) in enumerate(regions):
        struct.pack_into("=QQI", params, 0x2D0 + 20 * number, start, size, _RAM)
    pieces = [
        *((BOOT_PARAMS, bytes(params)), (GDT, _gdt()), (PML4, _identity_tables())),
        *((COMMAND_LINE, text), (load_at, kernel[setup_size:]), (ramdisk, initrd)),
    ]
    return BootImage(tuple(pieces), load_at + _ENTRY_64)


def _u16(data: bytes, at: int) -> int:
    return int(struct.unpack_from("=H", data, at)[0])


def _u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from("=I", data, at)[0])


def _gdt() -> bytes:
    return struct.pack("=4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)


def _identity_tables() -> bytes:
    """Return a PML4, a PDPT and four page directories of 2 MiB pages."""
    pdpt = PML4 + PAGE_SIZE
    content = struct.pack("=Q", pdpt | 3).ljust(PAGE_SIZE, b"\0")
    directories = [pdpt + PAGE_SIZE * (1 + number) for number in range(4)]
    content += struct.pack("=4Q", *(each | 3 for each in directories)).ljust(PAGE_SIZE, b"\0")
    return content + struct.pack("=2048Q", *(number << 21 | 0x83 for number in range(2048)))
