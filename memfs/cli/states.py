"""What mounted memfs's say of their state, for commands that show it.

A daemon may be stopped, dead, or another user's who lets nobody else in. So many are asked at once, in threads that are
not waited for: a system call on a filesystem that does not answer cannot be given up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Generic, TypeVar

from memfs.cli.command import CommandError
from memfs.cli.state_shape import misfit
from memfs.cli.timed_call import TIMEOUT, TimedCall
from memfs.contract.on_memfs import OnMemfs, locate
from memfs.contract.sys.fdinfo import fdinfo
from memfs.contract.sys.mountinfo import MEMFS, mount_flags, mountpoints_of_type
from memfs.options import OptionError, in_force

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Answer(Generic[_T]):
    """What the memfs at a mountpoint said, or why it said nothing."""

    mountpoint: str
    said: _T | None
    why_not: str = ""


def state_of(mount: OnMemfs) -> dict[str, Any]:
    """Return the state of the memfs that something lies on, with the options that are in force.

    Raises OSError; CommandError if it is no JSON object, or of another shape.
    """
    try:
        state = json.loads(mount.get("user.memfs.stat"))
    except (ValueError, RecursionError) as error:
        raise CommandError(
            f"{mount.path}: what it says of its state is no JSON; is it a memfs, and of this version?"
        ) from error
    if not isinstance(state, dict):
        raise CommandError(
            f"{mount.path}: what it says of its state is no JSON object; is it a memfs, and of this version?"
        )
    if (name := misfit(state)) is not None:
        raise CommandError(f"{mount.path}: what it says of its state has another kind of {name}; is it a memfs?")
    said, size, nr_inodes = (state.get(name) for name in ("options", "size", "nr_inodes"))
    device = os.fstat(mount.fd).st_dev
    flags = mount_flags(fdinfo(mount.fd)["mnt_id"], f"{os.major(device)}:{os.minor(device)}")
    if flags is not None and isinstance(said, str) and isinstance(size, int) and isinstance(nr_inodes, int):
        with suppress(OptionError):  # it is of another version
            state["options"] = in_force(said, flags, size, nr_inodes)
    return state


def number(state: dict[str, Any], name: str) -> int:
    """Return a number that a state has. Raises CommandError if it has none: the memfs is of another version."""
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        where = state.get("mountpoint", "memfs")
        raise CommandError(f"{where}: its state has no number {name}; it is of another version")
    return value


def mountpoints() -> list[str]:
    """Return where memfs's are mounted in our mount namespace."""
    return list(dict.fromkeys(mountpoints_of_type(MEMFS)))


class Asking(Generic[_T]):
    """Asks many memfs's at once, again and again; a path at which one does not answer is not asked twice.

    `asks` returns for a path what asks the memfs there, which may take forever, or raise OSError or CommandError.
    """

    def __init__(self, asks: Callable[[str], Callable[[], _T]]) -> None:
        self._asks: Final = asks
        self._calls: Final[dict[str, TimedCall[_T]]] = {}

    def ask(self, paths: Sequence[str]) -> list[Answer[_T]]:
        """Return what the memfs's at some paths say, in the same order, after a few seconds at most."""
        for gone in self._calls.keys() - set(paths):
            del self._calls[gone]
        for path in paths:
            if path not in self._calls:
                self._calls[path] = TimedCall(path, self._asks(path))
            self._calls[path].start()
        deadline = monotonic() + TIMEOUT
        return [self._answer(path, deadline) for path in paths]

    def _answer(self, path: str, deadline: float) -> Answer[_T]:
        try:
            return Answer(path, self._calls[path].result(deadline))
        except OSError as error:
            return Answer(path, None, str(error.strerror))
        except CommandError as error:
            return Answer(path, None, str(error).removeprefix(f"{path}: "))


def state_at(path: str) -> dict[str, Any]:
    """Return the state of the memfs at a path. Raises as `state_of`."""
    with locate(path, last_link=True) as mount:
        return state_of(mount)
