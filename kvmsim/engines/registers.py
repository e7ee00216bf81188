"""The general registers of an x86-64 vCPU, in the order of struct kvm_regs."""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import ClassVar, Final

#: What RFLAGS is to begin with: bit 1, which is always set, and IOPL 3, so that `in` and `out` are allowed at CPL 3
USER_FLAGS: Final = 0x3002


@dataclass(slots=True)
class Registers:
    """General registers, as unsigned 64-bit numbers."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = USER_FLAGS

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=18Q")  #: struct kvm_regs

    def pack(self) -> bytes:
        """Return struct kvm_regs."""
        return self.LAYOUT.pack(*(getattr(self, each.name) for each in fields(self)))

    @classmethod
    def unpack(cls, data: bytes) -> Registers:
        """Return what struct kvm_regs holds."""
        return cls(*cls.LAYOUT.unpack(data))

    def __str__(self) -> str:
        """Return the registers that say where a guest is, for a sentence about it."""
        return f"rip {self.rip:#x}, rsp {self.rsp:#x}, rax {self.rax:#x}, rflags {self.rflags:#x}"
