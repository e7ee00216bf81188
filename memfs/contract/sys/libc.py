"""The system calls that Python's os module lacks, through ctypes, with its manners: bytes in, OSError out.

fallocate(2) with modes, mount(2), prctl(2) and their like go through libc; the mount API of Linux 5.2 (fsopen,
fsconfig, fsmount, move_mount, fspick) has no libc wrapper on older systems and goes through syscall(2). ctypes releases
the GIL during a call, so a long fallocate in a thread holds up nobody.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from collections.abc import Iterable
from typing import Any, Final

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_NAME: Final = 15  # linux/prctl.h

# linux/falloc.h
FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
PUNCH_HOLE: Final = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE  #: the one mode in which there is a punch

# linux/mman.h
MAP_NORESERVE: Final = 0x4000  #: of Python's mmap module from 3.13 on

# linux/mount.h
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8
MOUNT_ATTR_RDONLY: Final = 0x01
MOUNT_ATTR_NOSUID: Final = 0x02
MOUNT_ATTR_NODEV: Final = 0x04
MOUNT_ATTR_NOEXEC: Final = 0x08
MOUNT_ATTR_NOATIME: Final = 0x10
MOUNT_ATTR_NODIRATIME: Final = 0x80
MOUNT_ATTR_NOSYMFOLLOW: Final = 0x20_0000
MOUNT_ATTR__ATIME: Final = 0x70  #: all bits of which one says when access times are set
#: which one it is, by mount(8)'s option
ATIME_ATTRIBUTES: Final = {"relatime": 0, "noatime": MOUNT_ATTR_NOATIME, "strictatime": 0x20}
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_MOVE_MOUNT_BENEATH: Final = 0x200
_AT_FDCWD: Final = -100

# linux/openat2.h
_RESOLVE_NO_XDEV: Final = 0x01
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_IN_ROOT: Final = 0x10

# linux/stat.h
_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_MNT_ID: Final = 0x1000
_STATX: Final = struct.Struct("=136xIIQ104x")  # of struct statx: stx_dev_major, stx_dev_minor, stx_mnt_id


_MOUNT_ATTR: Final = struct.Struct("=QQQQ")  # struct mount_attr: attr_set, attr_clr, propagation, userns_fd

_SYS_OPEN_TREE, _SYS_MOVE_MOUNT = 428, 429  # these are the same on every architecture
_SYS_OPENAT2: Final = 437
_SYS_MOUNT_SETATTR: Final = 442
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT, _SYS_FSPICK = 430, 431, 432, 433
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_SYS_CACHESTAT: Final = 451
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = _FSPICK_CLOEXEC = 1
_FSPICK_EMPTY_PATH = 8
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE, _FSCONFIG_CMD_RECONFIGURE = 0, 1, 6, 7

_fallocate: Final = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_libc.syscall.restype = ctypes.c_long
_libc.process_vm_readv.restype = _libc.process_vm_writev.restype = ctypes.c_ssize_t


def _checked(result: int, what: str = "") -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what or None)
    return result


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2): offset and length in bytes, mode of FALLOC_FL_* bits. Raises OSError."""
    if _fallocate(fd, mode, offset, length):
        _checked(-1)


def cachestat(fd: int, ranges: Iterable[tuple[int, int]]) -> list[int]:
    """Return how many pages of each range, offset and length in bytes, are in the page cache, or swapped out.

    cachestat(2). Raises OSError: ENOSYS before Linux 6.5.
    """
    where, found, counts = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)(), list[int]()
    call = functools.partial(_libc.syscall, _SYS_CACHESTAT, fd, where, found, 0)
    for where[0], where[1] in ranges:
        if call():
            _checked(-1)
        counts.append(found[0] + found[3])  # nr_cache, nr_evicted
    return counts


def prctl(option: int, argument: int) -> None:
    """Call prctl(2), with one of PR_* and its first argument. Raises OSError."""
    _checked(_libc.prctl(option, argument, 0, 0, 0))


def setns(fd: int, kind: int) -> None:
    """Enter a namespace: setns(2). Raises OSError."""
    _checked(_libc.setns(fd, kind))


def set_thread_name(name: str) -> None:
    """Name this thread, and if it is the first its process, for ps(1): 15 bytes (prctl(2): PR_SET_NAME)."""
    buffer = ctypes.create_string_buffer(name.encode())
    prctl(_PR_SET_NAME, ctypes.addressof(buffer))


def open_in_root(root: int, path: bytes, flags: int) -> int:
    """Open a path below a directory, as if that were /, wherever links and .. lead (openat2(2)). Raises OSError.

    `root`: a descriptor of the directory. Other mounts are not entered (EXDEV), such as that of /proc.
    """
    resolve = _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    return _checked(_libc.syscall(_SYS_OPENAT2, root, path, how, ctypes.c_size_t(len(how))), os.fsdecode(path))


def capget(header: bytes, size: int) -> bytes:
    """Call capget(2): return the `size` bytes of capability sets, as the header's version has them. Raises OSError."""
    data = ctypes.create_string_buffer(size)
    _checked(_libc.capget(header, data))
    return data.raw


def capset(header: bytes, sets: bytes) -> None:
    """Call capset(2). Raises OSError."""
    _checked(_libc.capset(header, sets))


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _copy(function: Any, buffer: Any, address: int, size: int) -> None:
    ours, theirs = _IoVec(ctypes.addressof(buffer), size), _IoVec(address, size)
    if _checked(function(os.getpid(), ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)) != size:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def read_own_memory(address: int, size: int) -> bytes:
    """Return bytes of this process's memory (process_vm_readv(2)).

    Raises OSError(EFAULT) where there are none, also where to touch them is a SIGBUS: past the end of a mapped file.
    """
    buffer = (ctypes.c_char * size)()
    _copy(_libc.process_vm_readv, buffer, address, size)
    return buffer.raw


