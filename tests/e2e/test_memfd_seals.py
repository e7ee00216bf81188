"""The seals of memfds on memfs's files: for each seal and each operation, what a real memfd answers.

On both backings, with the handle opened before and after sealing where that is possible.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from memfs.contract.protocol.peer import close_all
from memfs.contract.sys.libc import fallocate
from memfs.store import seals
from tests.helpers import raises

from .conftest import Memfs, MountMemfs
from .owner import connected, shell
from .tools import needs

SIZE = 3 * 4096
KERNEL_SEALS = {"seal": 1, "shrink": 2, "grow": 4, "write": 8, "future_write": 16}


def pread_all(fd: int) -> bytes:
    return os.pread(fd, 1 << 20, 0)


OPERATIONS: dict[str, Callable[[int], Any]] = {
    "write inside": lambda fd: os.pwrite(fd, b"x" * 100, 10),
    "write at the end": lambda fd: os.pwrite(fd, b"x" * 100, SIZE),
    "write across the end": lambda fd: os.pwrite(fd, b"x" * 8192, SIZE - 6000),
    "truncate down": lambda fd: os.ftruncate(fd, 4096),
    "truncate to the same": lambda fd: os.ftruncate(fd, SIZE),
    "truncate up": lambda fd: os.ftruncate(fd, SIZE + 1),
    "allocate inside": lambda fd: fallocate(fd, 0, 0, 4096),
    "allocate past the end": lambda fd: fallocate(fd, 0, SIZE, 4096),
    "allocate past the end, keeping the size": lambda fd: fallocate(fd, 1, SIZE, 4096),
    "punch": lambda fd: fallocate(fd, 3, 0, 4096),
    "punch past the end": lambda fd: fallocate(fd, 3, SIZE, 4096),
    "map read-only": lambda fd: mmap.mmap(fd, 4096, prot=mmap.PROT_READ)[:2],
    "map privately": lambda fd: mmap.mmap(fd, 4096, mmap.MAP_PRIVATE)[:2],
    "read": lambda fd: os.pread(fd, 10, 0),
}


def outcome(operation: Callable[[int], Any], fd: int) -> Any:
    try:
        answer = operation(fd)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return answer, os.fstat(fd).st_size, pread_all(fd)


def sealed_memfd(names: tuple[str, ...]) -> int:
    fd = os.memfd_create("oracle", os.MFD_ALLOW_SEALING)
    os.write(fd, b"0123456789" * 2000)
    os.ftruncate(fd, SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, sum(KERNEL_SEALS[name] for name in names))
    return fd


def sealed_file(path: Path, names: tuple[str, ...]) -> int:
    path.write_bytes((b"0123456789" * 2000)[:SIZE])
    os.setxattr(path, "user.memfs.seals", ",".join(names).encode())
    return os.open(path, os.O_RDWR)


SETS = [names for count in (0, 1, 2) for names in itertools.combinations(KERNEL_SEALS, count)]


@pytest.mark.parametrize("options", ["backing=tmpfs", "backing=memfd", "passthrough=off"])
def test_each_operation_answers_as_on_a_memfd(mount_memfs: MountMemfs, options: str, subtests: pytest.Subtests) -> None:
    memfs = mount_memfs(f"size=64m,{options}")
    for number, (names, what) in enumerate(itertools.product(SETS, OPERATIONS)):
        with subtests.test(f"{'+'.join(names) or 'none'}: {what}"):
            real, ours = sealed_memfd(names), sealed_file(memfs.path / str(number), names)
            try:
                expected = outcome(OPERATIONS[what], real)
                if what == "map read-only" and {"write", "future_write"} & set(names):
                    # A writer of such a file bypasses the page cache, so it reads through a descriptor of its own.
                    os.close(ours)
                    ours = os.open(memfs.path / str(number), os.O_RDONLY)
                assert outcome(OPERATIONS[what], ours) == expected
            finally:
                os.close(real)
                os.close(ours)
                os.unlink(memfs.path / str(number))


def test_adding_seals_answers_as_on_a_memfd(memfs: Memfs) -> None:
    path = memfs.path / "file"
    path.touch()

    def ours(names: str) -> Any:
        try:
            return os.setxattr(path, "user.memfs.seals", names.encode())
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    assert [ours("shrink"), ours("shrink"), ours(""), ours("nonsense")] == [None, None, None, "EINVAL"]
    assert [ours("seal"), ours("grow"), ours("")] == [None, "EPERM", "EPERM"]
    assert os.getxattr(path, "user.memfs.seals") == b"seal,shrink"


@needs("setfattr")
async def test_seal_that_the_kernel_refuses_is_not_there(mount_memfs: MountMemfs) -> None:
    """An owner has a memfd mapped for writing; and nothing of what was to be added with it is there either."""
    memfs = mount_memfs("size=1m,backing=memfd")
    path = memfs.path / "file"
    await trio.to_thread.run_sync(path.write_bytes, bytes(4096))
    async with connected(memfs.socket) as owner:
        _, fds = await owner.registered(path)
        with mmap.mmap(fds[0], 4096):
            result = await shell("setfattr", "-n", "user.memfs.seals", "-v", "grow,write", path, cwd=memfs.path)
            assert b"busy" in result.stderr
            assert await trio.to_thread.run_sync(os.getxattr, path, "user.memfs.seals") == b""
        close_all(fds)
    assert (await shell("setfattr", "-n", "user.memfs.seals", "-v", "write", path, cwd=memfs.path)).returncode == 0


@pytest.mark.parametrize("name", ["grow", "write", "future_write"])
def test_seal_on_writes_is_busy_while_somebody_passes_through(memfs: Memfs, name: str) -> None:
    path = memfs.path / "file"
    writer = os.open(path, os.O_CREAT | os.O_RDWR)
    os.write(writer, b"content")
    reader = os.open(path, os.O_RDONLY)
    with raises(errno.EBUSY):
        os.setxattr(path, "user.memfs.seals", name.encode())
    assert os.getxattr(path, "user.memfs.seals") == b""
    assert os.write(writer, b"more") == 4
    os.close(writer)
    os.setxattr(path, "user.memfs.seals", name.encode())
    assert os.pread(reader, 100, 0) == b"contentmore"
    with raises(errno.EBUSY):
        os.open(path, os.O_RDWR)
    os.close(reader)
    writer = os.open(path, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(writer, b"x", 11)
    os.close(writer)


def test_writable_mapping_of_a_file_sealed_against_writes_is_refused(memfs: Memfs) -> None:
    fd = sealed_file(memfs.path / "file", ("write",))
    with raises(errno.ENODEV):  # a FUSE server cannot make it EPERM
        mmap.mmap(fd, 4096)
    os.close(fd)


def test_exec_seal_keeps_the_x_bits(memfs: Memfs) -> None:
    path = memfs.path / "file"
    path.touch(0o644)
    os.setxattr(path, "user.memfs.seals", b"exec")
    path.chmod(0o600)
    with pytest.raises(PermissionError):
        path.chmod(0o700)
    assert path.stat().st_mode & 0o777 == 0o600


def test_names_and_numbers() -> None:
    assert {name: seals.NAMES[name] for name in KERNEL_SEALS} == KERNEL_SEALS
    assert seals.F_SEAL_GUEST == 0x20
