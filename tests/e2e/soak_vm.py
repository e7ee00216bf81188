"""A virtual machine for the soak, in a process of its own: does what it is told on standard input, a line of JSON each.

    {"do": "store", "side": "private", "pages": [3, 4], "value": 17}    the guest writes, converting what it has to
    {"do": "load", "side": "shared", "pages": [3]}                      the guest reads: the values
    {"do": "convert", "side": "private", "pages": [3, 4]}               the guest asks for it by hypercall
    {"do": "replace"}                                                   its memslot goes and comes back
    {"do": "check"}                                                     every invariant, and what it occupies

Each is answered with a line: {"answer": ...}, or {"gone": why} and the end if memfs has gone. Ends with its input.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import trio

from kvmsim.backing import StoreGone
from kvmsim.engines.program import Load, Program, ProgramEngine, Store, convert
from kvmsim.exits import Exit
from kvmsim.fault_points import install_faults
from kvmsim.side import Side
from kvmsim.vcpu import VCPU
from kvmsim.vm import VM, create_vm
from kvmsim.vmm.vmm import Vmm, open_memory
from memfs.contract.units import PAGE_SIZE, Gpa

WORD = 8  # bytes at the start and at the end of a page that a value is written to


class Guest:
    """An engine that runs one program after the other."""

    def __init__(self) -> None:
        self.program = ProgramEngine(iter(()))  # type: ignore[arg-type]

    async def run(self, vcpu: VCPU) -> Exit:
        return await self.program.run(vcpu)


def store(pages: list[int], value: int, *, private: bool) -> Program:
    for page in pages:
        for gpa in (page * PAGE_SIZE, (page + 1) * PAGE_SIZE - WORD):
            yield Store(Gpa(gpa), value.to_bytes(WORD, "little"), encrypted=private)


def load(pages: list[int], values: list[int], *, private: bool) -> Program:
    for page in pages:
        first = yield Load(Gpa(page * PAGE_SIZE), WORD, encrypted=private)
        last = yield Load(Gpa((page + 1) * PAGE_SIZE - WORD), WORD, encrypted=private)
        values.append(int.from_bytes(first, "little") if first == last else -1)


def ask(pages: list[int], returned: list[int], *, private: bool) -> Program:
    returned.append((yield convert(Gpa(pages[0] * PAGE_SIZE), len(pages), Side.of(private))))


async def act(vm: VM, vmm: Vmm, vcpu: VCPU, guest: Guest, command: dict[str, Any]) -> Any:
    """Do what a command says."""
    values: list[int] = []
    pages, private = command.get("pages", []), command.get("side") == "private"
    match command["do"]:
        case "store":
            guest.program = ProgramEngine(store(pages, command["value"], private=private))
        case "load":
            guest.program = ProgramEngine(load(pages, values, private=private))
        case "convert":
            guest.program = ProgramEngine(ask(pages, values, private=private))
        case "replace":
            await vm.set_user_memory_region(dataclasses.replace(vmm.region, memory_size=0))
            await vmm.add_memory(vm)
            return None
        case "check":
            vm.check()
            stats = await trio.to_thread.run_sync(lambda: [os.fstat(fd) for fd in (vmm.shared, vmm.private)])
            return {"blocks": [stat.st_blocks for stat in stats], "descriptors": len(os.listdir("/proc/self/fd"))}
    await vmm.run(vcpu)
    return values


async def serve(socket: str, vmm: Vmm) -> None:
    async with create_vm(socket, name=f"soak-{os.getpid()}") as vm:
        await vmm.add_memory(vm)
        guest = Guest()
        vcpu = vm.create_vcpu(0, guest)
        say({"answer": "ready"})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, vm)
            while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
                say({"answer": await act(vm, vmm, vcpu, guest, json.loads(line))})
            nursery.cancel_scope.cancel()


async def watch(vm: VM) -> None:
    """memfs may go while nobody asks for anything."""
    await vm.backing.ended.wait()
    vm.check_alive()


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def gone(error: BaseException) -> str | None:
    """Why memfs has gone, if that is what an error says."""
    if isinstance(error, BaseExceptionGroup):
        return next((why for each in error.exceptions if (why := gone(each))), None)
    return str(error) if isinstance(error, StoreGone) else None


def main() -> None:
    socket, shared, private, size = sys.argv[1:]
    install_faults()
    try:
        with open_memory(shared, private, int(size)) as vmm:
            trio.run(serve, socket, vmm)
    except (StoreGone, BaseExceptionGroup) as error:
        why = gone(error)
        if why is None:
            raise
        say({"gone": why})
        os._exit(1)  # a thread still waits for input


if __name__ == "__main__":
    main()
