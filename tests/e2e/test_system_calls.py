"""The kernel of `kvmsim exec`, asked by a program that asks for anything at all."""

from __future__ import annotations

import errno
import os
import random
import struct
from pathlib import Path

import pytest
import trio

from kvmsim.engines.registers import Registers
from kvmsim.engines.user_mode import PORT_SYSCALL
from kvmsim.exits import Exit, IoExit
from kvmsim.guests.linux.files import Files
from kvmsim.guests.linux.kernel import Kernel, ProgramDied, ProgramExit
from kvmsim.guests.linux.layout import AddressSpace
from kvmsim.guests.linux.numbers import NAMES
from kvmsim.vcpu import VCPU
from memfs.contract.units import Gpa

from .native import AREA, SIZE, NativeGuest, NewGuest, kvm_guest

__all__ = ["kvm_guest"]

NUMBERS = {name: number for number, name in NAMES.items()}
#: calls that wait, for as long as they are told or until somebody types
WAITING = {"read", "readv", "pread64", "sendfile", "nanosleep", "clock_nanosleep", "write", "writev"}


class Held:
    """An engine that stands still: its registers are what the test puts there."""

    def __init__(self) -> None:
        self.registers = Registers()

    def set_fs_base(self, address: int) -> None:
        del address

    async def run(self, vcpu: VCPU) -> Exit:
        raise NotImplementedError


class Caller:
    """A program that makes system calls."""

    def __init__(self, guest: NativeGuest, root: Path) -> None:
        self._engine = Held()
        self.files = Files(str(root))
        space = AddressSpace(AREA, SIZE, guest.memory.write)
        self.kernel = Kernel(self._engine, guest.memory, space, self.files)

    async def __call__(self, name: str, *arguments: int) -> int:
        values = dict(zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False))
        self._engine.registers = Registers(rax=NUMBERS[name], **values)
        await self.kernel.answer(IoExit(PORT_SYSCALL, 1, True))
        result = self._engine.registers.rax
        return result - (1 << 64) if result >> 63 else result


@pytest.mark.parametrize("seed", range(3))
async def test_any_call_with_any_arguments_has_an_answer(kvm_guest: NewGuest, tmp_path: Path, seed: int) -> None:
    (tmp_path / "file").write_text("content")
    lots = random.Random(seed)
    numbers = (
        0,
        1,
        2,
        3,
        4,
        7,
        0x1000,
        AREA,
        AREA + 4095,
        SIZE - 1,
        SIZE,
        1 << 31,
        1 << 32,
        1 << 40,
        1 << 63,
        2**64 - 1,
    )
    async with kvm_guest() as guest:
        caller = Caller(guest, tmp_path)
        try:
            await guest.memory.write(Gpa(AREA), b"/file\0" + bytes(100))
            names = sorted(name.removeprefix("_sys_") for name in dir(caller.kernel) if name.startswith("_sys_"))
            for _ in range(1500):
                name = lots.choice([name for name in names if name not in WAITING])
                arguments = [lots.choice([*numbers, lots.randrange(1 << 64)]) for _ in range(6)]
                try:
                    result = await caller(name, *arguments)
                except (ProgramExit, ProgramDied):
                    assert name in ("exit", "exit_group", "kill", "tgkill")
                else:
                    assert result > -4096, f"{name}{arguments}"
            assert len(os.listdir("/proc/self/fd")) < 400
        finally:
            caller.files.close_all()


async def test_calls_do_what_they_do_elsewhere(kvm_guest: NewGuest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("0123456789")
    (tmp_path / "to-proc").symlink_to("/proc/self/mem")
    async with kvm_guest() as guest:
        call = Caller(guest, tmp_path)
        before = len(os.listdir("/proc/self/fd"))
        await guest.memory.write(Gpa(AREA), b"/file\0/\0to-proc\0")
        fd = await call("open", AREA, os.O_RDONLY)
        assert fd == 3
        assert await call("lseek", fd, 2, os.SEEK_SET) == 2
        assert await call("read", fd, AREA + 256, 100) == 8
        assert await guest.memory.read(Gpa(AREA + 256), 9) == b"23456789\0"
        assert await call("pread64", fd, AREA + 256, 3, 1) == 3
        assert await call("fstat", fd, AREA + 512) == 0
        assert struct.unpack("=q", await guest.memory.read(Gpa(AREA + 512 + 48), 8)) == (10,)
        copy = await call("mmap", 0, 4096, 1, 2, fd, 0)
        assert await guest.memory.read(Gpa(copy), 11) == b"0123456789\0"
        assert await call("munmap", copy, 4096) == 0
        assert await call("dup2", fd, 9) == 9
        assert [await call("close", number) for number in (fd, 9, 9)] == [0, 0, -errno.EBADF]
        assert await call("open", AREA + 8, os.O_RDONLY) == -errno.ENOENT
        assert await call("open", AREA, os.O_RDWR) == -errno.EROFS
        assert await call("read", 3, SIZE - 1, 2) == -errno.EBADF
        directory = await call("open", AREA + 6, os.O_RDONLY | os.O_DIRECTORY)
        length = await call("getdents64", directory, AREA + 4096, 4096)
        entries = await guest.memory.read(Gpa(AREA + 4096), length)
        assert [name in entries for name in (b"file\0", b"to-proc\0", b"..\0", b"other\0")] == [True, True, True, False]
        assert await call("getdents64", directory, AREA + 4096, 4096) == 0
        assert await call("writev", 99, AREA, 0) == -errno.EBADF
        assert await call("clock_gettime", 1 << 40, AREA) == -errno.EINVAL
        assert await call("brk", 0) == AREA
        assert call.kernel.unknown == {}
        call.files.close_all()
        assert len(os.listdir("/proc/self/fd")) == before - 1  # its root
    await trio.lowlevel.checkpoint()
