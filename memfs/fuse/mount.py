"""Mounting FUSE on a directory, with root's rights or without, and unmounting that mount and no other.

With CAP_SYS_ADMIN we open /dev/fuse and make the mount ourselves (fsopen(2), fsmount(2)). It is nowhere at first, and
is attached to its directory when it answers, so nobody ever waits for it to be served. What a killed memfs left on the
directory hides the directory until then: we attach ours beneath it and then detach the dead one, so at no moment does
the path lead to the directory itself, where others would write their files to the disk.

Without CAP_SYS_ADMIN the setuid helper fusermount3 opens /dev/fuse, mounts, and passes the descriptor back over a
socket whose number it finds in the environment variable _FUSE_COMMFD. It does not mount on what is dead, so that is
unmounted first, and for a moment there is the directory.

Which mount is ours: when we end, our path may lead to a mount of somebody else. Our mount is known by its id and device
number, and it lies where /proc/self/mountinfo says, wherever it was moved. It is detached by a descriptor of its root,
so not even a mount that takes its place at that moment is meant. Ids and device numbers are given to others again when
the filesystem is gone; while /dev/fuse is connected, it is not gone. A mount that somebody attached on top of ours
would go with it, so then ours stays, dead, until somebody unmounts both.

Rejected: umount(2) without MNT_DETACH (it unmounts whatever is on top when it is called, and fails while we hold a
descriptor that says which); MNT_EXPIRE (of a mount that is in use it unmounts nothing); a descriptor of the mount for
as long as we live (umount(8) by anybody would find the mount busy).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from memfs.contract.sys.libc import (
    ATIME_ATTRIBUTES,
    MNT_DETACH,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NODIRATIME,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_NOSYMFOLLOW,
    MOUNT_ATTR_RDONLY,
    attach_mount,
    attach_mount_beneath,
    mount_detached,
    mount_of,
    umount,
)
from memfs.contract.sys.mountinfo import MEMFS, mount_flags, mountpoint_of, mounts_on, type_of_device
from memfs.fuse.abi import invalidate_attributes
from memfs.options import MountOptions

log = logging.getLogger(__name__)

_HELPER: Final = "fusermount3"
_TIMEOUT: Final = 3.0  # seconds for what is mounted already to answer
_NEEDED: Final = ("/", "/dev", "/proc", "/run", "/sys")  # what is mounted over them cannot even be unmounted


class MountError(Exception):
    """Why a filesystem cannot be mounted: one sentence for people."""


@dataclass(slots=True)
class FuseMount:
    """A mount of ours. Its methods may block: not for the event loop."""

    mountpoint: str
    fuse_fd: int  #: the descriptor of /dev/fuse, for the channel to serve and to close
    mount_id: str
    device: str  #: device number, "major:minor"
    root: int = -1  #: a descriptor of the root while the mount is attached nowhere
    note: str | None = None  #: what could not be had; then fusermount3 has mounted it
    _is_over: bool = False
    _spare: list[int] = field(default_factory=lambda: [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in "123"])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def invalidate_attributes(self, nodeid: int) -> None:
        """Have the kernel ask for an inode's attributes again, which have changed without its knowledge."""
        with suppress(OSError):  # ENOENT: it does not know the inode any more. ENODEV: unmounted
            self.notify(invalidate_attributes(nodeid))

    def notify(self, message: bytes) -> None:
        """Write a notification to the kernel, which does not wait. Raises OSError: ENOENT, ENODEV."""
        os.write(self.fuse_fd, message)

    @property
    def is_connected(self) -> bool:
        """Whether the filesystem is still there: mounted somewhere, or in use."""
        return is_connected(self.fuse_fd)

    def is_known(self, nodeid: int) -> bool:
        """Return whether the kernel has an inode: told that its attributes have changed, it says if it has not."""
        try:
            os.write(self.fuse_fd, invalidate_attributes(nodeid))
        except OSError as error:
            return error.errno != errno.ENOENT
        return True

    def access_times(self) -> tuple[str, bool] | None:
        """Return `MountOptions.atime` and `diratime` as the mount has them now; None if it is not seen."""
        flags = mount_flags(self.mount_id, self.device)
        if flags is None:
            return None
        atime = next((each for each in ("noatime", "relatime") if each in flags), "strictatime")
        return atime, "nodiratime" not in flags

    def attach(self) -> None:
        """Let the mount be seen, in place of what a killed memfs left on the directory. Raises MountError."""
        with self._lock:
            if self.root < 0:
                return
            try:
                self._attach()
            except OSError as error:
                raise MountError(f"cannot mount on {self.mountpoint}: {error.strerror}") from error
            self._close_root()

    def attached(self) -> None:
        """Take note that another process has attached it."""
        if self.root >= 0:
            self._close_root()

    def _attach(self) -> None:
        while _is_dead(self.mountpoint):
            with _opened(self.mountpoint) as dead:
                below = mounts_on(self.mountpoint)[1:]
                if not below or type_of_device(below[0][1]) != MEMFS:
                    self._replace(dead)
                    return
                _detach(dead)  # the next one, which hides the directory, may be dead as well
        attach_mount(self.root, self.mountpoint)

    def _replace(self, dead: int) -> None:
        try:
            attach_mount_beneath(self.root, dead)
        except OSError:  # EINVAL: before Linux 6.5, or of other mount namespaces with which this one shares
            _detach(dead)
            attach_mount(self.root, self.mountpoint)
        else:
            _detach(dead)

    def unmount(self) -> None:
        """Unmount it, so that it vanishes now and ends with its last user. /dev/fuse must still be open.

        Nothing happens the second time, and if somebody else has unmounted it.
        """
        with self._lock:
            if not self._is_over:
                self._is_over = True
                while self._spare:  # to unmount takes descriptors, when there may be no others left
                    os.close(self._spare.pop())
                if self.root >= 0:
                    self._close_root()  # and with it goes the mount
                elif (path := mountpoint_of(self.mount_id, self.device)) is not None:
                    try:
                        with _opened(path) as root:
                            self._unmount(path, root)
                    except OSError as error:
                        log.warning("%s stays: %s", path, error.strerror)

    def _close_root(self) -> None:
        os.close(self.root)
        self.root = -1

    def _unmount(self, path: str, root: int) -> None:
        if mount_of(root) != (self.mount_id, self.device):
            log.warning("%s stays: another filesystem is mounted on it", path)
        elif is_connected(self.fuse_fd):
            if self.note is None:
                _detach(root)
            else:
                _detach_by_helper(path)


