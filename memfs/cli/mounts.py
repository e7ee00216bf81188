"""`memfs list` and `memfs umount`: the memfs's that are mounted, all of them or one."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any, Final

from memfs.cli.command import CommandError, Commands
from memfs.cli.states import Answer, Asking, mountpoints, state_at
from memfs.contract.sizes import shown_bytes
from memfs.contract.sys.libc import MNT_DETACH, UMOUNT_NOFOLLOW, umount
from memfs.contract.sys.mountinfo import (
    MEMFS,
    device_of_mountpoint,
    mounter_of,
    mountpoints_below,
    real_mountpoint,
    type_of_device,
)
from memfs.contract.terminal import printable, quoted

_HELPER: Final = "fusermount3"
_MOST_USERS: Final = 5  # processes that are named
_COLUMNS: Final = ("mountpoint", "pid", "version", "size", "used", "owners", "huge", "socket")
_NUMBERS: Final = frozenset(("pid", "size", "used", "owners"))


def add_to(commands: Commands) -> None:
    """Add the commands to those of `memfs`."""
    listing = commands.add_parser("list", help="list the mounted memfs's", description=_list.__doc__)
    listing.add_argument("--json", action="store_true", help="as JSON: of each what `memfs stat --json` says")
    listing.set_defaults(run=_list)

    unmount = commands.add_parser("umount", help="unmount a memfs", description=_umount.__doc__)
    unmount.add_argument("mountpoint", metavar="MOUNTPOINT")
    unmount.add_argument(
        "-l", "--lazy", action="store_true", help="also if it is in use: it vanishes now, and ends with its last user"
    )
    unmount.set_defaults(run=_umount)


def _list(arguments: argparse.Namespace) -> None:
    """List the memfs's that are mounted in this mount namespace, and why one of them cannot be asked."""
    answers = Asking(lambda path: partial(state_at, path)).ask(mountpoints())
    if arguments.json:
        print(json.dumps([each.said or {"mountpoint": each.mountpoint, "error": each.why_not} for each in answers]))
        return
    if not answers:
        return
    rows = [_row(each) for each in answers]
    heading = [name.upper() for name in _COLUMNS]
    widths = [max(len(row[column]) for row in [heading, *rows]) for column in range(len(_COLUMNS))]
    for row in [heading, *rows]:
        print("  ".join(_padded(*each) for each in zip(_COLUMNS, row, widths, strict=True)).rstrip())


def _padded(column: str, text: str, width: int) -> str:
    return f"{text:>{width}}" if column in _NUMBERS else f"{text:{width}}"


def _row(answer: Answer[dict[str, Any]]) -> list[str]:
    """Return what is shown of a memfs, column by column; in the place of a socket why there is none."""
    state: dict[str, Any] = answer.said or {"socket": answer.why_not}
    shown = {**state, "mountpoint": answer.mountpoint}
    return [_cell(name, shown.get(name)) for name in _COLUMNS]


def _cell(name: str, value: object) -> str:
    if value is None:
        return "-"
    if name in ("size", "used") and isinstance(value, int):
        return shown_bytes(value)
    return quoted(value)


def _umount(arguments: argparse.Namespace) -> None:
    """Unmount a memfs. Its files are gone then, and their memory is freed."""
    mountpoint = real_mountpoint(arguments.mountpoint)
    device = device_of_mountpoint(mountpoint) if arguments.mountpoint else None
    if device is None and arguments.mountpoint:
        os.lstat(arguments.mountpoint)
    if device is None or type_of_device(device) != MEMFS:
        raise CommandError(f"{arguments.mountpoint or 'MOUNTPOINT'}: no memfs is mounted there; see `memfs list`")
    os.chdir("/")  # we may be there, as our shell is, which is named then
    unmount(mountpoint, lazy=arguments.lazy)


def unmount(mountpoint: str, *, lazy: bool) -> None:
    """Unmount what is mounted on a directory, whose path is real. Raises OSError; CommandError if it is in use."""
    try:
        umount(mountpoint, UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0))
    except PermissionError:
        _umount_by_helper(mountpoint, lazy=lazy)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise OSError(error.errno, error.strerror, mountpoint) from error
        raise CommandError(_busy(mountpoint)) from error


def _umount_by_helper(mountpoint: str, *, lazy: bool) -> None:
    """Unmount as the ordinary user that mounted it."""
    helper = shutil.which(_HELPER)
    if helper is None:
        raise CommandError(f"{mountpoint}: no permission to unmount, and {_HELPER} is not installed (Debian: fuse3)")
    command = [helper, "-u", *(["-z"] if lazy else []), "--", mountpoint]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = done.stderr.strip().removeprefix(f"{_HELPER}: ")
        if "busy" in said:
            raise CommandError(_busy(mountpoint))
        if mounter_of(mountpoint) != os.geteuid():
            raise CommandError(f"{mountpoint}: another user has mounted it; only that user and root unmount it")
        raise CommandError(f"{mountpoint}: {_HELPER} says: {said}")


def _busy(mountpoint: str) -> str:
    below = (f"the mount on {printable(each)}" for each in mountpoints_below(mountpoint))
    names = list(islice(chain(below, _users(mountpoint)), _MOST_USERS + 1))
    more = ", and others" if len(names) > _MOST_USERS else ""
    who = f" by {', '.join(names[:_MOST_USERS])}{more}" if names else ""
    return f"{mountpoint} is in use{who}; end that, or say --lazy"


def _users(mountpoint: str) -> Iterator[str]:
    """Yield the processes that have something on a mount open or mapped, or work there, as far as we may see that."""
    within = f"{mountpoint}/"
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        if any(f"{path}/".startswith(within) for path in _paths_of(pid)):
            try:
                with open(f"/proc/{pid}/comm", errors="surrogateescape") as file:
                    name = file.read().rstrip("\n")
            except OSError:
                continue
            yield f"{printable(name)} (pid {pid})"


def _paths_of(pid: str) -> Iterator[str]:
    """Yield the paths that a process holds: by their names, since to ask for the files would be to ask the daemon."""
    try:
        links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root"]
        for directory in ("fd", "map_files"):
            links += [f"/proc/{pid}/{directory}/{name}" for name in os.listdir(f"/proc/{pid}/{directory}")]
    except OSError:  # it is gone, or not ours to look at
        return
    for link in links:
        try:
            yield os.readlink(link)
        except OSError:
            continue
