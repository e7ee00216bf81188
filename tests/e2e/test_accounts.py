"""What df, stat and ENOSPC say agree: with each other, and with what the backing has."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, ByteOffset

from .conftest import Memfs, MountMemfs
from .owner import connected

_libc = ctypes.CDLL(None, use_errno=True)
MS_NOSUID, MS_NODEV, MS_REMOUNT = 2, 4, 32  # linux/mount.h
WAYS = pytest.mark.parametrize(
    "way", ["", ",passthrough=off", ",backing=memfd"], ids=["tmpfs", "no-passthrough", "memfd"]
)


def free_pages(path: Path) -> int:
    return os.statvfs(path).f_bavail


def used_pages(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_blocks - status.f_bfree


def make_guest(path: Path, size: int) -> int:
    """Create a guest-sealed file and return a descriptor of it."""
    os.setxattr(path.parent, "user.memfs.default_seals", b"guest")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    finally:
        os.removexattr(path.parent, "user.memfs.default_seals")
    os.ftruncate(fd, size)
    return fd


def fill(path: Path, how: str) -> int:
    """Put into a file what there is space for, and return its pages."""
    fd, end = os.open(path, os.O_RDWR | os.O_CREAT), 0
    try:
        for piece in (1 << 20, PAGE_SIZE):
            try:
                while True:
                    if how == "write":
                        end += os.write(fd, b"x" * piece)
                    else:
                        fallocate(fd, 0, ByteOffset(end), piece)
                        end += piece
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        return os.fstat(fd).st_blocks // 8
    finally:
        os.close(fd)


@WAYS
@pytest.mark.parametrize("size", ["4m", "8m"])
@pytest.mark.parametrize("how", ["write", "fallocate"])
def test_there_is_as_much_space_as_df_says(mount_memfs: MountMemfs, way: str, size: str, how: str) -> None:
    memfs = mount_memfs(f"size={size}{way}")
    total = os.statvfs(memfs.path).f_blocks
    fd = make_guest(memfs.path / "private", total * PAGE_SIZE)
    fallocate(fd, FALLOC_FL_KEEP_SIZE, ByteOffset(0), PAGE_SIZE)
    for _ in range(2):
        free = free_pages(memfs.path)
        assert fill(memfs.path / "file", how) == free
        assert free_pages(memfs.path) == 0
        (memfs.path / "file").unlink()
        # Private memory comes and goes.
        fallocate(fd, FALLOC_FL_KEEP_SIZE, ByteOffset(0), total // 2 * PAGE_SIZE)
        fallocate(fd, PUNCH_HOLE, ByteOffset(0), total * PAGE_SIZE)
    fallocate(fd, FALLOC_FL_KEEP_SIZE, ByteOffset(0), total * PAGE_SIZE)  # all there is
    assert free_pages(memfs.path) == 0
    assert fill(memfs.path / "file", how) == 0  # not a page more
    os.close(fd)


def test_all_space_can_be_allocated_in_one_call(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=600m")
    fd = make_guest(memfs.path / "private", PAGE_SIZE)
    fallocate(fd, FALLOC_FL_KEEP_SIZE, ByteOffset(0), PAGE_SIZE)
    os.close(fd)
    free = free_pages(memfs.path)
    result = memfs.run("fallocate", "--length", str(free * PAGE_SIZE), "file")
    assert (result.stderr, (memfs.path / "file").stat().st_blocks // 8) == ("", free)


@pytest.fixture(params=["tmpfs-itself", "", ",passthrough=off", ",backing=memfd"])
def gibibyte(request: pytest.FixtureRequest, mount_memfs: MountMemfs, tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 GiB: a tmpfs, which says what is right, and memfs's."""
    if request.param != "tmpfs-itself":
        yield mount_memfs(f"size=1g{request.param}").path
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", tmp_path], check=True)
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("keep_size", [False, True], ids=["extends", "keeps-size"])
def test_nothing_remains_of_an_allocation_that_fails(gibibyte: Path, keep_size: bool) -> None:
    """There is space when it begins, but others write meanwhile."""
    writer, file = os.open(gibibyte / "other", os.O_RDWR | os.O_CREAT), gibibyte / "file"
    file.write_bytes(b"x" * 100)

    def write() -> None:
        with contextlib.suppress(OSError):  # it is full
            for _ in range(400):
                os.write(writer, bytes(1 << 20))

    for _ in range(3):
        thread = threading.Thread(target=write)
        thread.start()
        command = ["fallocate", *(["--keep-size"] if keep_size else []), "--length", "850m", str(file)]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        thread.join()
        stat = file.stat()
        if result.returncode:
            assert "No space left" in result.stderr
            assert (stat.st_size, stat.st_blocks) == (100, 8)
        else:
            assert (stat.st_size, stat.st_blocks) == (100 if keep_size else 850 << 20, 850 << 11)
        os.ftruncate(writer, 0)
        os.lseek(writer, 0, os.SEEK_SET)
        os.truncate(file, 100)
    os.close(writer)
    assert used_pages(gibibyte) == 1