def mount_fuse(mountpoint: str, options: MountOptions) -> FuseMount:
    """Mount a FUSE filesystem for a directory, on which `FuseMount.attach` then lets it be seen.

    It answers once somebody serves its descriptor of /dev/fuse. Raises MountError, with nothing mounted. Blocking.
    """
    if not _is_dead(mountpoint):
        _check_directory(mountpoint)
    if not os.path.exists("/dev/fuse"):
        raise MountError("there is no /dev/fuse: load the fuse module (modprobe fuse)")
    try:
        return _mount_directly(mountpoint, options)
    except PermissionError:
        _unmount_dead(mountpoint)
        return _mount_by_helper(mountpoint, options)
    except OSError as error:
        raise MountError(f"cannot mount on {mountpoint}: {error.strerror}") from error


def _check_directory(mountpoint: str) -> None:
    """Raise MountError if a path does not lead to a directory, saying what it does."""
    try:
        is_directory = stat.S_ISDIR(os.stat(mountpoint).st_mode)
    except OSError as error:
        what_to_do = "; create it, or have it created with --mkdir" if error.errno == errno.ENOENT else ""
        raise MountError(f"{mountpoint}: {error.strerror}{what_to_do}") from error
    if not is_directory:
        raise MountError(f"{mountpoint}: not a directory to mount on")
    if os.path.realpath(mountpoint) in _NEEDED:
        raise MountError(f"{mountpoint}: programs need that directory, memfs as well; mount on one of its own")


def _is_dead(mountpoint: str) -> bool:
    """Return whether what is mounted on a directory is a memfs that was killed.

    Raises MountError if it is a memfs that lives, is dead and not a memfs, or does not answer.
    """
    mounts = mounts_on(mountpoint)
    kind = type_of_device(mounts[0][1]) if mounts else None
    if kind is None or not kind.startswith("fuse"):
        return False
    if _is_alive(mountpoint):
        if kind == MEMFS:
            raise MountError(f"{mountpoint}: a memfs is mounted there already; unmount it, or remount it to change it")
        return False
    if kind != MEMFS:
        raise MountError(f"{mountpoint}: what is mounted there is dead and not a memfs; unmount it first")
    return True


