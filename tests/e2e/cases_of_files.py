"""Cases of test_completeness.py about files: who uses one at the same time, mappings, calls that few make."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import shutil
import socket
import stat
import struct
import subprocess
from pathlib import Path
from typing import Any

from .actor import FS_IOC_GETFLAGS
from .cases import PAGE, SIZE, attempt, case, child, libc, shell, users
from .conftest import run

# -- processes beside each other --------------------------------------------------------------------------------------


@case
def flock(directory: Path) -> Any:
    with users(directory) as who:
        steps = [who["alice"]("open", 0, "f", os.O_RDWR | os.O_CREAT, 0o666), who["alice"]("flock", 0, fcntl.LOCK_EX)]
        steps += [who["bob"]("open", 0, "f", os.O_RDONLY, 0), who["bob"]("flock", 0, fcntl.LOCK_SH)]
        steps += [who["alice"]("flock", 0, fcntl.LOCK_SH), who["bob"]("flock", 0, fcntl.LOCK_SH)]
        steps += [
            who["bob"]("flock", 0, fcntl.LOCK_EX),
            who["alice"]("close", 0),
            who["bob"]("flock", 0, fcntl.LOCK_EX),
        ]
    return steps


@case
def record_locks(directory: Path) -> Any:
    with users(directory) as who:
        steps = [who["root"]("open", 0, "f", os.O_RDWR | os.O_CREAT, 0o666), who["root"]("fchmod", 0, 0o666)]
        steps += [who["bob"]("open", 0, "f", os.O_RDWR, 0), who["root"]("lockf", 0, fcntl.LOCK_EX, 10, 10)]
        steps += [who["bob"]("lockf", 0, fcntl.LOCK_EX, start, 5) for start in (0, 5, 8, 12, 19, 20)]
        steps += [who["root"]("lockf", 0, fcntl.LOCK_UN, 12, 3), who["bob"]("lockf", 0, fcntl.LOCK_SH, 12, 3)]
        steps += [who["root"]("close", 0), who["bob"]("lockf", 0, fcntl.LOCK_EX, 0, 0)]
    return steps


@case
def leases(directory: Path) -> Any:
    path = directory / "f"
    path.touch()
    with path.open("r") as file:
        return [
            attempt(lambda: fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)),
            attempt(lambda: fcntl.fcntl(file, fcntl.F_GETLEASE)),
        ]


@case
def inotify(directory: Path) -> Any:
    events = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert events >= 0
    try:
        assert libc.inotify_add_watch(events, os.fsencode(directory), 0xFFF) >= 0
        (directory / "f").write_bytes(b"content")
        (directory / "f").read_bytes()
        (directory / "f").chmod(0o600)
        os.truncate(directory / "f", 3)
        os.link(directory / "f", directory / "l")
        (directory / "f").rename(directory / "g")
        (directory / "d").mkdir()
        os.symlink("x", directory / "s")
        os.setxattr(directory / "g", "user.a", b"1")
        (directory / "g").unlink()
        (directory / "d").rmdir()
        data, seen = os.read(events, 1 << 16), []
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            seen.append((hex(mask), data[16 : 16 + length].rstrip(b"\0")))
            data = data[16 + length :]
    finally:
        os.close(events)
    return seen


@case
def poll(directory: Path) -> Any:
    (directory / "f").touch()
    os.mkfifo(directory / "p")
    answers = []
    for name in ("f", "p", "."):
        fd = os.open(directory / name, os.O_RDONLY | os.O_NONBLOCK)
        poller = select.poll()
        poller.register(fd, select.POLLIN | select.POLLOUT | select.POLLPRI)
        answers.append([events for _, events in poller.poll(0)])
        os.close(fd)
    return answers


@case
def epoll(directory: Path) -> Any:
    with (directory / "f").open("w") as file, contextlib.closing(select.epoll()) as poller:
        return attempt(lambda: poller.register(file, select.EPOLLIN))


@case
def pipe_times(directory: Path) -> Any:
    os.mkfifo(directory / "p")
    os.utime(directory / "p", (1, 1))
    fd = os.open(directory / "p", os.O_RDWR)
    os.write(fd, b"through")
    os.read(fd, 10)
    os.close(fd)
    return os.stat(directory / "p").st_mtime == 1


@case
def unix_socket(directory: Path) -> Any:
    path = str(directory / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        listener.bind(os.path.relpath(path)) if len(path) > 100 else listener.bind(path)
        listener.listen()
        caller.connect(os.path.relpath(path) if len(path) > 100 else path)
        peer, _ = listener.accept()
        with peer:
            caller.send(b"through")
            return peer.recv(10), stat.filemode(os.stat(path).st_mode)


@case
def programs_run(directory: Path) -> Any:
    shutil.copy("/bin/sleep", directory / "sleep")
    with subprocess.Popen([directory / "sleep", "30"]) as process:
        try:
            busy = attempt(lambda: os.close(os.open(directory / "sleep", os.O_WRONLY)))
        finally:
            process.kill()
    (directory / "script").write_text("#!/bin/sh\necho ran\n")
    (directory / "script").chmod(0o755)
    return busy, shell("./script", directory)


# -- mappings ---------------------------------------------------------------------------------------------------------


@case
def mapping_is_shared(directory: Path) -> Any:
    with users(directory) as who:
        steps = [who["alice"]("open", 0, "f", os.O_RDWR | os.O_CREAT, 0o600), who["alice"]("ftruncate", 0, 3 * PAGE)]
        steps += [who["root"]("open", 0, "f", os.O_RDWR, 0)]
        for number, (writer, reader) in enumerate((("alice", "root"), ("root", "alice"))):
            steps += [who[writer]("map_write", 0, 100 + number, b"seen"), who[reader]("map_read", 0, 90, 30)]
            steps += [who[reader]("pread", 0, 30, 90), who[writer]("pwrite", 0, b"written", PAGE)]
            steps += [who[reader]("map_read", 0, PAGE, 10), who[reader]("map_private", 0, PAGE, b"mine")]
            steps += [who[writer]("pread", 0, 10, PAGE)]
    return steps


@case
def madvise_remove(directory: Path) -> Any:
    fd = os.open(directory / "f", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4 * PAGE)
    with mmap.mmap(fd, 4 * PAGE) as area:
        area[:] = b"x" * 4 * PAGE
        area.flush()
        before = os.fstat(fd).st_blocks
        area.madvise(mmap.MADV_REMOVE, PAGE, 2 * PAGE)
        after = os.fstat(fd).st_blocks
        answer = before, after, bytes(area[::1024]), os.pread(fd, 4 * PAGE, 0)[::1024]
    os.close(fd)
    return answer


_TOUCH = """
import mmap, os
fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
os.ftruncate(fd, {size})
area = mmap.mmap(fd, {mapped})
{then}
"""


@case
def sigbus_past_the_end(directory: Path) -> Any:
    past = "area[5000] = 1"
    return [
        # mmap.mmap() of Python refuses to map more than there is, so the file shrinks under it.
        child(_TOUCH.format(size=2 * PAGE, mapped=2 * PAGE, then=f"os.ftruncate(fd, 4096); {past}"), directory)[0],
        child(_TOUCH.format(size=2 * PAGE, mapped=2 * PAGE, then=f"os.ftruncate(fd, 4097); {past}"), directory)[0],
        child(_TOUCH.format(size=2 * PAGE, mapped=2 * PAGE, then="os.ftruncate(fd, 0); print(area[0])"), directory)[0],
    ]


@case
def sigbus_when_full(directory: Path) -> Any:
    big = SIZE + 64 * PAGE
    touch = f"for at in range(0, {big}, 4096): area[at] = 1"
    answer = child(_TOUCH.format(size=big, mapped=big, then=touch), directory)[0], os.statvfs(directory).f_bfree
    (directory / "f").unlink()
    run("sync", "--file-system", directory)  # so that an error of this is not somebody else's
    return answer


@case
def page_tail_is_zero(directory: Path) -> Any:
    """What is written past the end within the last page is not there when the file grows."""
    fd = os.open(directory / "f", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"x" * 100, 0)
    with mmap.mmap(fd, 100) as area:
        _write_past(area)
        area.flush()
    os.ftruncate(fd, PAGE)
    answer = os.pread(fd, PAGE, 0)
    os.close(fd)
    return answer


def _write_past(area: mmap.mmap) -> None:
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    ctypes.memset(start + 200, ord("y"), 50)


# -- calls that few make ----------------------------------------------------------------------------------------------


@case
def statx(directory: Path) -> Any:
    (directory / "f").write_bytes(b"x" * 5000)
    (directory / "d").mkdir()
    os.symlink("f", directory / "s")
    answers = []
    for name in ("f", "d", "s", "."):
        buffer = ctypes.create_string_buffer(256)
        path = os.fsencode(directory / name)
        assert libc.statx(-100, path, 0x100, 0xFFF, buffer) == 0
        # mask, blksize, attributes; nlink, uid, gid, mode; attributes_mask. Bit 0x1000 (mount id) depends on libc.
        mask, blksize, attributes = struct.unpack_from("IIQ", buffer)
        nlink, uid, gid, mode = struct.unpack_from("IIIH", buffer, 16)
        # Which attributes could be set (attributes_mask) the kernel's FUSE does not let a server say.
        answers.append((name, hex(mask & 0xFFF), blksize, attributes, nlink, uid, gid, mode))
    return answers


@case
def copy_file_range(directory: Path) -> Any:
    data = bytes(range(256)) * 64
    (directory / "f").write_bytes(data)
    source, target = (os.open(directory / name, os.O_RDWR | os.O_CREAT) for name in "fg")
    answer = [
        os.copy_file_range(source, target, 10000, 100, 50),
        os.copy_file_range(source, target, 10000, len(data) - 10, 0),
        attempt(lambda: os.copy_file_range(source, source, 100, 0, 50)),
        os.copy_file_range(source, source, 100, 0, 5000),
        os.sendfile(target, source, 3, 77),
        *(os.pread(fd, 1 << 16, 0) for fd in (source, target)),
    ]
    os.close(source)
    os.close(target)
    return answer


@case
def synchronisation(directory: Path) -> Any:
    with (directory / "f").open("wb") as file:
        file.write(b"x")
        file.flush()
        fd = file.fileno()
        return [
            attempt(lambda: os.fsync(fd)),
            attempt(lambda: os.fdatasync(fd)),
            *(libc.syncfs(fd), libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), 7)),
            attempt(lambda: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)),
        ]


@case
def ioctls(directory: Path) -> Any:
    (directory / "f").write_bytes(b"four")
    (directory / "d").mkdir()
    commands = {
        "FS_IOC_GETFLAGS": FS_IOC_GETFLAGS,
        "FS_IOC_FSGETXATTR": 0x801C581F,
        "FS_IOC_GETVERSION": 0x80087601,
        "FIONREAD": 0x541B,
        "FIGETBSZ": 2,
        "FS_IOC_FIEMAP": 0xC020660B,
        "BLKGETSIZE64": 0x80081272,
        "TCGETS": 0x5401,
        "FITRIM": 0xC0185879,
    }
    answers = []
    for name in "fd":
        fd = os.open(directory / name, os.O_RDONLY)
        answers += [(name, said, _ioctl(fd, command)) for said, command in commands.items()]
        os.close(fd)
    return answers


def _ioctl(fd: int, command: int) -> Any:
    return attempt(lambda: bytes(fcntl.ioctl(fd, command, bytes(64))))


@case
def bmap(directory: Path) -> Any:
    with (directory / "f").open("w+b") as file:
        return _ioctl(file.fileno(), 1)  # FIBMAP


@case
def set_flags(directory: Path) -> Any:
    """chattr(1)."""
    return shell(
        "touch f; chattr +a f; lsattr f | cut -c1-22; echo x > f; echo x >> f; rm f; chattr -a f; rm f; ls", directory
    )


_FORBIDDEN = """
    exec 2>&1
    echo content > f; mkdir d; echo x > d/old; exec 3<> f
    chattr {flag} f d; lsattr -d f d | cut -c1-22
    echo more >> f; echo new > f; cat f; truncate -s 3 f; truncate -s 20 f; chmod 600 f; chown 1 f; chmod 700 d
    touch f; touch -d 2001-01-01 f; touch -a f; ln f g; mv f h; rm -f f; mv -f d/old f; setfattr -n user.a -v b f
    fallocate -l 8192 f; fallocate -p -l 4096 f; fallocate -n -l 8192 f; setfacl -m u:bin:r f
    echo more >&3; cat f
    touch d/new; mkdir d/dir; ln f d/link; rm -f d/old; mv d/old d/older; mv f d; rmdir d; mv d e; touch d; ls -A . d
    chattr {off} f d; rm -r f d; ls -A
