"""The names of a memfs's socket and log where nobody says any: NAME.sock and NAME.log in a directory for such files.

NAME is the mountpoint with dashes for slashes. That name may be taken: by the memfs of another mountpoint (/x-y and
/x/y), or of the same one in another mount namespace. It may also be too long for a socket (unix(7)), or be no text.
Then there is a hash of the mountpoint in it.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final

from memfs.contract.sys.unix_address import MAX_ADDRESS
from memfs.contract.sys.user_namespace import uid_outside

_OF_ROOT: Final = "/run/memfs"
_HASH: Final = 12  # hexadecimal digits
_MOST: Final = 64  # memfs's of one mountpoint


def default_paths(mountpoint: str, suffix: str) -> list[str]:
    """Return where a file of the memfs on this directory may lie, the name to be preferred first.

    >>> default_paths("/mnt/guest", "sock")[0]  # doctest: +SKIP
    '/run/memfs/mnt-guest.sock'

    Without root it is in the user's runtime directory ($XDG_RUNTIME_DIR), or a directory of the user's in /tmp.
    So it is for a user that is root in a namespace of its own only.
    """
    directory = _directory()
    plain = mountpoint.strip("/").replace("/", "-") or "-"
    longest = max(MAX_ADDRESS - len(os.fsencode(directory)) - len("/.sock"), 2 * _HASH)
    digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:_HASH]
    shown = "".join(each if each.isascii() and each.isprintable() else "_" for each in plain)
    hashed = f"{shown[: longest - _HASH - len('--99')]}-{digest}"
    names = [hashed, *(f"{hashed}-{number}" for number in range(2, _MOST))]
    if plain.isprintable() and len(os.fsencode(plain)) <= longest:
        names.insert(0, plain)
    return [os.path.join(directory, f"{name}.{suffix}") for name in names]


def _directory() -> str:
    if os.geteuid() == 0 and os.access(_OF_ROOT if os.path.isdir(_OF_ROOT) else os.path.dirname(_OF_ROOT), os.W_OK):
        return _OF_ROOT
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(runtime, "memfs")
    return f"/tmp/memfs-{uid_outside(os.geteuid())}"
