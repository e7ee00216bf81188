"""A virtual machine monitor on a mounted memfs: two files, a memslot, a vCPU, and memory that is converted both ways.

memfs mount /mnt/guest -o size=1g && python examples/vmm.py /mnt/guest
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio

from kvmsim import Gpa, Load, Program, ProgramEngine, Side, Store, UnhandledExit, convert, create_vm, open_memory
from memfs.contract.on_memfs import locate
from memfs.contract.protocol import StoreGone

SIZE, MAILBOX, SECRET = 16 << 20, Gpa(0x1000), Gpa(0x20_0000)  # bytes of guest memory, and two places in it


def guest() -> Program:
    """Run on the vCPU: every yield is an access to guest memory, or a hypercall."""
    yield Store(MAILBOX, b"hello, host")  # shared memory: it is allocated when it is first touched
    yield Store(SECRET, b"nobody reads this", encrypted=True)  # private: KVM exits, and the VMM converts the page
    assert (yield Load(SECRET, 17, encrypted=True)) == b"nobody reads this"
    yield convert(SECRET, 1, Side.SHARED)  # asked for by hypercall; what was there is gone
    assert (yield Load(SECRET, 17)) == bytes(17)


async def run(mount: Path) -> None:
    """Create the files and the VM, and run the guest until it halts."""
    with locate(str(mount), last_link=True) as directory:  # refuses what does not lie on a memfs
        socket = directory.get("user.memfs.socket")
    shared, private = mount / "shared", mount / "private"
    shared.touch()
    private.touch()
    os.setxattr(private, "user.memfs.seals", b"guest")  # from now on nobody can read, write or map it
    with open_memory(str(shared), str(private), SIZE) as vmm:
        async with create_vm(socket, name="example") as vm:
            await vmm.add_memory(vm)  # one memslot on both files, from guest physical address 0 on
            await vmm.run(vm.create_vcpu(0, ProgramEngine(guest())))
            print(f"the guest halted; its mailbox says {os.pread(vmm.shared, 11, MAILBOX).decode()!r}")
            print(f"conversions: {vmm.conversions[Side.PRIVATE]} to private, {vmm.conversions[Side.SHARED]} to shared")


if __name__ == "__main__":
    try:
        trio.run(run, Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
    except IndexError:
        sys.exit(f"usage: {sys.argv[0]} MOUNT")
    except (OSError, StoreGone, UnhandledExit) as error:
        sys.exit(f"{sys.argv[0]}: {error}")
