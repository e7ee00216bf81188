"""What /proc says of other processes, where it shows those of our own pid namespace.

A daemon that was started in another pid namespace, with the /proc of the host, would take strangers for those that it
asks about: the numbers are not the same.
"""

from __future__ import annotations

import os


def directory_of(pid: int) -> str | None:
    """Return where /proc has a process; None if it does not, or if it is not known which one the number means there.

    The kernel says 0 for a process of another pid namespace (SO_PEERCRED, FUSE requests).
    """
    if pid <= 0 or not _shows_our_namespace():
        return None
    directory = f"/proc/{pid}"
    return directory if os.path.exists(directory) else None


def _shows_our_namespace() -> bool:
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:  # it shows a namespace that we are not in
        return False
