"""A process that does file operations as somebody: the hands of the differential test.

Started as `python actor.py UID GID GROUP...`, it reads pickled (name, arguments) from standard input and answers on
standard output with what the operation returned, or with the name of its errno. It works relative to its current
directory, so that the same words mean the same on two filesystems, and answers nothing that two equal filesystems could
disagree about (inode numbers, descriptors, absolute times).

It is a process of its own because credentials, locks and descriptors are a process's; and it imports nothing of the
project, because whoever runs it may be nobody.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import pickle
import select
import stat
import struct
import sys
from collections.abc import Callable
from typing import Any, Final

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.linkat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
_libc.utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_SYMLINK_FOLLOW: Final = 0x400
UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2
FS_IOC_GETFLAGS: Final = 0x80086601
_OLD: Final = 1_700_000_000  # seconds: a time before this one was set on purpose, and can be compared
_CONTENT_MAX: Final = 64 << 20  # bytes of data in one file


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


def _survive(access: Callable[[], object]) -> None:
    """Try in a child what memory may be short for: of that a mapping's user dies (SIGBUS). Raises OSError(EFAULT)."""
    child = os.fork()
    if child == 0:
        access()
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise OSError(errno.EFAULT, "SIGBUS")


class Actor:
    """The operations. Slots are descriptors by number, as in a shell: 0 to 3."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._before: dict[str, tuple[int, tuple[int, ...]]] = {}  # path: inode number and times

    # -- descriptors ------------------------------------------------------------------------------------------------

    def open(self, slot: int, path: str, flags: int, mode: int) -> tuple[Any, ...]:
        self.close(slot)
        fd = os.open(path, flags | os.O_NONBLOCK, mode)
        self._slots[slot] = fd
        return _facts(os.fstat(fd))

    def close(self, slot: int) -> None:
        fd = self._slots.pop(slot, None)
        if fd is not None:
            os.close(fd)

    def _fd(self, slot: int) -> int:
        try:
            return self._slots[slot]
        except KeyError:
            raise OSError(errno.EBADF, "") from None

    def read(self, slot: int, length: int) -> bytes:
        return os.read(self._fd(slot), length)

    def write(self, slot: int, data: bytes) -> int:
        return os.write(self._fd(slot), data)

    def pread(self, slot: int, length: int, offset: int) -> bytes:
        return os.pread(self._fd(slot), length, offset)

    def pwrite(self, slot: int, data: bytes, offset: int) -> int:
        return os.pwrite(self._fd(slot), data, offset)

    def lseek(self, slot: int, offset: int, whence: int) -> int:
        fd = self._fd(slot)
        if stat.S_ISDIR(os.fstat(fd).st_mode):  # positions are the filesystem's own business there, but for the first
            return os.lseek(fd, 0, os.SEEK_SET)
        return os.lseek(fd, offset, whence)

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self._fd(slot), size)

    def fallocate(self, slot: int, mode: int, offset: int, length: int) -> None:
        _checked(_libc.fallocate(self._fd(slot), mode, offset, length))

    def fchmod(self, slot: int, mode: int) -> None:
        os.fchmod(self._fd(slot), mode)

    def fchown(self, slot: int, uid: int, gid: int) -> None:
        os.fchown(self._fd(slot), uid, gid)

    def fstat(self, slot: int) -> tuple[Any, ...]:
        return _facts(os.fstat(self._fd(slot)))

    def fsync(self, slot: int) -> None:
        os.fsync(self._fd(slot))

    def fgetxattr(self, slot: int, name: str) -> bytes:
        return os.getxattr(self._fd(slot), name)

    def getflags(self, slot: int) -> bytes:
        return bytes(fcntl.ioctl(self._fd(slot), FS_IOC_GETFLAGS, b"\0" * 8))

    def poll(self, slot: int) -> list[int]:
        poller = select.poll()
        poller.register(self._fd(slot), select.POLLIN | select.POLLOUT)
        return [events for _, events in poller.poll(0)]

    def getdents(self, slot: int) -> list[str]:
        return sorted(os.listdir(self._fd(slot)))

    def name_it(self, slot: int, path: str) -> None:
        """linkat(2) of a descriptor, which is how an O_TMPFILE gets a name."""
        source = f"/proc/self/fd/{self._fd(slot)}".encode()
        _checked(_libc.linkat(AT_FDCWD, source, AT_FDCWD, os.fsencode(path), AT_SYMLINK_FOLLOW))

    def copy_file_range(self, slot: int, other: int, length: int, source: int, target: int) -> int:
        return os.copy_file_range(self._fd(slot), self._fd(other), length, source, target)

    def map_write(self, slot: int, offset: int, data: bytes) -> int:
        """Write through a shared mapping, as much as lies within the file; the rest would be SIGBUS."""
        return self._mapped(slot, offset, data, mmap.MAP_SHARED)

    def map_private(self, slot: int, offset: int, data: bytes) -> int:
        return self._mapped(slot, offset, data, mmap.MAP_PRIVATE)

    def map_read(self, slot: int, offset: int, length: int) -> bytes:
        fd = self._fd(slot)
        length = min(length, os.fstat(fd).st_size - offset)
        if length <= 0:
            return b""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        with mmap.mmap(fd, offset - start + length, mmap.MAP_SHARED, mmap.PROT_READ, offset=start) as area:
            _survive(lambda: area[offset - start :])  # a hole is given a page, if there is one
            return area[offset - start :]

    def _mapped(self, slot: int, offset: int, data: bytes, flags: int) -> int:
        fd = self._fd(slot)
        data = data[: max(0, os.fstat(fd).st_size - offset)]
        if not data:
            return 0
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        with mmap.mmap(fd, offset - start + len(data), flags, offset=start) as area:
            _survive(lambda: area.__setitem__(slice(offset - start, None), data))
            area[offset - start :] = data  # again here: of a private mapping the child had a copy
        return len(data)

    def flock(self, slot: int, operation: int) -> None:
        fcntl.flock(self._fd(slot), operation | fcntl.LOCK_NB)

    def lockf(self, slot: int, operation: int, start: int, length: int) -> None:
        fcntl.lockf(self._fd(slot), operation | fcntl.LOCK_NB, length, start)

    # -- paths ------------------------------------------------------------------------------------------------------

    def stat(self, path: str) -> tuple[Any, ...]:
        return _facts(os.stat(path))

    def access(self, path: str, mode: int) -> bool:
        return os.access(path, mode)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def truncate(self, path: str, size: int) -> None:
        os.truncate(path, size)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(path, mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rename(self, path: str, to: str, flags: int) -> None:
        _checked(_libc.renameat2(AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(to), flags))

    def link(self, path: str, to: str, follow: bool) -> None:
        flags = AT_SYMLINK_FOLLOW if follow else 0
        _checked(_libc.linkat(AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(to), flags))

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, path)

    def readlink(self, path: str) -> str:
        return os.readlink(path)

    def mknod(self, path: str, mode: int, device: int) -> None:
        os.mknod(path, mode, device)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode)

    def chown(self, path: str, uid: int, gid: int, follow: bool) -> None:
        os.chown(path, uid, gid, follow_symlinks=follow)

    def utimens(self, path: str, atime: tuple[int, int], mtime: tuple[int, int], follow: bool) -> None:
        times = (ctypes.c_int64 * 4)(*atime, *mtime)
        flags = 0 if follow else AT_SYMLINK_NOFOLLOW
        _checked(_libc.utimensat(AT_FDCWD, os.fsencode(path), ctypes.addressof(times), flags))

    def setxattr(self, path: str, name: str, value: bytes, flags: int, follow: bool) -> None:
        os.setxattr(path, name, value, flags, follow_symlinks=follow)

    def getxattr(self, path: str, name: str, follow: bool) -> bytes:
        return os.getxattr(path, name, follow_symlinks=follow)

    def removexattr(self, path: str, name: str, follow: bool) -> None:
        os.removexattr(path, name, follow_symlinks=follow)

    def listxattr(self, path: str, follow: bool) -> list[str]:
        return sorted(os.listxattr(path, follow_symlinks=follow))

    def umask(self, mask: int) -> int:
        return os.umask(mask)

    # -- the whole ------------------------------------------------------------------------------------------------

    def begin(self, directory: str) -> None:
        """Start over, in a directory."""
        for slot in list(self._slots):
            self.close(slot)
        os.umask(0o022)
        os.chdir(directory)
        self._before.clear()

    def statfs(self) -> tuple[int, ...]:
        """Size, room and inodes of the filesystem."""
        answer = os.statvfs(".")
        return (
            *(answer.f_bsize, answer.f_frsize, answer.f_blocks, answer.f_bfree, answer.f_bavail),
            *(answer.f_files, answer.f_ffree, answer.f_favail, answer.f_namemax),
        )

    def snapshot(self) -> dict[str, Any]:
        """All there is below the current directory, and which times moved since the last snapshot.

        It leaves no trace (O_NOATIME), which only root may ask for of other people's files.
        """
        seen: dict[int, str] = {}
        answer: dict[str, Any] = {}
        before, self._before = self._before, {}
        stack = ["."]
        while stack:
            path = stack.pop()
            status = os.lstat(path)
            times = status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns
            self._before[path] = status.st_ino, times
            was_ino, was = before.get(path, (0, times))
            moved = (
                "new"
                if was_ino != status.st_ino
                else "".join(letter for letter, old, new in zip("amc", was, times, strict=True) if old != new)
            )
            answer[path] = {
                "facts": _facts(status),
                "moved": moved,
                "same as": seen.setdefault(status.st_ino, path),
                "xattrs": {name: os.getxattr(path, name, follow_symlinks=False)
                           for name in sorted(os.listxattr(path, follow_symlinks=False))},
            }  # fmt: skip
            if stat.S_ISREG(status.st_mode):
                answer[path]["content"] = _content(path)
            elif stat.S_ISDIR(status.st_mode):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME)
                try:
                    names = os.listdir(fd)
                finally:
                    os.close(fd)
                stack += [f"{path}/{name}" for name in sorted(names, reverse=True)]
        return answer


def _facts(status: os.stat_result) -> tuple[Any, ...]:
    """What two equal files have in common."""
    times = tuple(time if time < _OLD * 10**9 else "recent" for time in (status.st_atime_ns, status.st_mtime_ns))
    return (
        *(stat.filemode(status.st_mode), status.st_nlink, status.st_uid, status.st_gid, status.st_size),
        *(status.st_blocks, status.st_blksize, status.st_rdev, times),
    )


def _content(path: str) -> list[tuple[int, int, str]] | str:
    """Where there is data, and what (its hash)."""
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    try:
        if os.fstat(fd).st_blocks * 512 > _CONTENT_MAX:
            return "too much to read"
        return _runs(fd)
    finally:
        os.close(fd)


def _runs(fd: int) -> list[tuple[int, int, str]]:
    position = 0
    runs: list[tuple[int, int, str]] = []
    while True:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return runs
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        digest = hashlib.sha256(os.pread(fd, position - start, start)).hexdigest()[:16]
        runs.append((start, position, digest))


def _serve() -> None:
    actor = Actor()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    header = struct.Struct("=I")
    while size := requests.read(header.size):
        name, arguments = pickle.loads(requests.read(header.unpack(size)[0]))
        operation: Callable[..., Any] = getattr(actor, name)
        answer: tuple[str, Any]
        try:
            answer = "returned", operation(*arguments)
        except OSError as error:
            answer = "failed", errno.errorcode.get(error.errno or 0, str(error.errno))
        except ValueError as error:  # Python refuses some by itself, and then there is nothing to compare
            answer = "refused", str(error)
        reply = pickle.dumps(answer)
        answers.write(header.pack(len(reply)) + reply)
        answers.flush()


if __name__ == "__main__":
    uid, gid, *groups = map(int, sys.argv[1:])
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _serve()