def write_own_memory(address: int, data: bytes) -> None:
    """Change bytes of this process's memory (process_vm_writev(2)). Raises OSError(EFAULT) as `read_own_memory`."""
    _copy(_libc.process_vm_writev, (ctypes.c_char * len(data)).from_buffer_copy(data), address, len(data))


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """Call mount(2). Raises OSError naming the target."""
    _checked(
        _libc.mount(os.fsencode(source), os.fsencode(target), fstype.encode(), flags, os.fsencode(data)),
        target,
    )


def umount(target: str, flags: int = 0) -> None:
    """Call umount2(2). Raises OSError naming the target."""
    _checked(_libc.umount2(os.fsencode(target), flags), target)


def _fsconfig(fs: int, options: dict[str, str | None], command: int) -> None:
    for key, value in options.items():
        if value is None:
            _checked(_libc.syscall(_SYS_FSCONFIG, fs, _FSCONFIG_SET_FLAG, key.encode(), None, 0), key)
        else:
            _checked(_libc.syscall(_SYS_FSCONFIG, fs, _FSCONFIG_SET_STRING, key.encode(), value.encode(), 0), key)
    _checked(_libc.syscall(_SYS_FSCONFIG, fs, command, None, None, 0))


def mount_detached(fstype: str, options: dict[str, str | None], *, attributes: int = 0) -> int:
    """Mount a filesystem nowhere and return a descriptor of its root, which keeps it alive (fsopen(2), fsmount(2)).

    `attributes` are MOUNT_ATTR_* bits. An option whose value is None is a flag. Raises OSError; for a refused option
    its filename is the option's name.
    """
    fs = _checked(_libc.syscall(_SYS_FSOPEN, fstype.encode(), _FSOPEN_CLOEXEC))
    try:
        _fsconfig(fs, options, _FSCONFIG_CMD_CREATE)
        return _checked(_libc.syscall(_SYS_FSMOUNT, fs, _FSMOUNT_CLOEXEC, attributes))
    finally:
        os.close(fs)


def clone_detached(root: int) -> int:
    """Return a descriptor of the root of another mount of the same filesystem, mounted nowhere (open_tree(2)).

    `root` is a descriptor of the root of a mount that is nowhere. Raises OSError: EINVAL before Linux 6.15.
    """
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_EMPTY_PATH
    return _checked(_libc.syscall(_SYS_OPEN_TREE, root, b"", flags))


def attach_mount(root: int, target: str) -> None:
    """Attach a mount that is nowhere, by the descriptor of its root, to a directory (move_mount(2)). Raises OSError.

    It comes on top of what is mounted there.
    """
    _checked(
        _libc.syscall(_SYS_MOVE_MOUNT, root, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH), target
    )


def attach_mount_beneath(root: int, top: int) -> None:
    """Attach a mount that is nowhere beneath another, by descriptors of their roots, so that it shows when that goes.

    Raises OSError: EINVAL before Linux 6.5.
    """
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH | _MOVE_MOUNT_BENEATH
    _checked(_libc.syscall(_SYS_MOVE_MOUNT, root, b"", top, b"", flags))


def set_mount_attributes(root: int, wanted: int, cleared: int) -> None:
    """Set and clear MOUNT_ATTR_* bits of a mount, by a descriptor of its root (mount_setattr(2)). Raises OSError."""
    attributes = _MOUNT_ATTR.pack(wanted, cleared, 0, 0)
    _checked(_libc.syscall(_SYS_MOUNT_SETATTR, root, b"", _AT_EMPTY_PATH, attributes, ctypes.c_size_t(len(attributes))))


def mount_of(fd: int) -> tuple[str, str]:
    """Return the mount id and the device number ("major:minor") of what a descriptor was opened through (statx(2)).

    Asks the filesystem nothing: it may be ourselves. Raises OSError.
    """
    major, minor, mount_id = _statx(fd, _STATX_MNT_ID)
    return str(mount_id), f"{major}:{minor}"


def device_of(fd: int) -> str:
    """Return the device number ("major:minor") of what a descriptor is open on, whatever mount it was opened through.

    Asks the filesystem nothing; with an empty mask even a FUSE filesystem that is not for us says this much.
    Raises OSError.
    """
    major, minor, _ = _statx(fd, 0)
    return f"{major}:{minor}"


def _statx(fd: int, mask: int) -> tuple[int, int, int]:
    """Return device number, as major and minor, and mount id, without asking the filesystem."""
    buffer = ctypes.create_string_buffer(_STATX.size)
    _checked(_libc.statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, mask, buffer))
    major, minor, mount_id = _STATX.unpack(buffer.raw)
    return major, minor, mount_id


class Remount:
    """Changes options of a filesystem, by the descriptor of its root (fspick(2)). Raises OSError, changing nothing.

    What fspick(2) returns is kept, so that a change costs two system calls; after a refusal it cannot be used again.
    """

    def __init__(self, root: int) -> None:
        self._root: Final = root
        self._fs = self._pick()

    def _pick(self) -> int:
        return _checked(_libc.syscall(_SYS_FSPICK, self._root, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH))

    def __call__(self, options: dict[str, str | None]) -> None:
        """Change these options."""
        try:
            _fsconfig(self._fs, options, _FSCONFIG_CMD_RECONFIGURE)
        except OSError:
            fresh = self._pick()
            os.close(self._fs)
            self._fs = fresh
            raise

    def close(self) -> None:
        """Close what was kept."""
        os.close(self._fs)