@WAYS
@pytest.mark.parametrize("guest", [False, True], ids=["ordinary", "guest"])
async def test_what_an_owner_allocates_by_itself_is_in_use(mount_memfs: MountMemfs, way: str, guest: bool) -> None:
    """In df, in stat and for others; and it is free again with the file. (A large one: in chunks.)"""
    memfs = mount_memfs(f"size=64m{way}")
    path = memfs.path / "file"
    size = 40 << 20

    def create() -> None:
        os.close(make_guest(path, size) if guest else os.open(path, os.O_RDWR | os.O_CREAT))
        os.truncate(path, size)

    def see() -> None:
        assert path.stat().st_blocks // 8 == size // PAGE_SIZE
        free = free_pages(memfs.path)
        assert free == (64 << 20) // PAGE_SIZE - size // PAGE_SIZE
        assert fill(memfs.path / "other", "write") == free

    def see_that_all_is_free() -> None:
        path.unlink()
        (memfs.path / "other").unlink()
        deadline = time.monotonic() + 10
        while used_pages(memfs.path) and time.monotonic() < deadline:  # the daemon sees later that the owner has gone
            time.sleep(0.01)
        assert fill(memfs.path / "other", "write") == (64 << 20) // PAGE_SIZE

    await trio.to_thread.run_sync(create)
    async with connected(memfs.socket) as owner:
        _, fds = await owner.registered(path)
        with mmap.mmap(fds[0], size) as area:
            area[:] = bytes(size)
        await trio.to_thread.run_sync(see)
        for fd in fds:
            os.close(fd)
    await trio.to_thread.run_sync(see_that_all_is_free)


def test_df_works_where_more_is_in_use_than_there_may_be(mount_memfs: MountMemfs) -> None:
    """Owners can take more by themselves."""

    async def take(memfs: Memfs) -> None:
        path, total = memfs.path / "private", 8 << 20
        await trio.to_thread.run_sync(lambda: os.close(make_guest(path, total)))
        async with connected(memfs.socket) as owner:
            _, fds = await owner.registered(path)
            await trio.to_thread.run_sync(fill, memfs.path / "file", "write")
            os.pwrite(fds[0], bytes(total), 0)
            status = await trio.to_thread.run_sync(os.statvfs, memfs.path)
            assert (status.f_bfree, status.f_bavail) == (0, 0)
            assert (await trio.to_thread.run_sync(path.stat)).st_blocks == total // 512
            for fd in fds:
                os.close(fd)

    for way in ("", ",backing=memfd"):
        trio.run(take, mount_memfs(f"size=8m{way}"))


