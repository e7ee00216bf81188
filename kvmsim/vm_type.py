"""How a guest says that it means private memory: the one thing in which confidential VMs differ here.

default     not at all; such a VM has no private memory
TDX         by an address bit: with the shared bit of the gpa clear, an access is private. It is the highest address
            bit that the guest has (47 of 48, 51 of 52), and no part of the gfn
SNP         by the C-bit of the guest's own page tables, which the processor takes off before KVM sees the gpa: an
            attribute of the access
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import ClassVar, Final

from kvmsim.side import Side
from kvmsim.uapi import KVM_MAX_GPA
from memfs.contract.units import Gpa

_LEAST_BITS: Final = 32  # of a processor's addresses (CPUID 8000_0008)


@dataclass(frozen=True, slots=True)
class VmType:
    """A kind of VM: `DEFAULT`, `SNP`, or of those with a shared bit `TDX_48`, `TDX_52` and others (`address_bits`)."""

    name: str
    shared_bit: int = 0  #: its mask; 0 if there is none

    DEFAULT: ClassVar[VmType]
    SNP: ClassVar[VmType]
    TDX_48: ClassVar[VmType]
    TDX_52: ClassVar[VmType]

    @classmethod
    def address_bits(cls, bits: int) -> VmType:
        """Return the type of a guest with so many address bits, of which the highest is the shared bit.

        Raises ValueError for a number that no processor has: 32 to 52.

        >>> VmType.address_bits(48) == VmType.TDX_48
        True
        """
        if not _LEAST_BITS <= bits <= KVM_MAX_GPA.bit_length() - 1:
            raise ValueError(f"no processor has {bits} address bits")
        return cls(f"tdx-{bits}", 1 << (bits - 1))

    @property
    def has_private_memory(self) -> bool:
        """Whether its guest can mean private memory at all."""
        return self != VmType.DEFAULT

    @property
    def max_gpa(self) -> int:
        """The end of what memslots may cover: gpas with the shared bit are aliases of those without."""
        return self.shared_bit or KVM_MAX_GPA

    def decode(self, gpa: Gpa, *, encrypted: bool = False, fetch: bool = False) -> tuple[Gpa, Side]:
        """Return the gpa without the shared bit, and which memory the access is to.

        `encrypted` is the attribute that only SNP has. Of an SNP guest an instruction is fetched from private memory
        whatever the C-bit says; a TDX guest cannot execute shared memory. Raises OSError(EFAULT) for that, and if
        another type's guest claims the attribute.

        >>> VmType.TDX_48.decode(Gpa(1 << 47 | 0x1000))
        (4096, <Side.SHARED: 1>)
        >>> VmType.TDX_48.decode(Gpa(0x1000))
        (4096, <Side.PRIVATE: 2>)
        """
        if encrypted and self != VmType.SNP:
            raise OSError(errno.EFAULT, "only an SNP guest has the C-bit")
        if self.shared_bit:
            if fetch and gpa & self.shared_bit:
                raise OSError(errno.EFAULT, "a TDX guest cannot execute shared memory")
            return Gpa(gpa & ~self.shared_bit), Side.of(not gpa & self.shared_bit)
        return gpa, Side.of(encrypted or (fetch and self == VmType.SNP))


VmType.DEFAULT = VmType("default")
VmType.SNP = VmType("snp")
VmType.TDX_48 = VmType.address_bits(48)
VmType.TDX_52 = VmType.address_bits(52)
