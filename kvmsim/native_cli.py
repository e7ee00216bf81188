"""The commands of `kvmsim` whose guests are native code: `exec`, `boot` and `selftest`.

What a guest prints is on standard output; what is said about it, which engine runs it and why among that, on standard
error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Final

import trio

from kvmsim.backing import socket_of
from kvmsim.command import CommandError, check_files, size_of
from kvmsim.engines.kvm.machine import open_kvm_machine
from kvmsim.engines.native import ENGINES, Choice, NativeMachine, choose, open_machine
from kvmsim.engines.ports import PORT_CONSOLE
from kvmsim.engines.registers import Registers
from kvmsim.engines.trace import IntegrityError
from kvmsim.exits import HaltExit
from kvmsim.guests.boot import LinuxBoot, check_kvm_boots
from kvmsim.guests.bzimage import BootImage, boot_image
from kvmsim.guests.elf import Elf, ElfError
from kvmsim.guests.linux.files import Files
from kvmsim.guests.linux.layout import ROOM
from kvmsim.guests.linux.program import LinuxProgram
from kvmsim.guests.loading import LoadError, check_size, load, make_private
from kvmsim.vm import VM, create_vm
from kvmsim.vmm.guest_memory import GuestMemory
from kvmsim.vmm.vmm import Vmm, open_memory
from memfs.contract.aio.nurseries import open_flat_nursery
from memfs.contract.sys.dumpable import hide_memory
from memfs.contract.terminal import Parser, printable
from memfs.contract.units import Gfn, GfnRange, Gpa, gpa_to_gfn

#: Console; interrupts by the PIC, since no table says what else there is; how it ends
_COMMAND_LINE: Final = "console=ttyS0 acpi=off noapic pci=off reboot=k panic=-1 i8042.nokbd i8042.noaux"
_ENVIRONMENT: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/"}
_MOST_PROGRAM: Final = 256 << 20  # bytes of a file that is read
_SELFTEST_SIZE: Final = 16 << 20
_SELFTEST_STACK: Final = 0x70_0000
_SELFTEST_AREA: Final = 0x80_0000
_SELFTEST_PAGES: Final = 2048
_CHAOS: Final = 5_000  # accesses of each vCPU

#: Why `selftest` failed, by its exit code (selftest.c)
_FAILURES: Final = {
    1: "step {b} found {c:#x}, which is not what was stored",
    2: "something of the other side was left at {c:#x}",
    3: "page {b} could not be converted",
    4: "page {b} of the area held {c:#x}, which is not what was stored",
}
_WRONG_BYTE: Final = (1, 2, 4)  # of these


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `exec` and `selftest`."""
    run = commands.add_parser("exec", help="run a static Linux program as a guest", description=_exec.__doc__)
    _add_memory(run)
    run.add_argument("--mem", metavar="SIZE", required=True, help="guest memory in bytes, or with k, m, g, t")
    run.add_argument(
        "--root", metavar="DIR", help="directory whose files the program may read, as its / (default: none)"
    )
    run.add_argument("program", metavar="PROGRAM", help="path of the program, outside of --root")
    run.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER)
    run.set_defaults(run=_exec)

    boot = commands.add_parser("boot", help="boot a Linux kernel as a guest", description=_boot.__doc__)
    _add_files(boot)
    boot.add_argument("--mem", metavar="SIZE", required=True, help="guest memory in bytes, or with k, m, g, t")
    boot.add_argument("--kernel", metavar="FILE", required=True, help="bzImage, as distributions have in /boot")
    boot.add_argument("--initrd", metavar="FILE", help="initial file system")
    boot.add_argument("--append", metavar="TEXT", default="", help="more of a command line")
    boot.set_defaults(run=_boot)

    test = commands.add_parser("selftest", help="run a guest that tests its memory", description=_selftest.__doc__)
    _add_memory(test)
    test.add_argument("what", metavar="WHAT", nargs="?", choices=["check", "chaos", "watch"], default="check")
    test.set_defaults(run=_selftest)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    _add_files(parser)
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="what runs the code (default: auto)")


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shared", metavar="FILE", required=True, help="file of shared memory, on a memfs")
    parser.add_argument(
        "--private", metavar="FILE", required=True, help="guest-sealed file of private memory, on it, too"
    )
    parser.add_argument("--socket", metavar="PATH", help="memfs's socket (default: asked of the file)")


def _exec(options: argparse.Namespace) -> None:
    """Run an unmodified static Linux program in sealed memory: one process, whose system calls kvmsim answers.

    There is no fork, no thread and no signal in there. Memory is emptied first, and all of it is private. The exit code
    is the program's; 1 as well if it could not be run.
    """
    elf = _read_program(options.program)
    size = size_of(options.mem, "--mem")
    _fits(elf, size, ROOM)
    opened = Files(options.root)
    try:
        arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
        with _memory(options, size) as (vmm, choice, socket):
            code = _run_loop(_run_program, vmm, choice, socket, elf, opened, [options.program, *arguments])
    finally:
        opened.close_all()
    sys.exit(code)


async def _run_program(vmm: Vmm, choice: Choice, socket: str, elf: Elf, opened: Files, arguments: list[str]) -> int:
    async with _started(vmm, choice, socket, elf) as (vm, memory, machine):
        program = LinuxProgram(vm, vmm, machine, memory, elf, opened)
        try:
            return await program.run(arguments, _ENVIRONMENT)
        finally:
            unknown = program.kernel.unknown
            if unknown:
                counts = ", ".join(f"{name} ({count})" for name, count in sorted(unknown.items()))
                _say(f"system calls that there are not in here: {counts}")


