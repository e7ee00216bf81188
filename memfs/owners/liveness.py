"""Liveness of owners: notice that an owner's process dies before its sockets are closed.

A killed process closes its descriptors when its last thread is gone. A VMM whose thread is inside fallocate(2) on our
mount has a thread that cannot go before we answer, and we do not answer before the owner has acknowledged. If that is
the same process, nobody would ever see its socket close, and only the timeout would end it. But its other threads do
go, and /proc shows that the one that is left has SIGKILL coming.

So while an owner is being waited for, its process is looked at now and then. Rejected: a pidfd (it tells when the last
thread is gone; PIDFD_THREAD, which was to tell of the first, does not any more since Linux 6.15); FUSE_INTERRUPT (it
says that some caller was interrupted, not that an owner is dead).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

from memfs.contract.sys.processes import directory_of

_STOPPED: Final = frozenset("Tt")  # proc_pid_stat(5): by a signal, by a debugger
_SIGKILL_BIT: Final = 1 << 8  # in the masks of /proc/PID/status


def is_dying(pid: int) -> bool:
    """Return whether a process is gone, or every thread of it that is left has SIGKILL coming.

    One that /proc does not show us (hidepid=, another pid namespace) is taken for alive.
    """
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    directory = directory_of(pid)
    if directory is None:
        return False
    return all("Z" in state or "X" in state or pending & _SIGKILL_BIT for state, pending in _threads(directory))


def is_stopped(pid: int) -> bool:
    """Return whether a process is known to be stopped: no thread of it runs until SIGCONT, or a debugger, lets it.

    A thread that is in a system call on a FUSE mount stops only when it returns.
    """
    directory = directory_of(pid)
    states = {state for state, _ in _threads(directory)} if directory is not None else set[str]()
    return bool(states & _STOPPED) and states <= _STOPPED | {"D"}


def _threads(directory: str) -> Iterator[tuple[str, int]]:
    """Generate the state and the pending signals of each thread (proc_pid_status(5))."""
    try:
        threads = os.listdir(f"{directory}/task")
    except OSError:
        return
    for thread in threads:
        try:
            with open(f"{directory}/task/{thread}/status") as lines:
                fields = {name: value for name, _, value in (line.partition(":\t") for line in lines)}
        except OSError:  # gone
            continue
        yield fields["State"].split()[0], int(fields["SigPnd"], 16)
