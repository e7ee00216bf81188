"""A kernel for one static program: answers its system calls, on memory that the host cannot read.

A `syscall` leaves the guest by a port (kvmsim/engines/user_mode.py). Arguments are in registers, everything else in
guest memory, which is read and written as the guest would (kvmsim/vmm/guest_memory.py): a page that the host has taken
comes back empty, as for the program itself. The numbers and structures are those of x86-64.

There are no processes beside this one, no threads and no signals: handlers can be set, and are never called. What the
program asks for and there is not is ENOSYS; `unknown` counts that, so that it can be said.
"""

from __future__ import annotations

import errno
import math
import os
import posixpath
import stat
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio

from kvmsim.engines.native import NativeEngine
from kvmsim.exits import IoExit
from kvmsim.guests.linux.files import File, Files, in_thread
from kvmsim.guests.linux.layout import STACK, AddressSpace
from kvmsim.guests.linux.numbers import NAMES
from kvmsim.vmm.guest_memory import GuestMemory
from memfs.contract.units import PAGE_SIZE, Gpa

_ERRNO_MAX: Final = 4095
_SIGPIPE_CODE: Final = 128 + 13  # as a shell has it
_PATH_MAX: Final = 4096
_IOV_MAX: Final = 1024
_AT_FDCWD: Final = -100
_AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH = 0x100, 0x1000
_MAP_FIXED, _MAP_ANONYMOUS = 0x10, 0x20
_ARCH_SET_FS, _ARCH_GET_FS = 0x1002, 0x1003
_POLL_READY: Final = 0x001 | 0x004 | 0x040 | 0x100  # POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM
_POLLNVAL: Final = 0x020
_RLIMIT_STACK: Final = 3
_INFINITY: Final = (1 << 64) - 1
_PID: Final = 1
_MOST: Final = 1 << 20  # bytes at a time

_STAT: Final = struct.Struct("=QQQIIIIQqqq6Q24x")
_TIMESPEC: Final = struct.Struct("=qq")
_IOVEC: Final = struct.Struct("=QQ")
_POLLFD: Final = struct.Struct("=ihH")

Handler = Callable[..., Awaitable[int]]


class ProgramExit(Exception):
    """The program has ended, with a code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code: Final = code


class ProgramDied(Exception):
    """Why the program has ended without saying so: one sentence."""


def _signed(value: int) -> int:
    """Return a register's content as an int of C."""
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value >> 31 else value


