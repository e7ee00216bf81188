"""POSIX ACLs as the kernel stores them in extended attributes (linux/posix_acl_xattr.h), and what they do to modes.

The kernel checks permissions by them and has checked that they are valid before we see one (fs/posix_acl.c). What is
left to the filesystem is what acl(5) says of change: an access ACL and the permission bits say the same about owner,
group or mask, and others, so a change of one changes the other; and a default ACL is what new inodes begin with.
"""

from __future__ import annotations

import errno
import stat
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

ACCESS: Final = b"system.posix_acl_access"
DEFAULT: Final = b"system.posix_acl_default"
MOST_BYTES: Final = 4096  #: of an ACL, each time that something is created by it: some more than ext4 has space for

_VERSION: Final = 2
_HEADER: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")
_USER_OBJ, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x04, 0x10, 0x20
_PERMISSIONS: Final = stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO


class _Entry(NamedTuple):
    tag: int
    permissions: int
    id: int


def mode_of(value: bytes, mode: int) -> tuple[int, bytes | None]:
    """Return what an access ACL makes of a mode, and the ACL if it must be kept: None if the mode says it all.

    Raises OSError(EINVAL) for what is no ACL.
    """
    entries = _parse(value)
    tags = {entry.tag: entry.permissions for entry in entries}
    try:
        group = tags.get(_MASK, tags[_GROUP_OBJ])
        permissions = tags[_USER_OBJ] << 6 | group << 3 | tags[_OTHER]
    except KeyError:
        raise OSError(errno.EINVAL, "an ACL without owner, group or others") from None
    return mode & ~_PERMISSIONS | permissions, value if len(entries) > 3 else None


def after_chmod(value: bytes, mode: int) -> bytes:
    """Return what a change of mode makes of an access ACL (posix_acl_chmod)."""
    entries = _parse(value)
    has_mask = any(entry.tag == _MASK for entry in entries)
    changed = {_USER_OBJ: mode >> 6 & 7, _MASK if has_mask else _GROUP_OBJ: mode >> 3 & 7, _OTHER: mode & 7}
    return _pack(entry._replace(permissions=changed.get(entry.tag, entry.permissions)) for entry in entries)


def inherited(default: bytes, mode: int) -> tuple[int, bytes | None]:
    """Return the mode and access ACL of a new inode that asked for `mode` in a directory with a default ACL.

    None: the mode says it all (posix_acl_create).
    """
    entries = _parse(default)
    has_mask = any(entry.tag == _MASK for entry in entries)
    asked = {_USER_OBJ: mode >> 6 & 7, _MASK if has_mask else _GROUP_OBJ: mode >> 3 & 7, _OTHER: mode & 7}
    access = _pack(entry._replace(permissions=entry.permissions & asked.get(entry.tag, 7)) for entry in entries)
    return mode_of(access, mode)


def inherit(parent: dict[bytes, bytes] | None, mode: int, umask: int) -> tuple[int, dict[bytes, bytes]]:
    """Return the mode of a new inode and its ACLs, from the extended attributes of its directory."""
    default = (parent or {}).get(DEFAULT)
    if default is None:
        return mode & ~umask, {}
    mode, access = inherited(default, mode)
    xattrs = {} if access is None else {ACCESS: access}
    if stat.S_ISDIR(mode):
        xattrs[DEFAULT] = default
    return mode, xattrs


def check_size(value: bytes) -> None:
    """Raise OSError(ENOSPC) if an ACL is too large to be set."""
    if len(value) > MOST_BYTES:
        raise OSError(errno.ENOSPC, f"an ACL of {len(value)} bytes; at most {MOST_BYTES}")


def _parse(value: bytes) -> list[_Entry]:
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        raise OSError(errno.EINVAL, "not an ACL")
    if _HEADER.unpack_from(value) != (_VERSION,):
        raise OSError(errno.EOPNOTSUPP, "an ACL of another version")
    return [_Entry(*fields) for fields in _ENTRY.iter_unpack(value[_HEADER.size :])]


def _pack(entries: Iterable[_Entry]) -> bytes:
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)
