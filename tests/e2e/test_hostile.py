"""A client of the socket that means harm: who gets in, and what it can do with what an owner is given."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from memfs.contract.page_map import PageMapView
from memfs.contract.protocol.messages import Register, Registered
from memfs.contract.protocol.peer import close_all
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, PageIndex, PageRange
from tests.helpers import HELLO, raises

from .conftest import Memfs, memfs_command, run, start_memfs
from .owner import connected, shell
from .tools import skip_without

SIZE = 1 << 20
NOBODY, GROUP = 65534, 13000
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def guest_file(memfs: Memfs) -> Path:
    """A guest-sealed file of 1 MiB, its first half allocated."""
    path = memfs.path / "private"
    subprocess.run(memfs_command("create", "--seals", "guest", "--size", str(SIZE), path), check=True)
    subprocess.run(["fallocate", "-l", str(SIZE // 2), path], check=True)
    return path


# -- who gets in -------------------------------------------------------------------------------------------------------

CONNECT = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    sock.connect(sys.argv[1])
    sock.send(bytes.fromhex(sys.argv[-1]))
    print("admitted" if sock.recv(100)[2:4] == b'\\2\\0' else "rejected")  # HelloReply
except ConnectionError:
    print("rejected")
except PermissionError:
    print("refused")
"""


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory where every user gets to."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user takes root")
    skip_without("setpriv")
    with tempfile.TemporaryDirectory(prefix="memfs-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def connect_as(uid: int, groups: str, path: Path) -> str:
    drop = ["setpriv", f"--reuid={uid}", "--regid=65534", *groups.split()]
    return run(*drop, sys.executable, "-I", "-c", CONNECT, path, HELLO.hex(), cwd="/").stdout.strip()


MEMBER, STRANGER = f"--groups={GROUP}", "--clear-groups"


@pytest.mark.parametrize(
    ("options", "mode", "stranger", "member"),
    [
        ("", 0o600, "refused", "refused"),
        (",socket_mode=0666", 0o666, "admitted", "admitted"),
        (f",socket_mode=660,socket_group={GROUP}", 0o660, "refused", "admitted"),
    ],
)
def test_socket_lets_in_whom_the_options_say(
    open_directory: Path, can_mount: None, options: str, mode: int, stranger: str, member: str
) -> None:
    memfs = start_memfs(open_directory, f"size=1m{options}")
    try:
        status = memfs.socket.stat()
        assert stat.S_IMODE(status.st_mode) == mode
        assert status.st_gid == (GROUP if "socket_group" in options else os.getegid())
        assert connect_as(NOBODY, STRANGER, memfs.socket) == stranger
        assert connect_as(NOBODY, MEMBER, memfs.socket) == member
        # What somebody does to the file later counts for nothing.
        memfs.socket.chmod(0o666)
        memfs.expected.append("does not admit it")
        assert connect_as(NOBODY, STRANGER, memfs.socket) == ("admitted" if stranger == "admitted" else "rejected")
        assert connect_as(NOBODY, MEMBER, memfs.socket) == ("admitted" if member == "admitted" else "rejected")
        assert connect_as(0, STRANGER, memfs.socket) == "admitted"
        memfs.stop()
    finally:
        memfs.kill()


def test_socket_is_not_put_where_others_could_replace_it(open_directory: Path) -> None:
    (open_directory / "mnt").mkdir()
    for owner, mode, words in (
        (NOBODY, 0o755, "belongs to another user"),
        (0, 0o777, "may replace"),
        (0, 0o775, "may replace"),
    ):
        os.chown(open_directory, owner, 0)
        open_directory.chmod(mode)
        arguments = ("mount", open_directory / "mnt", "--socket", open_directory / "sock", "-o", "size=1m")
        result = run(*memfs_command(*arguments))
        assert result.returncode == 1
        assert words in result.stderr
        assert sorted(open_directory.iterdir()) == [open_directory / "mnt"]
        assert not os.path.ismount(open_directory / "mnt")


# -- the page map ------------------------------------------------------------------------------------------------------


def _map_writable(fd: int) -> None:
    mmap.mmap(fd, 2 * PAGE_SIZE)[PAGE_SIZE] = 0


def _make_mapping_writable(fd: int) -> None:
    address = _mapped(fd)
    _checked(_libc.mprotect(address, ctypes.c_size_t(2 * PAGE_SIZE), 3))  # PROT_READ | PROT_WRITE
    ctypes.memset(address.value + PAGE_SIZE, 0, 1)  # type: ignore[operator]


def _remove_through_mapping(fd: int) -> None:
    _checked(_libc.madvise(_mapped(fd), ctypes.c_size_t(2 * PAGE_SIZE), 9))  # MADV_REMOVE


def _write_own_memory(fd: int) -> None:
    """As a debugger would, past the protection of the mapping."""
    address = _mapped(fd)
    memory = os.open("/proc/self/mem", os.O_RDWR)
    try:
        os.pwrite(memory, b"\0" * 8, address.value + PAGE_SIZE)  # type: ignore[operator]
    finally:
        os.close(memory)


def _splice(fd: int) -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"\0" * 8)
        os.splice(reader, fd, 8, offset_dst=PAGE_SIZE)
    finally:
        close_all((reader, writer))


def _copy_file_range(fd: int) -> None:
    source = os.memfd_create("source")  # of the same filesystem, as it has to be
    try:
        os.write(source, b"\0" * 8)
        os.copy_file_range(source, fd, 8, 0, PAGE_SIZE)
    finally:
        os.close(source)