class Kernel:
    """The kernel of a program that runs on an engine, in an address space."""

    def __init__(self, engine: NativeEngine, memory: GuestMemory, space: AddressSpace, files: Files) -> None:
        self._engine: Final = engine
        self._memory: Final = memory
        self._space: Final = space
        self._files: Final = files
        self._fs_base = 0
        self.calls: Counter[str] = Counter()  #: by name
        self.unknown: Counter[str] = Counter()  #: of calls, those that there are not
        self._handlers: Final[dict[str, Handler]] = {
            name.removeprefix("_sys_"): getattr(self, name) for name in dir(self) if name.startswith("_sys_")
        }

    async def answer(self, exit_: IoExit) -> None:
        """Answer a system call; an OSError is the answer. Raises ProgramExit and ProgramDied; StoreGone if memfs is."""
        del exit_
        registers = self._engine.registers
        name = NAMES.get(registers.rax, f"number {registers.rax}")
        handler = self._handlers.get(name)
        self.calls[name] += 1
        if handler is None:
            self.unknown[name] += 1
            result = -errno.ENOSYS
        else:
            arguments = (registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9)
            try:
                result = await handler(*arguments)
            except OSError as error:
                number = error.errno or errno.EIO
                result = -number if number <= _ERRNO_MAX else -errno.EIO
            except OverflowError:  # a number that no system call of the host takes
                result = -errno.EINVAL
        registers.rax = result & (1 << 64) - 1
        self._engine.registers = registers

    # -- reading and writing -----------------------------------------------------------------------------------------

    async def _sys_read(self, fd: int, buffer: int, size: int, *_: int) -> int:
        return await self._read(self._files.get(fd), [(buffer, size)])

    async def _read(self, file: File, vectors: list[tuple[int, int]]) -> int:
        """Read once. What cannot be stored is there to be read again."""
        data, done = await file.read(min(sum(size for _, size in vectors), _MOST)), 0
        for buffer, size in vectors:
            try:
                await self._memory.write(Gpa(buffer), data[done : done + size])
            except OSError:
                await file.put_back(data[done:])
                if not done:
                    raise
                return done
            done = min(done + size, len(data))
        return done

    async def _sys_pread64(self, fd: int, buffer: int, size: int, offset: int, *_: int) -> int:
        data = await in_thread(os.pread, self._files.get(fd).fd, min(size, _MOST), offset)
        await self._memory.write(Gpa(buffer), data)
        return len(data)

    async def _sys_write(self, fd: int, buffer: int, size: int, *_: int) -> int:
        file = self._files.get(fd)
        return await self._write(file, await self._memory.read(Gpa(buffer), min(size, _MOST)))

    async def _write(self, file: File, data: bytes) -> int:
        try:
            written: int = await in_thread(os.write, file.fd, data)
        except BrokenPipeError:  # the signal would be the end of most programs, and some know no other
            raise ProgramExit(_SIGPIPE_CODE) from None
        return written

    async def _vectors(self, address: int, count: int) -> list[tuple[int, int]]:
        if count > _IOV_MAX:
            raise OSError(errno.EINVAL, "too many vectors")
        return list(_IOVEC.iter_unpack(await self._memory.read(Gpa(address), count * _IOVEC.size)))

    async def _sys_readv(self, fd: int, vectors: int, count: int, *_: int) -> int:
        return await self._read(self._files.get(fd), await self._vectors(vectors, count))

    async def _sys_writev(self, fd: int, vectors: int, count: int, *_: int) -> int:
        data = b""
        for buffer, size in await self._vectors(vectors, count):
            data += await self._memory.read(Gpa(buffer), min(size, _MOST - len(data)))
        return await self._write(self._files.get(fd), data)

    async def _sys_lseek(self, fd: int, offset: int, whence: int, *_: int) -> int:
        offset -= (1 << 64) if offset >> 63 else 0
        return await self._files.get(fd).seek(offset, whence)

    async def _sys_sendfile(self, to: int, fd: int, offset: int, size: int, *_: int) -> int:
        if offset:
            raise OSError(errno.EINVAL, "only from where the file is at")
        target, file = self._files.get(to), self._files.get(fd)
        try:
            at = await file.seek(0, os.SEEK_CUR)
        except OSError as error:  # a pipe or a terminal; programs read and write then
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from error
        written = await self._write(target, await in_thread(os.pread, file.fd, min(size, _MOST), at))
        await file.seek(at + written, os.SEEK_SET)
        return written

    async def _sys_ioctl(self, fd: int, *_: int) -> int:
        self._files.get(fd)
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    async def _sys_poll(self, fds: int, count: int, most: int, *_: int) -> int:
        if count > _IOV_MAX:
            raise OSError(errno.EINVAL, "too many descriptors")
        data = bytearray(await self._memory.read(Gpa(fds), count * _POLLFD.size))
        ready = 0
        for at in range(0, len(data), _POLLFD.size):
            fd, events, _revents = _POLLFD.unpack_from(data, at)
            revents = 0
            if fd >= 0:  # a read waits, and so does a write: what is open is ready for that
                revents = events & _POLL_READY if self._files.is_open(fd) else _POLLNVAL
            _POLLFD.pack_into(data, at, fd, events, revents)
            ready += bool(revents)
        if not ready:
            milliseconds = _signed(most)
            await trio.sleep(milliseconds / 1000 if milliseconds >= 0 else math.inf)
        await self._memory.write(Gpa(fds), bytes(data))
        return ready

    # -- files --------------------------------------------------------------------------------------------------------

    async def _path(self, address: int) -> bytes:
        return await self._memory.read_string(Gpa(address), _PATH_MAX)

    async def _path_at(self, directory: int, address: int) -> bytes:
        path = await self._path(address)
        if path and not path.startswith(b"/") and _signed(directory) != _AT_FDCWD:
            raise OSError(errno.ENOTSUP, "paths from a directory's descriptor")
        return path

    async def _sys_open(self, path: int, flags: int, *_: int) -> int:
        return await self._files.open(await self._path(path), flags)

    async def _sys_openat(self, directory: int, path: int, flags: int, *_: int) -> int:
        return await self._files.open(await self._path_at(directory, path), flags)

    async def _sys_close(self, fd: int, *_: int) -> int:
        self._files.close(fd)
        return 0

    async def _sys_dup(self, fd: int, *_: int) -> int:
        return self._files.duplicate(fd)

    async def _sys_dup2(self, fd: int, to: int, *_: int) -> int:
        return self._files.duplicate(fd, exactly=to)

    async def _sys_dup3(self, fd: int, to: int, *_: int) -> int:
        return self._files.duplicate(fd, exactly=to)

    async def _sys_fcntl(self, fd: int, command: int, argument: int, *_: int) -> int:
        file = self._files.get(fd)
        match command:
            case 0 | 1030:  # F_DUPFD, F_DUPFD_CLOEXEC
                return self._files.duplicate(fd, argument)
            case 1 | 2:  # F_GETFD, F_SETFD: nothing is ever executed in its place
                return 0
            case 3:  # F_GETFL
                return os.O_RDWR if file.fd < 3 else os.O_RDONLY
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    async def _sys_getdents64(self, fd: int, buffer: int, size: int, *_: int) -> int:
        file = self._files.get(fd)
        data, end = await file.entries(min(size, _MOST))
        await self._memory.write(Gpa(buffer), data)
        await file.seek(end, os.SEEK_SET)
        return len(data)

    async def _write_stat(self, buffer: int, fd: int) -> int:
        found = await in_thread(os.fstat, fd)
        times = [part for at in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns) for part in divmod(at, 10**9)]
        data = _STAT.pack(
            *(found.st_dev, found.st_ino, found.st_nlink, found.st_mode, found.st_uid, found.st_gid, 0),
            *(found.st_rdev, found.st_size, found.st_blksize, found.st_blocks, *times),
        )
        await self._memory.write(Gpa(buffer), data)
        return 0

    async def _stat_path(self, path: bytes, buffer: int, *, follow: bool) -> int:
        fd = await self._files.lookup(path, follow=follow)
        try:
            return await self._write_stat(buffer, fd)
        finally:
            os.close(fd)

    async def _sys_stat(self, path: int, buffer: int, *_: int) -> int:
        return await self._stat_path(await self._path(path), buffer, follow=True)

    async def _sys_lstat(self, path: int, buffer: int, *_: int) -> int:
        return await self._stat_path(await self._path(path), buffer, follow=False)

    async def _sys_fstat(self, fd: int, buffer: int, *_: int) -> int:
        return await self._write_stat(buffer, self._files.get(fd).fd)

    async def _sys_newfstatat(self, directory: int, path: int, buffer: int, flags: int, *_: int) -> int:
        name = await self._path_at(directory, path)
        if not name and flags & _AT_EMPTY_PATH:
            return await self._sys_fstat(directory, buffer)
        return await self._stat_path(name, buffer, follow=not flags & _AT_SYMLINK_NOFOLLOW)

    async def _sys_access(self, path: int, mode: int, *_: int) -> int:
        return await self._access(await self._path(path), mode)

    async def _sys_faccessat(self, directory: int, path: int, mode: int, *_: int) -> int:
        return await self._access(await self._path_at(directory, path), mode)

    async def _access(self, path: bytes, mode: int) -> int:
        """Check as for root, which the program is told that it is."""
        if _signed(mode) & ~(os.R_OK | os.W_OK | os.X_OK):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd = await self._files.lookup(path)
        try:
            found = (await in_thread(os.fstat, fd)).st_mode
        finally:
            os.close(fd)
        if mode & os.X_OK and not (stat.S_ISDIR(found) or found & 0o111):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        if mode & os.W_OK:
            raise OSError(errno.EROFS, "files of the host are for reading")
        return 0

    async def _sys_readlink(self, path: int, buffer: int, size: int, *_: int) -> int:
        fd = await self._files.lookup(await self._path(path), follow=False)
        try:
            target = os.fsencode(await in_thread(partial(os.readlink, "", dir_fd=fd)))[:size]
        finally:
            os.close(fd)
        await self._memory.write(Gpa(buffer), target)
        return len(target)

    async def _sys_getcwd(self, buffer: int, size: int, *_: int) -> int:
        name = os.fsencode(self._files.directory) + b"\0"
        if len(name) > size:
            raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
        await self._memory.write(Gpa(buffer), name)
        return len(name)

    async def _sys_chdir(self, path: int, *_: int) -> int:
        name = await self._path(path)
        self._files.close(await self._files.open(name, os.O_DIRECTORY))
        self._files.directory = posixpath.normpath(posixpath.join(self._files.directory, os.fsdecode(name)))
        return 0

    # -- memory -------------------------------------------------------------------------------------------------------

    async def _sys_brk(self, address: int, *_: int) -> int:
        return await self._space.brk(address)

    async def _sys_mmap(self, address: int, size: int, _: int, flags: int, fd: int, offset: int) -> int:
        content = b""
        if not flags & _MAP_ANONYMOUS:
            if size > self._space.stack_top:
                raise OSError(errno.ENOMEM, "larger than guest memory")
            content = await in_thread(os.pread, self._files.get(fd & 0xFFFF_FFFF).fd, size, offset)
        start = await self._space.map(size, address if flags & _MAP_FIXED else None)
        await self._memory.write(Gpa(start), content)
        return start

    async def _sys_munmap(self, address: int, size: int, *_: int) -> int:
        self._space.unmap(address, size)
        return 0

    async def _sys_mprotect(self, *_: int) -> int:
        return 0

    async def _sys_madvise(self, *_: int) -> int:
        return 0  # advice

    async def _sys_mremap(self, *_: int) -> int:
        raise OSError(errno.ENOMEM, "a mapping stays as it is")

    # -- the process --------------------------------------------------------------------------------------------------

    async def _sys_exit(self, code: int, *_: int) -> int:
        raise ProgramExit(code & 0xFF)

    async def _sys_exit_group(self, code: int, *_: int) -> int:
        raise ProgramExit(code & 0xFF)

    async def _sys_kill(self, pid: int, number: int, *_: int) -> int:
        if _signed(pid) not in (_PID, 0, -1):
            raise OSError(errno.ESRCH, os.strerror(errno.ESRCH))
        if number:
            raise ProgramDied(f"the program died: it sent itself signal {number}")
        return 0

    async def _sys_tgkill(self, _: int, thread: int, number: int, *__: int) -> int:
        return await self._sys_kill(thread, number)

    async def _sys_arch_prctl(self, code: int, address: int, *_: int) -> int:
        if code == _ARCH_SET_FS:
            self._fs_base = address
            self._engine.set_fs_base(address)
        elif code == _ARCH_GET_FS:
            await self._memory.write(Gpa(address), struct.pack("=Q", self._fs_base))
        else:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return 0

    async def _sys_prlimit64(self, _: int, resource: int, new: int, old: int, *__: int) -> int:
        if new:
            raise OSError(errno.EPERM, "limits are as they are")
        if old:
            limit = STACK if resource == _RLIMIT_STACK else _INFINITY
            await self._memory.write(Gpa(old), struct.pack("=QQ", limit, limit))
        return 0

    async def _sys_getrlimit(self, resource: int, old: int, *_: int) -> int:
        return await self._sys_prlimit64(0, resource, 0, old)

    async def _sys_uname(self, buffer: int, *_: int) -> int:
        fields = (b"Linux", b"guest", b"6.1.0", b"kvmsim", b"x86_64", b"(none)")
        await self._memory.write(Gpa(buffer), b"".join(field.ljust(65, b"\0") for field in fields))
        return 0

    async def _zero(self, *_: int) -> int:
        """Answer what has no effect here, or what root, or the only process, is told."""
        return 0

    _sys_getuid = _sys_geteuid = _sys_getgid = _sys_getegid = _sys_umask = _zero
    _sys_rt_sigaction = _sys_rt_sigprocmask = _sys_sigaltstack = _sys_set_robust_list = _zero
    _sys_getppid = _sys_setpgid = _sys_prctl = _sys_sched_yield = _zero

    async def _one(self, *_: int) -> int:
        """Answer who the only process is."""
        return _PID

    _sys_getpid = _sys_gettid = _sys_getpgrp = _sys_getpgid = _sys_getsid = _sys_set_tid_address = _one

    async def _sys_rseq(self, *_: int) -> int:
        raise OSError(errno.ENOSYS, "as before Linux 4.18; each program of glibc's asks")

    async def _sys_futex(self, _: int, operation: int, *__: int) -> int:
        if operation & 0x7F == 1:  # FUTEX_WAKE: nobody waits
            return 0
        raise OSError(errno.EDEADLK, "nobody would wake the only thread")

    # -- time and chance ----------------------------------------------------------------------------------------------

    async def _sys_clock_gettime(self, clock: int, buffer: int, *_: int) -> int:
        await self._memory.write(Gpa(buffer), _TIMESPEC.pack(*divmod(time.clock_gettime_ns(clock), 10**9)))
        return 0

    async def _sys_gettimeofday(self, buffer: int, *_: int) -> int:
        if buffer:
            await self._memory.write(Gpa(buffer), _TIMESPEC.pack(*divmod(time.time_ns() // 1000, 10**6)))
        return 0

    async def _sys_time(self, buffer: int, *_: int) -> int:
        now = int(time.time())
        if buffer:
            await self._memory.write(Gpa(buffer), struct.pack("=q", now))
        return now

    async def _sys_nanosleep(self, request: int, *_: int) -> int:
        seconds, nanoseconds = _TIMESPEC.unpack(await self._memory.read(Gpa(request), _TIMESPEC.size))
        if seconds < 0 or not 0 <= nanoseconds < 10**9:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        await trio.sleep(seconds + nanoseconds / 10**9)
        return 0

    async def _sys_clock_nanosleep(self, _: int, flags: int, request: int, *__: int) -> int:
        if flags:
            raise OSError(errno.EINVAL, "until a moment")
        return await self._sys_nanosleep(request)

    async def _sys_getrandom(self, buffer: int, size: int, *_: int) -> int:
        data = os.urandom(min(size, _MOST))
        await self._memory.write(Gpa(buffer), data)
        return len(data)

    async def _sys_sysinfo(self, buffer: int, *_: int) -> int:
        memory = self._space.stack_top // PAGE_SIZE
        data = struct.pack("=q3Q6QH6x2QI4x", 0, 0, 0, 0, memory, 0, 0, 0, 0, 0, 1, 0, 0, PAGE_SIZE)
        await self._memory.write(Gpa(buffer), data)
        return 0
