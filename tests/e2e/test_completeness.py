"""What a tmpfs can do that a state machine of single calls cannot show: locks, notification, mappings, ACLs, limits.

A case is a function that does something in an empty directory and returns what came out. It runs on memfs, with
passthrough and without, and on a tmpfs mounted beside it with the same options; the test is that nothing differs. What
must differ, and why, is in `DIFFERENT`; a difference that goes away fails there, so that the list stays true.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import shutil
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .actor import FS_IOC_GETFLAGS
from .conftest import run
from .process import USERS, Process, mounted_alike

PAGE = 4096
SIZE = 16 << 20  # of both filesystems, in bytes
OPTIONS = f"size={SIZE},nr_inodes=5000,mode=755"
MODES = ("passthrough=auto", "passthrough=off")

Case = Callable[[Path], Any]
CASES: dict[str, Case] = {}
#: case, or (case, mode): why it cannot be as on a tmpfs
DIFFERENT: dict[str | tuple[str, str], str] = {
    "bmap": "the kernel's FUSE has FIBMAP and answers 0; tmpfs has not",
    "chown_to_nobody": "the kernel sends what it sends for a write, so setuid is dropped; tmpfs refuses with EPERM",
    "pipe_times": "the kernel tells no FUSE server that something went through a pipe",
    "epoll": "the kernel's FUSE can poll, so that epoll takes a regular file; tmpfs refuses it with EPERM",
    ("sigbus_when_full", "passthrough=off"): "the page cache takes what is written to a mapping and has no limit",
    ("page_tail_is_zero", "passthrough=off"): "FUSE zeroes what a mapping wrote past the end, tmpfs keeps it",
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = _libc.readdir.restype = ctypes.c_void_p
_libc.opendir.argtypes = [ctypes.c_char_p]
_libc.readdir.argtypes = _libc.telldir.argtypes = _libc.closedir.argtypes = [ctypes.c_void_p]
_libc.telldir.restype = ctypes.c_long
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


@pytest.fixture(scope="module", params=MODES)
def pair(request: pytest.FixtureRequest, can_mount: None) -> Iterator[tuple[str, Path, Path]]:
    """The mode, a memfs mounted in it, and a tmpfs mounted alike."""
    with mounted_alike(OPTIONS, request.param) as (ours, theirs):
        yield request.param, ours, theirs


@contextlib.contextmanager
def users(directory: Path) -> Iterator[dict[str, Process]]:
    """root, alice and bob at work in a directory."""
    processes = {name: Process(*ids) for name, ids in USERS.items()}
    try:
        for process in processes.values():
            assert process("begin", str(directory)) == ("returned", None)
        yield processes
    finally:
        for process in processes.values():
            process.end()


def attempt(call: Callable[[], Any]) -> Any:
    """What a call returns, or the name of its errno."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def child(script: str, directory: Path) -> tuple[int, str]:
    """A Python program's end (negative: the signal) and words."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=directory, capture_output=True, text=True, check=False, timeout=60
    )
    return result.returncode, result.stdout + result.stderr


def shell(script: str, directory: Path) -> tuple[str, str, int]:
    environment = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    result = run("bash", "-c", script, cwd=directory, env=environment)
    return result.stdout, result.stderr.replace(str(directory), "."), result.returncode


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
    events = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert events >= 0
    try:
        assert _libc.inotify_add_watch(events, os.fsencode(directory), 0xFFF) >= 0
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
        assert _libc.statx(-100, path, 0x100, 0xFFF, buffer) == 0
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
            *(_libc.syncfs(fd), _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), 7)),
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
    answers = []
    for flags in (os.O_TMPFILE | os.O_RDWR, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, os.O_TMPFILE | os.O_RDONLY):
        fd = attempt(lambda flags=flags: os.open(directory, flags, 0o640))
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
    return _libc.name_to_handle_at(-100, os.fsencode(directory / "f"), handle, ctypes.byref(mount_id), 0)


# -- directories -----------------------------------------------------------------------------------------------


class Entries:
    """readdir(3) by hand."""

    def __init__(self, directory: Path) -> None:
        self._stream = _libc.opendir(os.fsencode(directory))
        assert self._stream

    def next(self) -> str | None:
        entry = _libc.readdir(self._stream)
        return None if not entry else os.fsdecode(ctypes.string_at(entry + 19))

    def rest(self) -> list[str]:
        return list(iter(self.next, None))

    def tell(self) -> int:
        return int(_libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        _libc.seekdir(self._stream, position)

    def close(self) -> None:
        _libc.closedir(self._stream)


@case
def readdir_under_change(directory: Path) -> Any:
    """Names that were there all the time come exactly once, whatever happens to others meanwhile."""
    for number in range(1500):
        (directory / f"keep-{number}").touch()
        (directory / f"drop-{number}").touch()
    with contextlib.closing(Entries(directory)) as entries:
        seen = [entries.next() for _ in range(700)]
        for number in range(1500):
            (directory / f"drop-{number}").unlink()
            (directory / f"new-{number % 500}").touch()
            if number % 3 == 0:
                (directory / f"keep-{number}").rename(directory / f"moved-{number}")
        seen += entries.rest()
    kept = sorted(name for name in seen if name and name.startswith("keep-") and int(name[5:]) % 3)
    assert kept == sorted(f"keep-{number}" for number in range(1500) if number % 3)
    twice = len(seen) - len(set(seen))
    return twice, sorted(set(os.listdir(directory)))


@case
def telldir_and_seekdir(directory: Path) -> Any:
    for number in range(500):
        (directory / f"{number}").touch()
    answers = []
    with contextlib.closing(Entries(directory)) as entries:
        everything, positions = [], []
        while True:
            positions.append(entries.tell())
            name = entries.next()
            if name is None:
                break
            everything.append(name)
        for index in (400, 3, 250, 0, 499):
            entries.seek(positions[index])
            answers.append(entries.next() == everything[index])
        entries.seek(positions[100])
        answers.append(entries.rest() == everything[100:])
    answers.append(len(set(positions)) == len(positions))
    return answers, sorted(everything)


@case
def removed_directory(directory: Path) -> Any:
    (directory / "d").mkdir()
    fd = os.open(directory / "d", os.O_RDONLY)
    (directory / "d").rmdir()
    answers = [
        os.listdir(fd),
        os.fstat(fd).st_nlink,
        attempt(lambda: os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))),
        attempt(lambda: os.mkdir("e", dir_fd=fd)),
        attempt(lambda: os.stat("..", dir_fd=fd).st_nlink > 0),
        attempt(lambda: os.rmdir(".", dir_fd=fd)),
    ]
    os.close(fd)
    return answers


@case
def deep_paths(directory: Path) -> Any:
    script = """
