"""Static x86-64 programs in ELF: what of the file goes where in memory.

Everything in a file is what somebody has written there; each number is checked before it is used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

_HEADER: Final = struct.Struct("=4sBBBB8xHHIQQQIHHHHHH")  # Elf64_Ehdr
_PROGRAM_HEADER: Final = struct.Struct("=IIQQQQQQ")  # Elf64_Phdr
_ELFCLASS64, _ELFDATA2LSB = 2, 1
_ET_EXEC, _ET_DYN = 2, 3
_EM_X86_64: Final = 62
_PT_LOAD, _PT_INTERP, _PT_PHDR = 1, 3, 6
_MOST_HEADERS: Final = 256
_PIE_BASE: Final = 0x40_0000
_ADDRESS_END: Final = 1 << 47


class ElfError(Exception):
    """Why a file is no program that can be a guest: one sentence, without the file's name."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the program: `data` lies at `address`, and zeros up to `size` bytes."""

    address: int
    data: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Elf:
    """A static program for x86-64."""

    entry: int  #: address
    headers: int  #: address of its program headers
    header_count: int
    segments: tuple[Segment, ...]

    @property
    def start(self) -> int:
        """The lowest address."""
        return min(segment.address for segment in self.segments)

    @property
    def end(self) -> int:
        """The first address behind all segments."""
        return max(segment.address + segment.size for segment in self.segments)

    @classmethod
    def parse(cls, data: bytes) -> Elf:
        """Return the program that a file holds. A position-independent one is put at 4 MiB. Raises ElfError."""
        if len(data) < _HEADER.size or data[:4] != b"\x7fELF":
            raise ElfError("it is not an ELF file")
        header = _HEADER.unpack_from(data)
        _, bits, order, _, _, kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, _, _, _ = header
        if (bits, order, machine) != (_ELFCLASS64, _ELFDATA2LSB, _EM_X86_64):
            raise ElfError("it is not for x86-64")
        if kind not in (_ET_EXEC, _ET_DYN) or phentsize != _PROGRAM_HEADER.size or not 0 < phnum <= _MOST_HEADERS:
            raise ElfError("it is not a program")
        if phoff + phnum * phentsize > len(data):
            raise ElfError("it is truncated")
        headers = [_PROGRAM_HEADER.unpack_from(data, phoff + number * phentsize) for number in range(phnum)]
        if any(each[0] == _PT_INTERP for each in headers):
            raise ElfError("it is dynamically linked; a guest has no loader, so link it with -static")
        base = _PIE_BASE if kind == _ET_DYN else 0
        segments = []
        for each, _, offset, address, _, filesz, memsz, _ in headers:
            if each != _PT_LOAD or not memsz:
                continue
            if filesz > memsz or offset + filesz > len(data):
                raise ElfError("it is truncated")
            if base + address + memsz > _ADDRESS_END:
                raise ElfError(f"it is to be loaded at {base + address:#x}, which is no address of a program")
            segments.append(Segment(base + address, data[offset : offset + filesz], memsz))
        if not segments:
            raise ElfError("it has nothing to load")
        return cls(base + entry, base + _address_of(headers, phoff), phnum, tuple(segments))


def _address_of(headers: list[tuple[int, ...]], phoff: int) -> int:
    """Return the address at which the program headers come to lie; 0 if they are not loaded."""
    for kind, _, offset, address, _, filesz, _, _ in headers:
        if kind == _PT_PHDR or (kind == _PT_LOAD and offset <= phoff < offset + filesz):
            return address + phoff - offset
    return 0