@WAYS
@pytest.mark.parametrize("flags", [os.O_CREAT | os.O_EXCL, os.O_RDWR, os.O_TRUNC, os.O_TMPFILE], ids=str)
def test_a_signal_ends_no_open_while_a_large_file_is_freed(mount_memfs: MountMemfs, way: str, flags: int) -> None:
    """The call is libc's own: Python would make it again."""
    memfs = mount_memfs(f"size=1g{way}")
    other = memfs.path / "other"
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, False)
    try:
        for _ in range(3):
            if not flags & os.O_CREAT:
                other.touch()
            subprocess.run(["fallocate", "--length", "900m", "large"], cwd=memfs.path, check=True)
            (memfs.path / "large").unlink()
            path = memfs.path if flags & os.O_TMPFILE == os.O_TMPFILE else other
            signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
            fd = _libc.open(os.fsencode(path), flags | os.O_RDWR, 0o600)
            number = ctypes.get_errno()
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert fd >= 0, errno.errorcode[number]
            os.close(fd)
            other.unlink(missing_ok=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("way", ["passthrough=off", "backing=memfd"])
@pytest.mark.parametrize("call", ["msync", "fsync", "close"])
@pytest.mark.parametrize(("free", "dirty"), [(0, 1), (1, 2), (64, 32), (100, 256), (255, 256)])
def test_what_a_mapping_loses_is_reported(mount_memfs: MountMemfs, way: str, call: str, free: int, dirty: int) -> None:
    """On tmpfs the store itself would be a SIGBUS; here the kernel asks for space when it writes back."""
    memfs = mount_memfs(f"size=4m,{way}")
    filler = os.open(memfs.path / "filler", os.O_RDWR | os.O_CREAT)
    fallocate(filler, 0, ByteOffset(0), (free_pages(memfs.path) - free) * PAGE_SIZE)
    fd = os.open(memfs.path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, dirty * PAGE_SIZE)
    area = mmap.mmap(fd, dirty * PAGE_SIZE)
    keeper = os.dup(fd)  # the mapping's own descriptor is closed by Python
    area[:] = b"x" * len(area)
    error = ""
    try:
        match call:
            case "msync":
                area.flush()
            case "fsync":
                os.fsync(fd)
            case _:
                os.close(os.dup(fd))
    except OSError as failure:
        error = errno.errorcode[failure.errno or 0]
    assert error == ("ENOSPC" if free < dirty else "")
    with contextlib.suppress(OSError):
        area.close()
    for each in (fd, keeper, filler):
        with contextlib.suppress(OSError):
            os.close(each)


_HANDLE_BYTES = 128


@pytest.mark.parametrize("kind", ["file", "directory", "link", "pipe"])
def test_a_handle_opens_what_the_kernel_has_forgotten(memfs: Memfs, kind: str) -> None:
    """The kernel asks for "." of it, whatever it is."""
    path = memfs.path / "it"
    match kind:
        case "file":
            path.write_bytes(b"content")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to("target")
        case _:
            os.mkfifo(path)
    handle = ctypes.create_string_buffer(struct.pack("Ii", _HANDLE_BYTES, 0) + bytes(_HANDLE_BYTES))
    mount_id = ctypes.c_int()
    assert _libc.name_to_handle_at(-100, os.fsencode(path), handle, ctypes.byref(mount_id), 0) == 0
    forget_all(memfs)
    root = os.open(memfs.path, os.O_RDONLY)
    fd = _libc.open_by_handle_at(root, handle, os.O_PATH)
    assert fd >= 0, errno.errorcode[ctypes.get_errno()]
    assert os.fstat(fd).st_ino == os.lstat(path).st_ino
    os.close(fd)
    os.close(root)


def forget_all(memfs: Memfs) -> None:
    """Have the kernel forget names and inodes of a mount, by a remount that changes nothing."""
    flags = MS_REMOUNT | MS_NOSUID | MS_NODEV
    assert _libc.mount(b"none", os.fsencode(memfs.path), b"none", ctypes.c_ulong(flags), None) == 0
