"""Resources that a daemon inherits from the process that mounts it, and must not keep: it lives longer.

An inherited descriptor would hold a lock (`flock LOCK memfs mount DIR`), a pipe's end or a mount for as long as the
filesystem is mounted; the working directory would keep its filesystem busy; a umask or a limit that was meant for
somebody's own files would be one of everybody's files here.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

_UMASK: Final = 0o022  # of the log and of the directory of sockets
#: limits that are raised as far as they can be; all that memfs needs grows with what others have open or have mapped
_RAISED: Final = ("RLIMIT_FSIZE", "RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_NPROC")
#: what is refused if one of them stays
_REFUSED: Final = {
    "RLIMIT_FSIZE": "no file could be larger than {limit} bytes (ulimit -f)",
    "RLIMIT_CPU": "memfs would be killed after {limit} seconds of CPU time (ulimit -t)",
}


class InheritedError(Exception):
    """Something inherited makes it impossible to mount; the message is a sentence."""


def leave_behind(keep: Iterable[int] = ()) -> None:
    """Give up descriptors but 0 to 2 and those to keep, the working directory, the umask and the signal mask."""
    for fd in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *keep}:
        with suppress(OSError):  # that with which the directory was read
            os.close(fd)
    os.chdir("/")
    os.umask(_UMASK)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, nobody could be waited for


def raise_limits() -> None:
    """Raise the limits that would be everybody's, as root to none. Raises InheritedError."""
    _raise("RLIMIT_NOFILE", int(Path("/proc/sys/fs/nr_open").read_text()))  # a file in use takes a descriptor
    for name in _RAISED:
        limit = _raise(name, resource.RLIM_INFINITY)
        if limit != resource.RLIM_INFINITY and name in _REFUSED:
            raise InheritedError(f"{_REFUSED[name].format(limit=limit)}, and that limit cannot be raised without root")


def _raise(name: str, most: int) -> int:
    """Raise a limit as far as it can be, and return where it is then."""
    number = getattr(resource, name)
    try:
        resource.setrlimit(number, (most, most))
    except ValueError:  # Python's for EPERM: without CAP_SYS_RESOURCE only the soft limit can be raised
        most = resource.getrlimit(number)[1]
        resource.setrlimit(number, (most, most))
    return most
