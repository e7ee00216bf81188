"""The VMM: owns the files that guest memory lies on, runs the vCPU, and answers its exits.

KVM_EXIT_MEMORY_ERROR is answered with ordinary file operations, which memfs then tells KVM of:

    to private   punch the page out of the shared file, then fallocate it in the private one
    to shared    punch it out of the private file; the shared page comes with the next fault

In this order no page is ever paid for twice. Each of these waits, inside the kernel and memfs, for KVM's own
acknowledgement, so it must not be called from the thread in which KVM acknowledges: it goes to another one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from kvmsim.exits import Exit, HaltExit, MemoryErrorExit
from kvmsim.uapi import KVM_EXIT_MEM_MAP_PRIVATE, KVM_MEM_FD, UserspaceMemoryRegion
from kvmsim.vcpu import VCPU
from memfs.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from memfs.units import ByteOffset, Gpa


class UnhandledExit(Exception):
    """The guest did something that this VMM has no answer to."""


class Vmm:
    """Guest memory from gpa 0 on, laid onto two files from offset 0 on. Use `open_memory`."""

    def __init__(self, shared: int, private: int, size: int) -> None:
        self.shared: Final = shared  #: descriptor of the file of shared memory
        self.private: Final = private  #: descriptor of the guest-sealed file of private memory
        self.size: Final = size  #: bytes
        self.conversions: Counter[str] = Counter()  #: by what memory became: private, shared

    @property
    def region(self) -> UserspaceMemoryRegion:
        """The memslot for this memory."""
        return UserspaceMemoryRegion(
            slot=0,
            flags=KVM_MEM_FD,
            guest_phys_addr=Gpa(0),
            memory_size=self.size,
            userspace_addr=ByteOffset(0),
            fd=self.shared,
            private_fd=self.private,
        )

    async def run(self, vcpu: VCPU) -> None:
        """Run a vCPU until the guest halts. Raises UnhandledExit, and what VCPU.run raises."""
        while not isinstance(exit_ := await vcpu.run(), HaltExit):
            await self.answer(exit_)

    async def answer(self, exit_: Exit) -> None:
        """Do what an exit asks for. Raises UnhandledExit, OSError (ENOSPC)."""
        if not isinstance(exit_, MemoryErrorExit):
            raise UnhandledExit(f"{exit_.name} exit: {exit_}")
        to_private = exit_.type == KVM_EXIT_MEM_MAP_PRIVATE
        await trio.to_thread.run_sync(self._convert, exit_.gpa, exit_.size, to_private)
        self.conversions["private" if to_private else "shared"] += 1

    def _convert(self, gpa: Gpa, size: int, to_private: bool) -> None:
        punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        if to_private:
            fallocate(self.shared, punch, gpa, size)
            fallocate(self.private, 0, gpa, size)
        else:
            fallocate(self.private, punch, gpa, size)


@contextmanager
def open_memory(shared: str, private: str, size: int) -> Iterator[Vmm]:
    """Open both files and make them as large as guest memory, `size` bytes. Blocking: before the event loop.

    Raises OSError.
    """
    fds: list[int] = []
    try:
        for path in (shared, private):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            fds.append(fd)
            if os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)
        yield Vmm(fds[0], fds[1], size)
    finally:
        for fd in fds:
            os.close(fd)
