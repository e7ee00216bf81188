"""Starting a static Linux program in the memory of a VM, and running it to its end.

What the program finds on its stack (arguments, environment, auxiliary vector) is as the System V ABI for x86-64 has it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from kvmsim.engines.native import NativeMachine
from kvmsim.engines.registers import Registers
from kvmsim.engines.user_mode import PORT_SYSCALL
from kvmsim.exits import ExceptionExit, InternalErrorExit, IoExit, ShutdownExit
from kvmsim.guests.elf import Elf
from kvmsim.guests.linux.files import Files
from kvmsim.guests.linux.kernel import Kernel, ProgramDied, ProgramExit
from kvmsim.guests.linux.layout import AddressSpace
from kvmsim.guests.loading import LoadError
from kvmsim.vm import VM
from kvmsim.vmm.guest_memory import GuestMemory
from kvmsim.vmm.vmm import Vmm
from memfs.contract.units import PAGE_SIZE, Gpa

_PROGRAM_HEADER_SIZE: Final = 56
_MOST_STRINGS: Final = 128 << 10  #: bytes of arguments and environment

# auxiliary vector (linux/auxvec.h)
_AT_NULL, _AT_PHDR, _AT_PHENT, _AT_PHNUM, _AT_PAGESZ, _AT_ENTRY = 0, 3, 4, 5, 6, 9
_AT_UID, _AT_EUID, _AT_GID, _AT_EGID, _AT_CLKTCK, _AT_SECURE, _AT_RANDOM, _AT_EXECFN = 11, 12, 13, 14, 17, 23, 25, 31


def initial_stack(elf: Elf, top: int, arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, bytes]:
    """Return where rsp is when a program starts, and what lies there, up to `top`. Raises LoadError for too much."""
    strings = [os.fsencode(text) + b"\0" for text in arguments]
    variables = [os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items()]
    text = b"".join((*strings, *variables, os.urandom(16)))
    if len(text) > _MOST_STRINGS:
        raise LoadError(f"its arguments are longer than {_MOST_STRINGS >> 10} KiB")
    at = start = (top - len(text)) & -16
    pointers = []
    for each in (*strings, *variables):
        pointers.append(at)
        at += len(each)
    vector = [
        *(_AT_PHDR, elf.headers, _AT_PHENT, _PROGRAM_HEADER_SIZE, _AT_PHNUM, elf.header_count),
        *(_AT_PAGESZ, PAGE_SIZE, _AT_ENTRY, elf.entry, _AT_UID, 0, _AT_EUID, 0, _AT_GID, 0, _AT_EGID, 0),
        *(_AT_CLKTCK, 100, _AT_SECURE, 0, _AT_RANDOM, at, _AT_EXECFN, pointers[0], _AT_NULL, 0),
    ]
    count = len(strings)
    words = [count, *pointers[:count], 0, *pointers[count:], 0, *vector]
    rsp = (start - 8 * len(words)) & -16
    return rsp, struct.pack(f"={len(words)}Q", *words).ljust(start - rsp, b"\0") + text


class LinuxProgram:
    """A program in the memory of a VM that `load` has loaded it into."""

    def __init__(self, vm: VM, vmm: Vmm, machine: NativeMachine, memory: GuestMemory, elf: Elf, files: Files) -> None:
        self._vm: Final = vm
        self._vmm: Final = vmm
        self._memory: Final = memory
        self._elf: Final = elf
        self._space: Final = AddressSpace(elf.end, vmm.size, memory.write)
        self._engine: Final = machine.create(0)
        self.kernel: Final = Kernel(self._engine, memory, self._space, files)

    async def run(self, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run it to its end; return its exit code.

        Raises ProgramDied; LoadError if the arguments are too long; what `Vmm.answer` and `VCPU.run` raise.
        """
        rsp, content = initial_stack(self._elf, self._space.stack_top, arguments, environment)
        await self._memory.write(Gpa(rsp), content)
        self._engine.registers = Registers(rip=self._elf.entry, rsp=rsp)
        vcpu = self._vm.create_vcpu(0, self._engine)
        try:
            while True:
                exit_ = await vcpu.run()
                match exit_:
                    case IoExit(port=port, is_write=True) if port == PORT_SYSCALL:
                        await self.kernel.answer(exit_)
                    case ExceptionExit():
                        raise ProgramDied(f"the program died: {exit_}")
                    case ShutdownExit() | InternalErrorExit():
                        raise ProgramDied(
                            f"the program died: {exit_.name.lower().replace('_', ' ')}, {self._engine.registers}"
                        )
                    case _:
                        await self._vmm.answer(exit_)
        except ProgramExit as end:
            return end.code
