"""Where what lies in struct kvm_run (include/uapi/linux/kvm.h), in bytes: of the real KVM, and of `kvmsim serve`."""

from __future__ import annotations

import struct
from typing import Final

IMMEDIATE_EXIT: Final = 1
EXIT_REASON: Final = 8
UNION: Final = 32  #: by exit reason, one of the structures below
VALID_REGS: Final = 288
DIRTY_REGS: Final = 296
REGS: Final = 304  #: struct kvm_regs, the first of the union of KVM_CAP_SYNC_REGS
SYNC_GENERAL: Final = 1  #: KVM_SYNC_X86_REGS, in the two fields before

MEMORY_ERROR: Final = struct.Struct("<I4xQQ")  #: KVM_EXIT_MEM_MAP_*, gpa, bytes (RFC patch 02)
MEMORY_FAULT: Final = struct.Struct("<QQQ")  #: flags, gpa, bytes
MMIO: Final = struct.Struct("<Q8sIB")  #: gpa, data, length, is_write
MMIO_DATA: Final = UNION + 8
IO: Final = struct.Struct("<BBHIQ")  #: direction, size, port, count, where the data is from the start of the mapping
HYPERCALL: Final = struct.Struct("<Q6Q")  #: nr, arguments
HYPERCALL_RET: Final = UNION + 56
