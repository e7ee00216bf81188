"""Getting a mounted /dev/fuse descriptor, with root's rights or without, and getting rid of the mount again.

With CAP_SYS_ADMIN we open /dev/fuse and call mount(2) ourselves. Without, the setuid helper fusermount3 does both and
passes the descriptor back over a socket whose number it finds in the environment variable _FUSE_COMMFD.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import threading
from typing import Final

from memfs.contract.sys.libc import (
    MNT_DETACH,
    MS_NOATIME,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_RELATIME,
    mount,
    umount,
)
from memfs.contract.sys.mountinfo import device_of_mountpoint, type_of_device
from memfs.options import MountOptions

_HELPER: Final = "fusermount3"
_FSTYPE: Final = "fuse.memfs"
_SOURCE: Final = "memfs"
_PATIENCE: Final = 3.0  # seconds for what is mounted already to answer


class MountError(Exception):
    """Why a filesystem cannot be mounted: one sentence for people."""


def mount_fuse(mountpoint: str, options: MountOptions) -> tuple[int, str | None]:
    """Mount a FUSE filesystem on a directory. Returns the descriptor of /dev/fuse, and what could not be had or None.

    The mount answers once somebody serves the descriptor. Raises MountError, with nothing mounted.
    """
    _clear_stale(mountpoint)
    if not os.path.isdir(mountpoint):
        raise MountError(f"{mountpoint}: not a directory to mount on")
    if not os.path.exists("/dev/fuse"):
        raise MountError("there is no /dev/fuse: load the fuse module (modprobe fuse)")
    try:
        return _mount_directly(mountpoint, options), None
    except PermissionError:
        return _mount_by_helper(mountpoint, options), f"mounted by {_HELPER}, without CAP_SYS_ADMIN: no passthrough"
    except OSError as error:
        raise MountError(f"cannot mount on {mountpoint}: {error.strerror}") from error


def _clear_stale(mountpoint: str) -> None:
    """Unmount what a killed memfs left on a directory. Raises MountError for what is not a memfs's."""
    while (device := device_of_mountpoint(mountpoint)) is not None:
        kind = type_of_device(device) or ""
        if not kind.startswith("fuse") or _is_alive(mountpoint):
            return
        if kind != _FSTYPE:
            raise MountError(f"{mountpoint}: what is mounted there is dead and not a memfs; unmount it first")
        unmount_fuse(mountpoint)
        if device_of_mountpoint(mountpoint) == device:
            raise MountError(f"{mountpoint}: a memfs that has died is mounted there, and may not be unmounted by you")


def _is_alive(mountpoint: str) -> bool:
    """Whether somebody serves a FUSE filesystem. Raises MountError if somebody ought to, and does not answer."""
    answer: list[bool] = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)  # stat(2) may be answered by the kernel's cache
        except OSError as error:
            answer.append(error.errno != errno.ENOTCONN)
        else:
            answer.append(True)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    if not answer:
        raise MountError(f"{mountpoint}: what is mounted there does not answer (is it stopped?); unmount it first")
    return answer[0]


def _mount_directly(mountpoint: str, options: MountOptions) -> int:
    flags = (
        (MS_RDONLY if options.ro else 0)
        | (0 if options.suid else MS_NOSUID)
        | (0 if options.dev else MS_NODEV)
        | (0 if options.exec else MS_NOEXEC)
        | (MS_NOATIME if options.atime == "noatime" else MS_RELATIME)
    )
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        data = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
        mount(_SOURCE, mountpoint, _FSTYPE, flags, data + ",allow_other" * options.allow_other)
    except OSError:
        os.close(fd)
        raise
    return fd


def _mount_by_helper(mountpoint: str, options: MountOptions) -> int:
    if options.suid or options.dev:
        raise MountError(f"option {'suid' if options.suid else 'dev'} is for root: {_HELPER} mounts without it")
    helper = shutil.which(_HELPER)
    if helper is None:
        raise MountError(f"no permission to mount: run as root, or install {_HELPER} (Debian package fuse3)")
    words = [
        "ro" if options.ro else "rw",
        *(["nosuid"] if not options.suid else []),
        *(["nodev"] if not options.dev else []),
        *(["noexec"] if not options.exec else []),
        *(["noatime"] if options.atime == "noatime" else []),
        *(["allow_other"] if options.allow_other else []),
        *("default_permissions", f"fsname={_SOURCE}", "subtype=memfs"),
    ]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            result = subprocess.run(
                [helper, "-o", ",".join(words), "--", mountpoint],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                capture_output=True,
                text=True,
                check=False,
            )
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if result.returncode or not fds:
        said = result.stderr.strip().removeprefix(f"{os.path.basename(helper)}: ") or "no reason given"
        raise MountError(f"no permission to mount on {mountpoint}: {_HELPER} says: {said}")
    os.set_inheritable(fds[0], False)
    return fds[0]


def unmount_fuse(mountpoint: str) -> None:
    """Unmount; if the mount is in use, so that it vanishes now and ends with its last user. Blocking: not for the loop.

    Nothing happens if it is not mounted any more.
    """
    for flags in (0, MNT_DETACH):
        try:
            umount(mountpoint, flags)
        except PermissionError:
            helper = shutil.which(_HELPER)
            if helper is not None:
                subprocess.run([helper, "-u", "-z", "-q", "--", mountpoint], check=False, capture_output=True)
            return
        except OSError:
            continue
        return
