"""The VMM: owns the files that guest memory lies on, runs vCPUs, and answers their exits.

    KVM_EXIT_MEMORY_ERROR    convert the memory (convert.py), then run the vCPU again. Mainline's KVM_EXIT_MEMORY_FAULT
                             is another view of the same exit and is answered likewise
    KVM_EXIT_HYPERCALL       KVM_HC_MAP_GPA_RANGE asks for the same of a range, and gets an errno back
    KVM_EXIT_MMIO            the device at that address, if there is one
    KVM_EXIT_IO              whoever answers at that port, if anybody does
    KVM_EXIT_HLT             the end
    KVM_EXIT_INTR            whoever kicked the vCPU goes on

Any other exit is one that this VMM has no answer to; it stops and says so, rather than run a guest on that waits.

File calls wait, inside the kernel and memfs, for KVM's own acknowledgement, so they must not be made in the thread in
which KVM acknowledges: another one makes them (file_calls.py).
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from kvmsim.exits import (
    Exit,
    HaltExit,
    HypercallExit,
    InterruptExit,
    IoExit,
    MemoryErrorExit,
    MemoryFaultExit,
    MmioExit,
)
from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from kvmsim.uapi import (
    KVM_EINVAL,
    KVM_ENOSYS,
    KVM_EXIT_MEM_MAP_PRIVATE,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_MEM_FD,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    UserspaceMemoryRegion,
)
from kvmsim.vcpu import VCPU
from kvmsim.vm import VM
from kvmsim.vmm.around import GRANULES
from kvmsim.vmm.convert import Converter
from kvmsim.vmm.file_calls import FileCalls
from memfs.contract.on_memfs import locate
from memfs.contract.units import (
    PAGE_SIZE,
    ByteOffset,
    GfnRange,
    Gpa,
    PageIndex,
    PageRange,
    bytes_to_pages,
    gpa_to_gfn,
    is_page_aligned,
    pages_to_bytes,
)

#: A device: given the offset into its range and, for a store, the bytes; returns what a load reads
Device = Callable[[int, int, bytes | None], bytes]

#: What answers at an I/O port: it acts on what `out` brings, and fills in what `in` reads
Port = Callable[[IoExit], Awaitable[None]]


class UnhandledExit(Exception):
    """The guest did something that this VMM has no answer to."""


class Vmm:
    """Guest memory from gpa 0 on, laid onto two files from offset 0 on. Use `open_memory`."""

    def __init__(self, shared: int, private: int, size: int, granule: int = GRANULES[0], slots: int = 1) -> None:
        self.shared: Final = shared  #: descriptor of the file of shared memory
        self.private: Final = private  #: descriptor of the guest-sealed file of private memory
        self.size: Final = size  #: bytes
        self.granule: Final = granule
        self.slots: Final = slots  #: among which the memory is divided, in whole huge pages
        self.conversions: Counter[Side] = Counter()  #: asked for, by what memory became
        self._block: Final = bytes_to_pages(os.fstat(private).st_blksize)  # pages: of huge ones, if it has such
        self._calls: Final = FileCalls()
        self._memory: list[tuple[Memslot, Converter]] = []
        self._devices: list[tuple[Gpa, int, Device]] = []
        self._ports: dict[int, Port] = {}

    @property
    def regions(self) -> list[UserspaceMemoryRegion]:
        """The memslots for this memory."""
        whole = PageRange(PageIndex(0), PageIndex(self.size // PAGE_SIZE))
        each = PageRange(PageIndex(0), PageIndex(-(-len(whole) // self.slots))).rounded(self._block)
        return [
            UserspaceMemoryRegion(
                slot=number,
                flags=KVM_MEM_FD,
                guest_phys_addr=Gpa(part.offset),
                memory_size=part.nbytes,
                userspace_addr=part.offset,
                fd=self.shared,
                private_fd=self.private,
            )
            for number, part in enumerate(whole.chunks(len(each)))
        ]

    @property
    def region(self) -> UserspaceMemoryRegion:
        """The memslot for this memory, the first if there are several."""
        return self.regions[0]

    @property
    def converter(self) -> Converter | None:
        """What converts the memory of the slot that was added first."""
        return self._memory[0][1] if self._memory else None

    async def add_memory(self, vm: VM) -> Converter:
        """Make the files as large as the memory, the memslots on them, and what converts their memory.

        Raises OSError as `VM.set_user_memory_region` does; EPERM, with nothing changed, if those who listen on the
        socket are not to have the files.
        """
        for fd in (self.shared, self.private):
            vm.backing.check_recipient(fd)
        await self._calls.call(self._grow_files)
        for region in self.regions:
            await vm.set_user_memory_region(region)
            self.adopt(vm, region.slot)
        return self._memory[0][1]

    def adopt(self, vm: VM, slot_id: int, shared: int | None = None, private: int | None = None) -> Converter:
        """Convert the memory of a slot that there is already, as its guest asks for it.

        `shared`, `private`: descriptors of its files, if they are not the VMM's own. Raises ValueError if there is no
        such slot, or it has no private memory.
        """
        slot = vm.mmu.slots.get(slot_id)
        if slot is None or slot.private is None:
            raise ValueError(f"slot {slot_id} has no private memory")
        shared, private = self.shared if shared is None else shared, self.private if private is None else private
        converter = Converter(slot, shared, private, self.granule, self._calls)
        self._memory = [each for each in self._memory if vm.mmu.slots.is_current(each[0])]
        self._memory.append((slot, converter))
        return converter

    def is_converting(self, pages: PageRange) -> bool:
        """Return whether pages, of either file, are part of what is being converted now."""
        return any(converter.is_converting(pages) for _, converter in self._memory)

    def _grow_files(self) -> None:
        in_blocks = PageRange.covering(ByteOffset(0), self.size).rounded(self._block).nbytes
        for fd, size in ((self.shared, self.size), (self.private, in_blocks)):
            if os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)

    def add_device(self, gpa: Gpa, size: int, device: Device) -> None:
        """Have a device answer MMIO exits of `size` bytes from `gpa` on."""
        self._devices.append((gpa, size, device))

    def add_port(self, port: int, answer: Port) -> None:
        """Have a port answered, whatever the size of an access to it."""
        self._ports[port] = answer

    async def run(self, vcpu: VCPU) -> HaltExit | InterruptExit:
        """Run a vCPU until the guest halts or it is kicked. Raises UnhandledExit, and what VCPU.run raises."""
        while not isinstance(exit_ := await vcpu.run(), HaltExit | InterruptExit):
            await self.answer(exit_)
        return exit_

    async def answer(self, exit_: Exit | MemoryFaultExit) -> None:
        """Do what an exit asks for. Raises UnhandledExit, OSError (ENOSPC)."""
        match exit_:
            case MemoryErrorExit(wanted, gpa, size):
                await self.convert(gpa, size, Side.of(wanted == KVM_EXIT_MEM_MAP_PRIVATE))
            case MemoryFaultExit(flags, gpa, size):
                await self.convert(gpa, size, Side.of(bool(flags & KVM_MEMORY_EXIT_FLAG_PRIVATE)))
            case HypercallExit():
                exit_.ret = await self._hypercall(exit_)
            case MmioExit():
                self._mmio(exit_)
            case IoExit() if exit_.port in self._ports:
                await self._ports[exit_.port](exit_)
            case _:
                raise UnhandledExit(f"{exit_.name} exit: {exit_}")

    async def _hypercall(self, exit_: HypercallExit) -> int:
        if exit_.nr != KVM_HC_MAP_GPA_RANGE or len(exit_.args) != 3:
            return -KVM_ENOSYS
        gpa, pages, attributes = exit_.args
        size = pages_to_bytes(pages)
        if not is_page_aligned(gpa) or pages <= 0 or gpa < 0:
            return -KVM_EINVAL
        try:
            await self.convert(Gpa(gpa), size, Side.of(bool(attributes & KVM_MAP_GPA_RANGE_ENCRYPTED)))
        except OSError as error:
            return -(error.errno or KVM_EINVAL)
        return 0

    def _mmio(self, exit_: MmioExit) -> None:
        for gpa, size, device in self._devices:
            if gpa <= exit_.gpa and exit_.gpa + exit_.size <= gpa + size:
                exit_.data = device(exit_.gpa - gpa, exit_.size, exit_.data if exit_.is_write else None)
                return
        raise UnhandledExit(f"MMIO exit: nothing is at gpa {exit_.gpa:#x}, of {exit_.size} bytes")

    async def convert(self, gpa: Gpa, size: int, to: Side) -> None:
        """Convert memory, in bytes. Raises OSError: EINVAL if it is not all memory of this VMM, ENOSPC."""
        wanted = GfnRange(gpa_to_gfn(gpa), gpa_to_gfn(Gpa(gpa + size)))
        parts = [(slot, part, each) for slot, each in self._memory if (part := slot.gfns.intersect(wanted)) is not None]
        if sum(len(part) for _, part, _ in parts) != len(wanted):
            raise OSError(errno.EINVAL, f"gpa {gpa:#x}: not all of {size} bytes are memory of this VMM")
        for slot, part, converter in parts:
            await converter.convert(slot.pages_of(part), to)
        self.conversions[to] += 1


@contextmanager
def open_memory(shared: str, private: str, size: int, granule: int = GRANULES[0], slots: int = 1) -> Iterator[Vmm]:
    """Open both files of guest memory of `size` bytes, which must lie on a memfs (memfs/contract/on_memfs.py).

    Blocking: before the event loop. Raises OSError.
    """
    with ExitStack() as opened:
        fds = []
        for path in (shared, private):
            with locate(path) as file:
                fds.append(file.open(os.O_RDWR))
                opened.callback(os.close, fds[-1])
        yield Vmm(fds[0], fds[1], size, granule, slots)