import os
for level in range(300):
    os.mkdir("d" * 20)
    os.chdir("d" * 20)
open("bottom", "w").close()
try:
    print(len(os.getcwd()) > 4096)
except OSError as error:
    print(error.errno)
print(sorted(os.listdir(".")))
for level in range(300):
    os.chdir("..")
print(sorted(os.listdir(".")))
"""
    return child(script, directory), shell("rm -rf d*; ls", directory)


@case
def long_symlinks(directory: Path) -> Any:
    return [
        (length, attempt(lambda n=length: os.symlink("x" * n, directory / f"{n}")),
         attempt(lambda n=length: len(os.readlink(directory / f"{n}"))))
        for length in (1, 127, 128, 4094, 4095, 4096)
    ]  # fmt: skip


@case
def loops_and_other_filesystems(directory: Path) -> Any:
    for number in range(45):
        os.symlink(f"{number + 1}", directory / f"{number}")
    (directory / "45").touch()
    (directory / "d" / "e").mkdir(parents=True)
    elsewhere = Path("/dev/shm") / f"memfs-test-{os.getpid()}"
    return [
        *(attempt(lambda n=number: os.stat(directory / f"{n}").st_size) for number in (0, 4, 5, 6, 10)),
        attempt(lambda: os.rename(directory / "45", elsewhere)),
        attempt(lambda: os.link(directory / "45", elsewhere)),
        attempt(lambda: os.rename(directory / "d", directory / "d" / "e" / "f")),
        attempt(lambda: os.rename(directory / "d" / "e", directory / "d")),
        attempt(lambda: os.rename(directory / "d" / ".", directory / "x")),
        attempt(lambda: os.rmdir(directory / "d" / "e" / ".")),
        attempt(lambda: os.rmdir(directory / "d" / "..")),
        attempt(lambda: os.rmdir(directory.parent)),
        attempt(lambda: os.unlink(directory / "d")),
        attempt(lambda: os.link(directory / "d", directory / "hard")),
    ]


# -- who may what -----------------------------------------------------------------------------------------------------


@case
def setuid_is_dropped(directory: Path) -> Any:
    return _drop(directory, 0o6777, 0o4777, 0o2777)


@case
def setgid_without_execution_is_dropped(directory: Path) -> Any:
    return _drop(directory, 0o6767, 0o2767)


def _drop(directory: Path, *modes: int) -> Any:
    """What is left of setuid and setgid after each way to change a file, by a stranger and by root."""
    ways: dict[str, tuple[str, tuple[Any, ...]]] = {
        "write": ("write", (0, b"x")),
        "pwrite": ("pwrite", (0, b"x", 10)),
        "ftruncate": ("ftruncate", (0, 5)),
        "same size": ("ftruncate", (0, 0)),
        "fallocate": ("fallocate", (0, 0, 0, PAGE)),
        "punch": ("fallocate", (0, 3, 0, PAGE)),
        "truncate": ("truncate", ("f", 5)),
        "open": ("open", (1, "f", os.O_WRONLY | os.O_TRUNC, 0)),
        "chown": ("chown", ("f", -1, 13000, True)),
        "map": ("map_write", (0, 0, b"x")),
    }
    answers = []
    with users(directory) as who:
        for mode in modes:
            for name, (call, arguments) in ways.items():
                for user in ("alice", "root"):
                    who["root"]("open", 1, "f", os.O_CREAT | os.O_RDWR, 0o600)
                    who["root"]("fchown", 1, 0, 0)
                    who["root"]("ftruncate", 1, PAGE if name == "map" else 0)
                    who["root"]("fchmod", 1, mode)
                    who[user]("open", 0, "f", os.O_RDWR, 0)
                    done = who[user](call, *arguments)
                    answers.append((oct(mode), name, user, done, who["root"]("stat", "f")[1][0]))
                    who["root"]("chown", "f", 12001, -1, True)
                    answers.append(who["root"]("stat", "f")[1][0])
                    who[user]("close", 0)
                    who[user]("close", 1)
                    who["root"]("close", 1)
                    who["root"]("unlink", "f")
    return answers


@case
def chown_to_nobody(directory: Path) -> Any:
    """chown(-1, -1) of a setuid file by somebody who is not its owner."""
    with users(directory) as who:
        steps = [who["root"]("open", 0, "f", os.O_CREAT | os.O_RDWR, 0o600), who["root"]("fchmod", 0, 0o4777)]
        return steps, who["alice"]("chown", "f", -1, -1, True), who["root"]("stat", "f")


@case
def sticky_directories(directory: Path) -> Any:
    answers = []
    with users(directory) as who:
        answers += [who["root"]("mkdir", "d", 0o777), who["root"]("chmod", "d", 0o1777)]
        answers += [who["alice"]("open", 0, "d/f", os.O_CREAT | os.O_RDWR, 0o666), who["alice"]("mkdir", "d/e", 0o777)]
        answers += [who["bob"]("open", 0, "d/g", os.O_CREAT | os.O_RDWR, 0o666)]
        answers += [who["bob"](*call) for call in (("unlink", "d/f"), ("rename", "d/f", "d/x", 0), ("rmdir", "d/e"))]
        answers += [who["bob"]("rename", "d/g", "d/f", 0), who["bob"]("rename", "d/g", "d/f", 2)]
        answers += [who["bob"]("link", "d/f", "d/l", False), who["alice"]("rename", "d/f", "d/h", 0)]
        # protected_regular and protected_fifos, which sysctl may have switched on
        answers += [who["bob"]("open", 1, "d/h", os.O_CREAT | os.O_RDWR, 0o666), who["bob"]("listdir", "d")]
    return answers


@case
def setgid_directories(directory: Path) -> Any:
    answers = []
    with users(directory) as who:
        answers += [who["root"]("mkdir", "d", 0o777), who["root"]("chown", "d", 0, 13000, True)]
        answers += [who["root"]("chmod", "d", 0o2777)]
        for user in ("alice", "bob", "root"):
            answers += [who[user]("umask", 0), who[user]("mkdir", f"d/{user}", 0o755)]
            answers += [who[user]("open", 0, f"d/{user}.f", os.O_CREAT | os.O_RDWR, 0o2775)]
            answers += [who[user]("mknod", f"d/{user}.p", stat.S_IFIFO | 0o2770, 0)]
            answers += [who[user]("symlink", "x", f"d/{user}.s")]
            answers += [who[user]("open", 0, "d", os.O_TMPFILE | os.O_RDWR, 0o2775)]
            answers += [who[user]("chmod", f"d/{user}.f", 0o2755), who[user]("chown", f"d/{user}.f", -1, 12001, True)]
        answers += [
            who["root"]("stat", f"d/{name}") for name in who["root"]("listdir", "d")[1] if not name.endswith(".s")
        ]
    return answers


ACL_SCRIPTS = {
    "acl": "umask 022; touch f; setfacl -m u:12001:rw,g:13000:r f; getfacl -n f; ls -l f | cut -c1-11; "
    "chmod g-w f; getfacl -n f; setfacl -b f; getfacl -n f; ls -l f | cut -c1-11",
    "default acl": "umask 022; mkdir d; setfacl -d -m u:12001:rwx,g::rx,o::- d; touch d/f; mkdir d/e; touch d/e/g; "
    "getfacl -n d d/f d/e d/e/g; stat -c %A d/f d/e d/e/g; umask 077; touch d/h; getfacl -n d/h",
    "acl refused": "touch f; ln -s f s; setfacl -m u:12001:rw s; getfacl -n f; setfacl -d -m u:1:r f; "
    "setfattr -n system.posix_acl_access -v 0x00 f; getfattr -m - -d f",
    "acl and mode": "umask 0; mkdir d; setfacl -d -m u::rw,g::r,o::- d; touch d/f; mkdir d/e; mkfifo d/p; "
    "stat -c '%n %A' d/*; setfacl -m m::x d; stat -c %A d; setfacl -k d; getfacl -n d",
}  # fmt: skip


def _acl(name: str) -> Case:
    return lambda directory: shell(ACL_SCRIPTS[name], directory)


if shutil.which("setfacl"):
    CASES.update({name: _acl(name) for name in ACL_SCRIPTS})


@case
def acl_decides(directory: Path) -> Any:
    if not shutil.which("setfacl"):
        return "no setfacl here"
    with users(directory) as who:
        answers = [who["root"]("open", 0, "f", os.O_CREAT | os.O_RDWR, 0o600), who["bob"]("open", 0, "f", os.O_RDWR, 0)]
        set_ = [run("setfacl", "-m", "u:12002:rw", directory / "f").returncode]
        return answers, set_, who["bob"]("open", 0, "f", os.O_RDWR, 0), who["alice"]("open", 0, "f", os.O_RDONLY, 0)


# -- limits ---------------------------------------------------------------------------------------------------------


@case
def attribute_limits(directory: Path) -> Any:
    path = directory / "f"
    path.touch()
    answers: list[Any] = []
    for size in (0, 1, 1000, 65535, 65536, 65537):
        answers.append(attempt(lambda n=size: os.setxattr(path, "user.a", bytes(n))))
        answers.append(attempt(lambda: len(os.getxattr(path, "user.a"))))
    answers += [attempt(lambda n=length: os.setxattr(path, "user." + "n" * n, b"")) for length in (249, 250, 251)]
    many = 0
    with contextlib.suppress(OSError):
        for many in range(2000):
            os.setxattr(path, f"user.{many:0100}", b"")
    answers.append(attempt(lambda: len(os.listxattr(path))))
    return answers


@case
def attributes_are_limited(directory: Path) -> Any:
    """Attributes of files take room (of the inodes', on a tmpfs), so that nobody fills the machine with them."""
    before = os.statvfs(directory).f_ffree
    (directory / "f").touch()
    for number in range(20):
        os.setxattr(directory / "f", f"user.{number}", bytes(10000))
    used = before - os.statvfs(directory).f_ffree
    (directory / "f").unlink()
    return used


@case
def links_are_counted(directory: Path) -> Any:
    before = os.statvfs(directory).f_ffree
    (directory / "f").touch()
    for number in range(10):
        os.link(directory / "f", directory / f"{number}")
    return before - os.statvfs(directory).f_ffree


@case
def more_than_fits(directory: Path) -> Any:
    answers = [
        shell("dd if=/dev/zero of=f bs=1M count=20 2>&1 | sed 's/copied.*//'; stat -c '%s %b' f; rm f", directory)
    ]
    answers += [
        shell("fallocate -l 10M f; fallocate -l 10M g; stat -c '%s %b' g; fallocate -l 6M g; echo x > h", directory)
    ]
    answers += [shell("stat -c '%s %b' *; cat h; truncate -s 1T f; stat -c '%s %b' f; rm *; ls", directory)]
    return answers


@case
def more_inodes_than_fit(directory: Path) -> Any:
    made = 0
    try:
        for made in range(6000):
            (directory / f"{made}").touch()
    except OSError as error:
        answer = errno.errorcode[error.errno or 0], os.statvfs(directory).f_ffree
    for number in range(made):
        (directory / f"{number}").unlink()
    return made, answer


@pytest.mark.parametrize("name", sorted(CASES))
def test_as_on_tmpfs(pair: tuple[str, Path, Path], name: str, request: pytest.FixtureRequest) -> None:
    mode, ours, theirs = pair
    reason = DIFFERENT.get(name) or DIFFERENT.get((name, mode))
    if reason:
        request.node.add_marker(pytest.mark.xfail(strict=True, reason=reason))
    answers = []
    for root in (ours, theirs):
        directory = root / name.replace(" ", "-")
        directory.mkdir()
        directory.chmod(0o777)
        try:
            answers.append(CASES[name](directory))
        finally:
            subprocess.run(["rm", "-rf", "--", directory], check=False)
    assert answers[0] == answers[1]
