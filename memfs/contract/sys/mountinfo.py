"""What is mounted where, from /proc, without asking the filesystem itself: that may be us, or hang."""

from __future__ import annotations

import os
from typing import Final, NamedTuple

MEMFS: Final = "fuse.memfs"  #: the type of our mounts, with the subtype


def device_of_mountpoint(mountpoint: str) -> str | None:
    """Return the device number ("major:minor") of what is mounted on a directory, without asking the filesystem itself.

    None if nothing is. `mountpoint` must be absolute and without symbolic links (`real_mountpoint`).
    """
    return next((device for _, device in mounts_on(mountpoint)), None)


def mounts_on(mountpoint: str) -> list[tuple[str, str]]:
    """Return mount id and device number ("major:minor") of each mount on a directory, first of the one that is seen."""
    rows = {fields[0]: fields for fields in _mountinfo() if _unescape(fields[4]) == mountpoint}
    covered = {fields[1] for fields in rows.values()}
    seen = next((each for each in reversed(rows) if each not in covered), "")
    mounts = []
    while seen in rows:
        mounts.append((seen, rows[seen][2]))
        seen = rows[seen][1]
    return mounts


def mountpoint_of(mount_id: str, device: str) -> str | None:
    """Return where a mount lies in our mount namespace, wherever it was moved; None if it does not any more.

    The device is asked for as well, because ids are given to others again.
    """
    return next(
        (_unescape(fields[4]) for fields in _mountinfo() if fields[0] == mount_id and fields[2] == device), None
    )


def mount_flags(mount_id: str, device: str) -> frozenset[str] | None:
    """Return the options of a mount itself, such as ro and relatime; None if it is not in our mount namespace."""
    return next(
        (frozenset(fields[5].split(",")) for fields in _mountinfo() if fields[0] == mount_id and fields[2] == device),
        None,
    )


def real_mountpoint(path: str) -> str:
    """Return a path, absolute and without symbolic links (os.path.realpath), without asking what is mounted there."""
    directory, name = os.path.split(os.path.abspath(path))
    mountpoint = os.path.join(os.path.realpath(directory), name)
    return mountpoint if device_of_mountpoint(mountpoint) is not None else os.path.realpath(path)


def type_of_device(device: str) -> str | None:
    """Return the filesystem type, with its subtype ("fuse.memfs"), of what is mounted from a device ("major:minor")."""
    return next(
        (fields[fields.index("-") + 1] for fields in _mountinfo() if fields[2] == device and "-" in fields), None
    )


def mountpoints_of_type(kind: str) -> list[str]:
    """Return where filesystems of a type, with its subtype ("fuse.memfs"), are mounted in our mount namespace."""
    return [_unescape(fields[4]) for fields in _mountinfo() if "-" in fields and fields[fields.index("-") + 1] == kind]


def mountpoints_below(mountpoint: str) -> list[str]:
    """Return where other filesystems are mounted on directories of the one that is seen at a mountpoint."""
    seen = next((mount_id for mount_id, _ in mounts_on(mountpoint)), "")
    return [_unescape(fields[4]) for fields in _mountinfo() if fields[1] == seen]


def mounter_of(mountpoint: str) -> int | None:
    """Return the uid of who mounted the FUSE filesystem that is seen at a mountpoint; None if none is."""
    seen = next((mount_id for mount_id, _ in mounts_on(mountpoint)), "")
    _, options = type_and_options(seen) or ("", "")
    ids = (option.removeprefix("user_id=") for option in options.split(",") if option.startswith("user_id="))
    return next(map(int, ids), None)


class Mount(NamedTuple):
    """A mount: which directory of the filesystem is seen where, and the filesystem's own options."""

    root: str
    mountpoint: str
    options: str


def mounts_of_type(kind: str) -> list[Mount]:
    """Return the mounts of a filesystem type in our mount namespace."""
    return [
        Mount(_unescape(fields[3]), _unescape(fields[4]), fields[fields.index("-", 6) + 3].rstrip("\n"))
        for fields in _mountinfo()
        if fields[fields.index("-", 6) + 1] == kind
    ]


def type_and_options(mount_id: str) -> tuple[str, str] | None:
    """Return the filesystem type, with its subtype, and the filesystem's own options of a mount.

    None if it is not in our mount namespace.
    """
    for fields in _mountinfo():
        if fields[0] == mount_id:
            separator = fields.index("-", 6)  # what comes before may be called so
            return fields[separator + 1], fields[separator + 3].rstrip("\n")
    return None


def _mountinfo() -> list[list[str]]:
    """Read /proc/self/mountinfo (proc_pid_mountinfo(5)): mount id, parent id, device, root, mountpoint, ..."""
    try:
        # newline: a carriage return may be part of a name
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as table:
            return [line.split(" ") for line in table]
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it is gone, or not ours to look at
        return []


def _unescape(field: str) -> str:
    """Decode space, tab, newline and backslash, which mountinfo writes as octal."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field
