"""Descriptors that a service manager hands over when it starts us (sd_listen_fds(3)).

LISTEN_PID says that they are meant for this process and not for the one that it was started by, LISTEN_FDS how many
there are, from 3 on, and LISTEN_FDNAMES what each is called. The variables are taken from the environment, so that no
child takes them for its own.

They are the socket for owners (systemd.socket(5)), or what was kept of a mount whose processes have died
(FileDescriptorStoreMax= in systemd.service(5), and memfs/adoption.py).

Rejected: systemd's Python bindings (C, for twenty lines).
"""

from __future__ import annotations

import os
from typing import Final

#: what the descriptors are called that a mount consists of
KEPT: Final = ("memfs-fuse", "memfs-files", "memfs-guests", "memfs-state", "memfs-state-ro", "memfs-listener")
_FIRST: Final = 3  # SD_LISTEN_FDS_START
_UNNAMED: Final = "unknown"  # as sd_listen_fds_with_names(3) says


def handed_over() -> list[tuple[str, int]]:
    """Return names and descriptors that were handed over to this process; no child of ours inherits them.

    >>> handed_over()
    []
    """
    pid, count, names = (os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    fds = range(_FIRST, _FIRST + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    called = names.split(":") if names else []
    return list(zip([*called, *[_UNNAMED] * (len(fds) - len(called))], fds, strict=False))
