"""The files of the one process: standard input, output and error of kvmsim, and files of the host, to read only.

A path is resolved below one directory of the host, by the kernel (openat2(2) with RESOLVE_IN_ROOT), so that neither ..
nor a symbolic link leads out of it, nor into another mount, such as /proc with kvmsim's own memory. Only regular files
and directories are opened, and not before that is known of them: to open a device may do something. All of it waits,
perhaps for ever, so all of it happens in threads.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from functools import partial
from typing import Any, Final

import trio

from memfs.contract.sys.libc import open_in_root

_MOST: Final = 1 << 20  #: bytes that are read or written at a time; the program asks for the rest
_MOST_FILES: Final = 256
_DIRENT: Final = struct.Struct("=QqHB")
_DT: Final = {stat.S_IFDIR: 4, stat.S_IFREG: 8, stat.S_IFLNK: 10}


async def in_thread(call: Any, *arguments: Any) -> Any:
    """Call something that may wait; if this is cancelled, nobody waits for it any more. Raises what it raises."""
    return await trio.to_thread.run_sync(partial(call, *arguments), abandon_on_cancel=True)


class File:
    """An open file, that is, what descriptors refer to."""

    def __init__(self, fd: int, *, is_ours: bool) -> None:
        self.fd: Final = fd
        self.references = 1
        self._is_ours: Final = is_ours
        self._put_back = b""  # of what cannot seek
        self._entries: list[bytes] = []  # of a directory, as they were when it was read from the beginning
        self._entry = 0  # of them, that is next

    async def read(self, size: int) -> bytes:
        """Read on; at most a mebibyte."""
        if self._put_back and size:
            data, self._put_back = self._put_back[:size], self._put_back[size:]
        else:
            data = await in_thread(os.read, self.fd, min(size, _MOST))
        return data

    async def put_back(self, data: bytes) -> None:
        """Have what was read last be read again."""
        try:
            await in_thread(os.lseek, self.fd, -len(data), os.SEEK_CUR)
        except OSError:  # a pipe or a terminal
            self._put_back = data + self._put_back

    async def seek(self, offset: int, whence: int) -> int:
        """Move to an offset and return it; of a directory, entries are counted. Raises OSError."""
        if not stat.S_ISDIR((await in_thread(os.fstat, self.fd)).st_mode):
            at: int = await in_thread(os.lseek, self.fd, offset, whence)
            return at
        offset += self._entry if whence == os.SEEK_CUR else 0
        if whence not in (os.SEEK_SET, os.SEEK_CUR) or offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._entry = offset
        return offset

    async def entries(self, size: int) -> tuple[bytes, int]:
        """Return directory entries (struct linux_dirent64) of at most so many bytes, and the offset behind them.

        Raises OSError.
        """
        if not self._entry or not self._entries:
            self._entries = await in_thread(_list, self.fd)
        found, end = b"", self._entry
        while end < len(self._entries) and len(found) + len(self._entries[end]) <= size:
            found += self._entries[end]
            end += 1
        if not found and end < len(self._entries):
            raise OSError(errno.EINVAL, "the buffer is too small for an entry")
        return found, end

    def release(self) -> None:
        """One descriptor less refers to it."""
        self.references -= 1
        if not self.references and self._is_ours:
            os.close(self.fd)


def _list(fd: int) -> list[bytes]:
    with os.scandir(fd) as listing:
        names = [(os.fsencode(each.name), each.inode(), each.stat(follow_symlinks=False).st_mode) for each in listing]
    own = os.fstat(fd).st_ino
    entries = []
    for number, (name, ino, mode) in enumerate([(b".", own, stat.S_IFDIR), (b"..", own, stat.S_IFDIR), *sorted(names)]):
        length = -(-(_DIRENT.size + len(name) + 1) // 8) * 8
        head = _DIRENT.pack(ino, number + 1, length, _DT.get(stat.S_IFMT(mode), 0))
        entries.append((head + name).ljust(length, b"\0"))
    return entries


class Files:
    """The descriptors. `root`: the directory that is the program's /; None: there are no files."""

    def __init__(self, root: str | None) -> None:
        self._root: Final = -1 if root is None else os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._open: dict[int, File] = {number: File(number, is_ours=False) for number in range(3)}
        self.directory = "/"  #: the current one

    def get(self, fd: int) -> File:
        """Return an open file. Raises OSError(EBADF)."""
        file = self._open.get(fd)
        if file is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return file

    def is_open(self, fd: int) -> bool:
        """Return whether it is a descriptor of an open file."""
        return fd in self._open

    async def lookup(self, path: bytes, *, follow: bool = True) -> int:
        """Return an O_PATH descriptor of what a path names, which the caller closes. Raises OSError."""
        if self._root < 0 or not path:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        full = os.path.join(os.fsencode(self.directory), path)
        fd: int = await in_thread(open_in_root, self._root, full, os.O_PATH | (0 if follow else os.O_NOFOLLOW))
        return fd

    async def open(self, path: bytes, flags: int) -> int:
        """Open a file to read it. Raises OSError: EROFS for anything else, EACCES for what is no file or directory."""
        if flags & (os.O_ACCMODE | os.O_CREAT | os.O_TRUNC):
            raise OSError(errno.EROFS, "files of the host are for reading")
        if len(self._open) >= _MOST_FILES:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        found = await self.lookup(path, follow=not flags & os.O_NOFOLLOW)
        try:
            mode = (await in_thread(os.fstat, found)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise OSError(errno.EACCES, "neither a file nor a directory")
            if flags & os.O_DIRECTORY and not stat.S_ISDIR(mode):
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            file = File(await in_thread(os.open, f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC), is_ours=True)
        finally:
            os.close(found)
        return self._add(file, 0)

    def _add(self, file: File, lowest: int) -> int:
        number = next(number for number in range(lowest, lowest + _MOST_FILES + 1) if number not in self._open)
        self._open[number] = file
        return number

    def duplicate(self, fd: int, lowest: int = 0, exactly: int | None = None) -> int:
        """Have another descriptor, the lowest that is free or one in particular, refer to the same file."""
        file = self.get(fd)
        if len(self._open) >= _MOST_FILES or not 0 <= (lowest if exactly is None else exactly) < _MOST_FILES:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if exactly == fd:
            return fd
        file.references += 1
        if exactly is None:
            return self._add(file, lowest)
        if exactly in self._open:
            self.close(exactly)
        self._open[exactly] = file
        return exactly

    def close(self, fd: int) -> None:
        """Close a descriptor. Raises OSError(EBADF)."""
        self.get(fd).release()
        del self._open[fd]

    def close_all(self) -> None:
        """Close everything that was opened here."""
        for fd in list(self._open):
            self.close(fd)
        if self._root >= 0:
            os.close(self._root)