def _is_alive(mountpoint: str) -> bool:
    """Return whether somebody serves a FUSE filesystem. Raises MountError if somebody does, and does not answer."""
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
    asking.join(_TIMEOUT)
    if not answer:
        raise MountError(f"{mountpoint}: what is mounted there does not answer (is it stopped?); unmount it first")
    return answer[0]


def _unmount_dead(mountpoint: str) -> None:
    """Unmount, without root, what killed memfs left on a directory. Raises MountError."""
    while _is_dead(mountpoint):
        dead = mounts_on(mountpoint)
        _detach_by_helper(mountpoint)
        if mounts_on(mountpoint) == dead:
            raise MountError(f"{mountpoint}: a memfs that has died is mounted there, and may not be unmounted by you")


@contextmanager
def _opened(path: str) -> Iterator[int]:
    """Open a directory, or the root of what is mounted on it, with O_PATH: what is mounted is not asked."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def is_connected(fuse_fd: int) -> bool:
    """Return whether the filesystem that a descriptor of /dev/fuse serves is still there."""
    poll = select.poll()
    poll.register(fuse_fd, 0)
    return not poll.poll(0)  # an error is reported unasked


def _detach(root: int) -> None:
    """Unmount, even if it is in use, the mount of whose root this is a descriptor. Raises OSError."""
    umount(f"/proc/self/fd/{root}", MNT_DETACH)


def _detach_by_helper(mountpoint: str) -> None:
    helper = shutil.which(_HELPER)
    if helper is not None:
        with suppress(subprocess.TimeoutExpired):
            command = [helper, "-u", "-z", "-q", "--", mountpoint]
            subprocess.run(command, check=False, capture_output=True, timeout=_TIMEOUT)


def _mount_directly(mountpoint: str, options: MountOptions) -> FuseMount:
    fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    settings: dict[str, str | None] = {
        "source": options.fsname,
        "subtype": "memfs",
        "fd": str(fuse_fd),
        "rootmode": "40000",
        "user_id": str(os.geteuid()),
        "group_id": str(os.getegid()),
        "default_permissions": None,
        **({"allow_other": None} if options.allow_other else {}),
        **({"ro": None} if options.ro else {}),
    }
    attributes = (
        (MOUNT_ATTR_RDONLY if options.ro else 0)
        | (0 if options.suid else MOUNT_ATTR_NOSUID)
        | (0 if options.dev else MOUNT_ATTR_NODEV)
        | (0 if options.exec else MOUNT_ATTR_NOEXEC)
        | (0 if options.symfollow else MOUNT_ATTR_NOSYMFOLLOW)
        | ATIME_ATTRIBUTES[options.atime]
        | (0 if options.diratime else MOUNT_ATTR_NODIRATIME)
    )
    try:
        root = mount_detached("fuse", settings, attributes=attributes)
    except OSError:
        os.close(fuse_fd)
        raise
    return FuseMount(mountpoint, fuse_fd, *mount_of(root), root=root)


def _mount_by_helper(mountpoint: str, options: MountOptions) -> FuseMount:
    for_root = {"suid": options.suid, "dev": options.dev, "nodiratime": not options.diratime}
    for_root["nosymfollow"] = not options.symfollow
    for_root["strictatime"] = options.atime == "strictatime"
    for option in filter(for_root.get, for_root):
        raise MountError(f"option {option} is for root: {_HELPER} mounts without it")
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
        *("default_permissions", f"fsname={_escaped(options.fsname)}", "subtype=memfs"),
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
    mounts = mounts_on(mountpoint)
    if not mounts:
        os.close(fds[0])
        raise MountError(f"{mountpoint} was unmounted immediately")
    return FuseMount(mountpoint, fds[0], *mounts[0], note=f"mounted by {_HELPER}, without CAP_SYS_ADMIN")


def _escaped(value: str) -> str:
    """Return a value as fusermount3 takes it among options that commas separate."""
    return value.replace("\\", "\\\\").replace(",", "\\,")