def _boot(options: argparse.Namespace) -> None:
    """Boot an unmodified Linux kernel in sealed memory: its console is standard input and output.

    It needs a KVM with SVM or VMX. Memory is emptied first, and all of it is private. It ends when the kernel resets
    the machine (reboot -f).
    """
    check_kvm_boots()
    size = size_of(options.mem, "--mem")
    kernel, initrd = Path(options.kernel).read_bytes(), Path(options.initrd).read_bytes() if options.initrd else b""
    image = boot_image(kernel, initrd, f"{_COMMAND_LINE} {options.append}".strip(), size)
    options.engine = "kvm"
    with _memory(options, size) as (vmm, choice, socket):
        _run_loop(_run_boot, vmm, choice, socket, image)


async def _run_boot(vmm: Vmm, choice: Choice, socket: str, image: BootImage) -> int:
    async with create_vm(socket, name=f"kvmsim-{os.getpid()}", vm_type=choice.vm_type) as vm:
        await vmm.add_memory(vm)
        await make_private(vmm)
        async with open_kvm_machine(vm) as machine:
            guest = LinuxBoot(vm, vmm, machine, image)
            await guest.load()
            machine.project_range(GfnRange(Gfn(0), gpa_to_gfn(Gpa(vmm.size))))
            return await guest.run()


def _selftest(options: argparse.Namespace) -> None:
    """Run the test guest: it checks what a guest may rely on, stores at random on two vCPUs, or watches its pages.

    `watch` fills pages 2048 to 3071 of private memory and ends when some of them have been taken, which it reports.
    """
    elf = Elf.parse(files("kvmsim").joinpath("guests/selftest.elf").read_bytes())
    with _memory(options, _SELFTEST_SIZE) as (vmm, choice, socket):
        _run_loop(_run_selftest, vmm, choice, socket, elf, options.what)


async def _run_selftest(vmm: Vmm, choice: Choice, socket: str, elf: Elf, what: str) -> None:
    letter = {"check": "c", "chaos": "x", "watch": "p"}[what]
    vcpus = 2 if what == "chaos" else 1
    seed = int.from_bytes(os.urandom(2), "little")
    async with _started(vmm, choice, socket, elf) as (vm, _, machine):
        taken: list[int] = []

        async def run(number: int) -> None:
            engine = machine.create(number, {PORT_CONSOLE: _print})
            stack = _SELFTEST_STACK - number * 0x1_0000
            registers = Registers(rip=elf.entry, rsp=stack, rdi=number, rsi=ord(letter), rdx=vcpus)
            registers.rcx, registers.r8, registers.r9 = _SELFTEST_PAGES, _CHAOS, 1 << 32 | seed
            engine.registers = registers
            exit_ = await vmm.run(vm.create_vcpu(number, engine))
            registers = engine.registers
            if exit_ != HaltExit(0):
                code = exit_.code if isinstance(exit_, HaltExit) else -1
                why = _FAILURES.get(code, "it ended with {code}").format(b=registers.rbx, c=registers.rcx, code=code)
                failure = IntegrityError if code in _WRONG_BYTE else CommandError
                await vm.catch_up()  # if memfs has taken the memory meanwhile, that is why
                raise failure(f"selftest {what} failed: {why}")
            taken.append(registers.rbx)

        async with open_flat_nursery() as nursery:
            for number in range(vcpus):
                nursery.start_soon(run, number)
        if what == "check":
            _say("all checks passed")
        elif what == "chaos":
            conversions = sum(vmm.conversions.values()) - 2
            _say(
                f"every word was as stored, after {conversions:,} conversions; {sum(taken):,} words had been taken away"
            )
        vm.check()


def _run_loop(main: Callable[..., Awaitable[int | None]], *arguments: object) -> int:
    return trio.run(main, *arguments, restrict_keyboard_interrupt_to_checkpoints=True) or 0


def _print(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _read_program(path: str) -> Elf:
    with open(path, "rb") as file:
        data = file.read(_MOST_PROGRAM + 1)
    try:
        if len(data) > _MOST_PROGRAM:
            raise ElfError(f"it is larger than {_MOST_PROGRAM >> 20} MiB")
        return Elf.parse(data)
    except ElfError as error:
        raise CommandError(f"{path}: {error}") from error


def _fits(elf: Elf, size: int, rest: int) -> None:
    try:
        check_size(elf, size, rest)
    except LoadError as error:
        raise CommandError(f"--mem: {error}") from error


@contextmanager
def _memory(options: argparse.Namespace, size: int) -> Iterator[tuple[Vmm, Choice, str]]:
    """Choose an engine and open guest memory: what needs no event loop."""
    hide_memory()
    choice = choose(options.engine)
    _say(f"engine {choice.name}: {choice.why}")
    with open_memory(options.shared, options.private, size) as vmm:
        check_files(vmm, options.shared, options.private)
        yield vmm, choice, options.socket or socket_of(vmm.shared)


@asynccontextmanager
async def _started(
    vmm: Vmm, choice: Choice, socket: str, elf: Elf
) -> AsyncIterator[tuple[VM, GuestMemory, NativeMachine]]:
    """Create a VM with a program in its private memory, on an engine."""
    async with create_vm(socket, name=f"kvmsim-{os.getpid()}", vm_type=choice.vm_type) as vm:
        await vmm.add_memory(vm)
        memory = await load(vm, vmm, elf)
        async with open_machine(vm, choice) as machine:
            machine.project_range(GfnRange(Gfn(0), gpa_to_gfn(Gpa(vmm.size))))
            yield vm, memory, machine


def _say(text: str) -> None:
    print(f"kvmsim: {printable(text)}", file=sys.stderr, flush=True)
