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
WAITING = {"read", "readv", "pread64", "sendfile", "nanosleep", "clock_nanosleep", "write", "writev", "poll"}


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
        caller, before = Caller(guest, tmp_path), len(os.listdir("/proc/self/fd"))
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
            assert len(os.listdir("/proc/self/fd")) < before + 300
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


async def open_by(call: Caller, guest: NativeGuest, path: str, flags: int = os.O_RDONLY) -> int:
    """Have the program open a file."""
    await guest.memory.write(Gpa(AREA), os.fsencode(path) + b"\0")
    return await call("open", AREA, flags)


@pytest.mark.parametrize("source", ["file", "pipe"])
@pytest.mark.parametrize("name", ["read", "readv"])
async def test_what_cannot_be_stored_is_still_there_to_be_read(
    kvm_guest: NewGuest, tmp_path: Path, source: str, name: str
) -> None:
    (tmp_path / "file").write_text("0123456789")
    nowhere = 1 << 40
    async with kvm_guest() as guest:
        call = Caller(guest, tmp_path)
        reader, writer = os.pipe()
        try:
            if source == "file":
                fd = await open_by(call, guest, "/file")
            else:
                fd = 0
                call.files.get(0).fd = reader  # type: ignore[misc]
                os.write(writer, b"0123456789")
            if name == "read":
                assert await call("read", fd, nowhere, 4) == -errno.EFAULT
                expected = b"0123456789"
            else:
                await guest.memory.write(Gpa(AREA), struct.pack("=6Q", AREA + 512, 4, nowhere, 4, AREA + 520, 4))
                assert await call("readv", fd, AREA, 3) == 4
                assert await guest.memory.read(Gpa(AREA + 512), 12) == b"0123" + bytes(8)
                assert await call("readv", fd, AREA + 16, 2) == -errno.EFAULT
                expected = b"456789"
            found = b""
            while len(found) < len(expected):
                count = await call("read", fd, AREA + 600, 3)
                assert count > 0
                found += await guest.memory.read(Gpa(AREA + 600), count)
            assert found == expected
        finally:
            os.close(reader)
            os.close(writer)
            call.files.close_all()


async def test_sendfile_goes_on_behind_what_was_written(kvm_guest: NewGuest, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(1 << 18))
    async with kvm_guest() as guest:
        call = Caller(guest, tmp_path)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            fd = await open_by(call, guest, "/file")
            call.files.get(1).fd = writer  # type: ignore[misc]
            written = await call("sendfile", 1, fd, 0, 1 << 18)
            assert 0 < written < 1 << 18
            assert await call("lseek", fd, 0, os.SEEK_CUR) == written
            assert await call("sendfile", 1, fd, 0, 1 << 18) == -errno.EAGAIN
            assert await call("lseek", fd, 0, os.SEEK_CUR) == written
            call.files.get(0).fd = reader  # type: ignore[misc]
            assert await call("sendfile", 1, 0, 0, 4) == -errno.EINVAL
        finally:
            os.close(reader)
            os.close(writer)
            call.files.close_all()


async def test_poll_says_which_descriptors_there_are(kvm_guest: NewGuest, tmp_path: Path) -> None:
    pollin, pollout, pollhup, pollnval = 1, 4, 0x10, 0x20
    async with kvm_guest() as guest:
        call = Caller(guest, tmp_path)
        asked = [(0, pollin | pollhup), (1, pollout), (99, pollin), (-1, pollin), (2, 0)]
        await guest.memory.write(Gpa(AREA), b"".join(struct.pack("=ihH", fd, events, 7) for fd, events in asked))
        assert await call("poll", AREA, len(asked), 0) == 3
        answer = struct.iter_unpack("=ihH", await guest.memory.read(Gpa(AREA), 8 * len(asked)))
        assert list(answer) == [
            (fd, events, revents)
            for (fd, events), revents in zip(asked, [pollin, pollout, pollnval, 0, 0], strict=True)
        ]
        with trio.move_on_after(0.05) as scope:
            await call("poll", AREA + 24, 1, 0xFFFF_FFFF)  # the negative one alone, without an end
        assert scope.cancelled_caught
        assert await call("poll", AREA + 24, 1, 1) == 0
        call.files.close_all()


async def test_directory_is_read_again_from_where_lseek_moves_to(kvm_guest: NewGuest, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).touch()
    async with kvm_guest() as guest:
        call = Caller(guest, tmp_path)
        fd = await open_by(call, guest, "/", os.O_RDONLY | os.O_DIRECTORY)

        async def names(size: int = 4096) -> list[bytes]:
            length = await call("getdents64", fd, AREA + 4096, size)
            data, found = await guest.memory.read(Gpa(AREA + 4096), length), list[bytes]()
            while data:
                found.append(data[19 : data.index(b"\0", 19)])
                data = data[int.from_bytes(data[16:18], "little") :]
            return found

        assert await call("getdents64", fd, 1 << 40, 4096) == -errno.EFAULT
        assert await names(60) == [b".", b".."]
        assert await call("lseek", fd, 0, os.SEEK_CUR) == 2
        assert await names() == [b"a", b"b", b"c"]
        assert await names() == []
        (tmp_path / "d").touch()
        assert await call("lseek", fd, 0, os.SEEK_SET) == 0
        assert await names() == [b".", b"..", b"a", b"b", b"c", b"d"]
        assert await call("lseek", fd, 4, os.SEEK_SET) == 4
        assert await names() == [b"c", b"d"]
        assert await call("lseek", fd, 2**64 - 1, os.SEEK_SET) == -errno.EINVAL
        assert await call("lseek", fd, 0, os.SEEK_END) == -errno.EINVAL
        call.files.close_all()


async def test_access_answers_as_for_root(kvm_guest: NewGuest, tmp_path: Path) -> None:
    for name, mode in (("plain", 0o600), ("program", 0o610)):
        (tmp_path / name).touch(mode)
        (tmp_path / name).chmod(mode)
    async with kvm_guest() as guest:
        call = Caller(guest, tmp_path)
        here = -100 & 2**64 - 1
        for path, mode, answer in (
            ("/plain", os.F_OK, 0),
            ("/plain", os.R_OK, 0),
            ("/plain", os.X_OK, -errno.EACCES),
            ("/plain", os.W_OK, -errno.EROFS),
            ("/plain", 8, -errno.EINVAL),
            ("/program", os.R_OK | os.X_OK, 0),
            ("/", os.X_OK, 0),
            ("/none", os.F_OK, -errno.ENOENT),
        ):
            await guest.memory.write(Gpa(AREA), os.fsencode(path) + b"\0")
            assert await call("access", AREA, mode) == answer, (path, mode)
            for directory in (here, 3):  # which an absolute path does not ask for
                assert await call("faccessat", directory, AREA, mode) == answer, (path, mode)
        call.files.close_all()
