"""struct kvm_run of a vCPU, in a memfd that the VMM maps: what it exited with, and what the VMM answers.

The VMM may write anything there at any time, so each field is read once and bounded. The memfd cannot be shrunk: to
touch what has gone would end the service.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from typing import Final

from kvmsim import kvm_run
from kvmsim.engines.registers import Registers
from kvmsim.exits import (
    ExceptionExit,
    Exit,
    HypercallExit,
    InternalErrorExit,
    IoExit,
    MemoryErrorExit,
    MemoryFaultExit,
    MmioExit,
)

SIZE: Final = 3 << 12  #: bytes, as on x86: the structure, data of `in` and `out`, coalesced MMIO (unused)
_IO_DATA: Final = 1 << 12
_SUBERROR: Final = struct.Struct("<I4x")
_EXCEPTION: Final = struct.Struct("<II")


class RunPage:
    """The structure, and `fd`, its memfd."""

    def __init__(self) -> None:
        self.fd: Final = os.memfd_create("kvm_run", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, SIZE)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            self._page: Final = mmap.mmap(self.fd, SIZE)
        except OSError:
            os.close(self.fd)
            raise

    @property
    def immediate_exit(self) -> bool:
        """Whether KVM_RUN is to return at once, with EINTR."""
        return bool(self._page[kvm_run.IMMEDIATE_EXIT])

    def put(self, exit_: Exit | MemoryFaultExit) -> None:
        """Say why the vCPU has exited."""
        struct.pack_into("<I", self._page, kvm_run.EXIT_REASON, exit_.reason)
        match exit_:
            case MemoryErrorExit():
                self._put(kvm_run.MEMORY_ERROR, exit_.type, exit_.gpa, exit_.size)
            case MemoryFaultExit():
                self._put(kvm_run.MEMORY_FAULT, exit_.flags, exit_.gpa, exit_.size)
            case MmioExit():
                self._put(kvm_run.MMIO, exit_.gpa, exit_.data[:8], exit_.size, exit_.is_write)
            case IoExit():
                data = exit_.data[:_IO_DATA]
                count = max(len(data) // exit_.size, 1)
                self._put(kvm_run.IO, exit_.is_write, exit_.size, exit_.port, count, _IO_DATA)
                self._page[_IO_DATA : _IO_DATA + len(data)] = data
            case HypercallExit():
                self._put(kvm_run.HYPERCALL, exit_.nr, *(*exit_.args, *[0] * 6)[:6])
            case InternalErrorExit():
                self._put(_SUBERROR, exit_.suberror)
            case ExceptionExit():
                self._put(_EXCEPTION, exit_.vector, 0)

    def _put(self, layout: struct.Struct, *values: int | bytes) -> None:
        layout.pack_into(self._page, kvm_run.UNION, *values)

    def answer(self, exit_: Exit | None) -> None:
        """Hand over what the VMM has answered to an exit."""
        match exit_:
            case MmioExit(is_write=False):
                exit_.data = self._page[kvm_run.MMIO_DATA : kvm_run.MMIO_DATA + min(exit_.size, 8)]
            case IoExit(is_write=False):
                exit_.data = self._page[_IO_DATA : _IO_DATA + min(exit_.size, 4)]
            case HypercallExit():
                exit_.ret = struct.unpack_from("<q", self._page, kvm_run.HYPERCALL_RET)[0]

    def registers_to_set(self) -> Registers | None:
        """Return the general registers, if the VMM has said that it changed them (KVM_CAP_SYNC_REGS)."""
        if not struct.unpack_from("<Q", self._page, kvm_run.DIRTY_REGS)[0] & kvm_run.SYNC_GENERAL:
            return None
        struct.pack_into("<Q", self._page, kvm_run.DIRTY_REGS, 0)
        return Registers.unpack(self._page[kvm_run.REGS : kvm_run.REGS + Registers.LAYOUT.size])

    @property
    def wants_registers(self) -> bool:
        """Whether the general registers are to be in there after each exit."""
        return bool(struct.unpack_from("<Q", self._page, kvm_run.VALID_REGS)[0] & kvm_run.SYNC_GENERAL)

    def put_registers(self, registers: Registers) -> None:
        """Put the general registers there."""
        self._page[kvm_run.REGS : kvm_run.REGS + Registers.LAYOUT.size] = registers.pack()

    def close(self) -> None:
        """Release it here; the VMM has its own."""
        self._page.close()
        os.close(self.fd)
