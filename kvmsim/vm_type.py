"""How a guest says that it means private memory: the one thing in which confidential VMs differ here.

default     not at all; such a VM has no private memory
TDX         by an address bit: with the shared bit of the gpa clear, an access is private. It is bit 47 of a guest
            with 48 address bits and bit 51 of one with 52, and no part of the gfn
SNP         by the C-bit of the guest's own page tables, which the processor takes off before KVM sees the gpa: an
            attribute of the access
"""

from __future__ import annotations

import enum
import errno

from kvmsim.side import Side
from kvmsim.uapi import KVM_MAX_GPA
from memfs.contract.units import Gpa


class VmType(enum.Enum):
    """A kind of VM; the value is the shared bit of a gpa, or what else it is."""

    DEFAULT = "default"
    TDX_48 = 47
    TDX_52 = 51
    SNP = "snp"

    @property
    def has_private_memory(self) -> bool:
        """Whether its guest can mean private memory at all."""
        return self is not VmType.DEFAULT

    @property
    def shared_bit(self) -> int:
        """The mask of the shared bit; 0 if there is none."""
        return 1 << self.value if isinstance(self.value, int) else 0

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
        if encrypted and self is not VmType.SNP:
            raise OSError(errno.EFAULT, "only an SNP guest has the C-bit")
        if self.shared_bit:
            if fetch and gpa & self.shared_bit:
                raise OSError(errno.EFAULT, "a TDX guest cannot execute shared memory")
            return Gpa(gpa & ~self.shared_bit), Side.of(not gpa & self.shared_bit)
        return gpa, Side.of(encrypted or (fetch and self is VmType.SNP))