def _mapped(fd: int) -> ctypes.c_void_p:
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    address = _libc.mmap(None, 2 * PAGE_SIZE, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    assert address != ctypes.c_void_p(-1).value
    return ctypes.c_void_p(address)


def _checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


ATTACKS: dict[str, Callable[[int], object]] = {
    "mmap": _map_writable,
    "mprotect": _make_mapping_writable,
    "MADV_REMOVE": _remove_through_mapping,
    "/proc/self/mem": _write_own_memory,
    "write": lambda fd: os.pwrite(fd, b"\0" * 8, PAGE_SIZE),
    "pwritev": lambda fd: os.pwritev(fd, [b"\0" * 8], PAGE_SIZE),
    "splice": _splice,
    "copy_file_range": _copy_file_range,
    "fallocate": lambda fd: fallocate(fd, FALLOC_FL_KEEP_SIZE, 1 << 33, PAGE_SIZE),
    "punch": lambda fd: fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, PAGE_SIZE, PAGE_SIZE),
    "shrink": lambda fd: os.ftruncate(fd, 0),
    "grow": lambda fd: os.ftruncate(fd, 1 << 40),
    "seal": lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
}


@pytest.mark.parametrize("name", ATTACKS)
async def test_page_map_cannot_be_written(memfs: Memfs, guest_file: Path, name: str) -> None:
    """Neither through the descriptor that an owner gets nor through one opened anew, which even root may not."""
    if os.geteuid() != 0:
        pytest.skip("without root the page map is a memfd (unit/memfs/contract/test_page_map.py)")
    async with connected(memfs.socket) as owner:
        _, fds = await owner.registered(guest_file)
        page_map = PageMapView(fds[1])
        before = _all_of(fds[1])
        for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC):
            with raises(errno.EROFS):
                os.open(f"/proc/self/fd/{fds[1]}", flags)
        with raises(errno.EROFS):
            os.fchmod(fds[1], 0o666)
        with raises(errno.EPERM, errno.EACCES, errno.EBADF, errno.EIO, errno.EFAULT, errno.EINVAL):
            ATTACKS[name](fds[1])
        assert _all_of(fds[1]) == before
        assert page_map.count(PageRange(PageIndex(0), PageIndex(SIZE // PAGE_SIZE))) == SIZE // 2 // PAGE_SIZE
        page_map.close()
        close_all(fds)


def _all_of(fd: int) -> tuple[object, ...]:
    """What a file is, but for its times, which looking changes."""
    status = os.fstat(fd)
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    return status.st_mode, status.st_size, status.st_blocks, seals, os.pread(fd, 2 * PAGE_SIZE, 0)


# -- the backing file --------------------------------------------------------------------------------------------------


def flags_in(memfs: Memfs) -> list[int]:
    """The flags of the daemon's descriptors, but for that of its log."""
    process = Path(f"/proc/{memfs.process.pid}")
    flags = []
    for name in os.listdir(process / "fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(process / "fd" / name) != str(memfs.log):
                flags.append(int((process / "fdinfo" / name).read_text().split("flags:")[1].split()[0], 8))
    assert flags
    return flags


async def test_owner_has_a_description_of_its_own(memfs: Memfs, guest_file: Path) -> None:
    """Flags and position of a description that it shared with the daemon would be the daemon's."""
    await shell("sh", "-c", "echo 0123456789 > shared", cwd=memfs.path)
    async with connected(memfs.socket) as owner:
        for path in (memfs.path / "shared", guest_file):
            _, fds = await owner.registered(path)
            fcntl.fcntl(fds[0], fcntl.F_SETFL, os.O_APPEND)
            await owner.register(path)  # by now it has closed what it has just sent
            assert not any(flags & os.O_APPEND for flags in flags_in(memfs))
            close_all(fds)


async def test_file_sealed_against_writes_is_not_given_for_writing(memfs: Memfs) -> None:
    path = memfs.path / "shared"
    await shell("sh", "-c", "echo content > shared", cwd=memfs.path)
    await trio.to_thread.run_sync(os.setxattr, path, "user.memfs.seals", b"write")
    fd = await trio.to_thread.run_sync(os.open, path, os.O_RDWR)
    async with connected(memfs.socket) as owner:
        reply = await owner.client.request(Register(), [fd])
        assert isinstance(reply.message, Registered)
        with raises(errno.EBADF):
            os.pwrite(reply.fds[0], b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(reply.fds[0], 8)
        assert os.pread(reply.fds[0], 100, 0) == b"content\n"
        close_all(reply.fds)
    await trio.to_thread.run_sync(os.close, fd)


async def test_file_that_an_owner_can_write_is_not_sealed_against_writes(memfs: Memfs) -> None:
    await shell("touch", "shared", cwd=memfs.path)
    async with connected(memfs.socket) as owner:
        _, fds = await owner.registered(memfs.path / "shared")
    # The owner is gone, and its descriptor is not.
    os.write(fds[0], b"content")
    busy = await shell(*memfs_command("seal", "shared", "write"), cwd=memfs.path)
    assert b"has it open for writing" in busy.stderr
    assert (await shell(*memfs_command("seals", "shared"), cwd=memfs.path)).stdout == b"\n"
    close_all(fds)


async def test_registering_with_the_first_descriptor_that_is_ever_closed(memfs: Memfs) -> None:
    """Closing it, the daemon is asked by the kernel whether there is something to flush: by itself, that is."""
    fd = await trio.to_thread.run_sync(os.open, memfs.path / "file", os.O_RDWR | os.O_CREAT)
    with trio.fail_after(10):
        async with connected(memfs.socket) as owner:
            assert isinstance(await owner.ask(Register(), [fd]), Registered)
    await trio.to_thread.run_sync(os.close, fd)
