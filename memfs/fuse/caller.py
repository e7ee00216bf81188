"""Who asks: user and groups of the process that a request is made for.

Once memfs has said that its mounts may be idmapped (FUSE_ALLOW_IDMAP), the kernel tells users only where an inode is
created, in the ids of the mount's. With all other requests it says INVALID_ID: it has checked permissions itself
(default_permissions). The few things that are left to us ask /proc, which says who the caller is on no mount at all.
"""

from __future__ import annotations

import functools
import time
from typing import Final, NamedTuple

import trio

from memfs.contract.aio.threads import working_for
from memfs.contract.sys.processes import directory_of
from memfs.fuse.abi import Request

INVALID_ID: Final = 0xFFFFFFFF  # FUSE_INVALID_UIDGID (fs/fuse/fuse_i.h)
_MOST_CALLERS: Final = 4096  # of whom it is remembered which user they are
_REMEMBERED: Final = 1.0  # seconds; numbers of processes are used again
_FSID: Final = 3  # of the four ids in a line of /proc/PID/status


class _Caller(NamedTuple):
    uid: int
    groups: frozenset[int]


def uid_of(request: Request) -> int:
    """Return the user of the caller; INVALID_ID if that cannot be known."""
    if request.uid != INVALID_ID:
        return request.uid
    caller = _look(request.pid)
    return caller.uid if caller is not None else INVALID_ID


class Callers:
    """Which user each caller is, for shares: not for rights, since it is what was so up to a second ago.

    To ask takes longer than many an answer. One for each `trio.run`: `Callers.here`.
    """

    def __init__(self) -> None:
        self._users: Final[dict[int, int]] = {}  # by process
        self._remembered_until = 0.0

    @classmethod
    def here(cls) -> Callers:
        """Return those of the event loop that is running."""
        try:
            return _here.get()
        except LookupError:
            callers = cls()
            _here.set(callers)
            return callers

    def user(self, request: Request) -> int:
        """Return the user of the caller; INVALID_ID is all those together who cannot be known."""
        if request.uid != INVALID_ID:
            return request.uid
        now = time.monotonic()
        if now >= self._remembered_until or len(self._users) >= _MOST_CALLERS:
            self._users.clear()
            self._remembered_until = now + _REMEMBERED
        user = self._users.get(request.pid)
        if user is None:
            user = self._users[request.pid] = uid_of(request)
        return user


def working_for_caller(request: Request) -> working_for:
    """Have what takes long within the block take the threads of the caller's user."""
    return working_for(functools.partial(Callers.here().user, request))


_here: trio.lowlevel.RunVar[Callers] = trio.lowlevel.RunVar("callers")


def is_in_group_or_capable(request: Request, gid: int) -> bool:
    """Return whether the caller belongs to a group, or may act as if (CAP_FSETID, which root is taken to have)."""
    if request.uid == 0 or request.gid == gid:
        return True
    caller = _look(request.pid)
    return caller is not None and (uid_of(request) == 0 or gid in caller.groups)


def _look(pid: int) -> _Caller | None:
    """Return user and groups of a process (proc_pid_status(5)), or None if it cannot be seen or is gone."""
    directory = directory_of(pid)
    if directory is None:
        return None
    try:
        with open(f"{directory}/status") as lines:
            fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    except OSError:
        return None
    groups = {int(fields["Gid"][_FSID]), *map(int, fields["Groups"])}
    return _Caller(int(fields["Uid"][_FSID]), frozenset(groups))