"""


@case
def immutable(directory: Path) -> Any:
    return shell(_FORBIDDEN.format(flag="+i", off="-i"), directory)


@case
def append_only(directory: Path) -> Any:
    return shell(_FORBIDDEN.format(flag="+a", off="-a"), directory)


@case
def who_sees_which_attributes(directory: Path) -> Any:
    path = directory / "f"
    path.touch(0o666)
    for name in ("user.a", "trusted.a", "security.a"):
        os.setxattr(path, name, b"1")
    with users(directory) as processes:
        return {name: process("listxattr", "f", True) for name, process in processes.items()}


@case
def temporary_files(directory: Path) -> Any:
    answers: list[Any] = []
    for flags in (os.O_TMPFILE | os.O_RDWR, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, os.O_TMPFILE | os.O_RDONLY):
        fd = attempt(os.open, directory, flags, 0o640)
        if isinstance(fd, int):
            os.write(fd, b"content")
            answers.append((os.fstat(fd).st_nlink, stat.filemode(os.fstat(fd).st_mode)))
            source = f"/proc/self/fd/{fd}"
            answers.append(attempt(lambda: os.link(source, directory / "named", follow_symlinks=True)))  # noqa: B023
            answers.append(os.fstat(fd).st_nlink)
            os.close(fd)
        else:
            answers.append(fd)
        answers.append(sorted(os.listdir(directory)))
        with contextlib.suppress(FileNotFoundError):
            answers.append((directory / "named").read_bytes())
            (directory / "named").unlink()
    return answers


@case
def devices(directory: Path) -> Any:
    os.mknod(directory / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(directory / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (directory / "null").write_bytes(b"gone")
    with (directory / "zero").open("rb") as zero:
        return zero.read(5), (directory / "null").read_bytes(), os.stat(directory / "null").st_rdev


@case
def file_handles(directory: Path) -> Any:
    (directory / "f").touch()
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
    mount_id = ctypes.c_int()
    return libc.name_to_handle_at(-100, os.fsencode(directory / "f"), handle, ctypes.byref(mount_id), 0)
