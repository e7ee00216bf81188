"""`memfs remount`, and what `mount -o remount` comes to: who changes which option of a mounted memfs.

    the kernel     ro, suid, dev, exec, symbolic links and access times: it keeps them itself, and mount(8) knows how
    the daemon     size and number of inodes
    nobody         all others; that they are said again as they are is no change, as on a tmpfs: mount(8) adds what
                   stands in fstab

All options are parsed before the first is changed. The daemon is told by an extended attribute, which the kernel lets
nobody set on a mount that is read-only: so what becomes writable does so first, what becomes read-only last.
"""

from __future__ import annotations

import argparse
import errno
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from memfs import memory_limit
from memfs.cli.command import CommandError, Commands
from memfs.cli.states import number, state_of
from memfs.contract.on_memfs import OnMemfs, locate
from memfs.contract.sys.mountinfo import mount_flags, mounts_on, real_mountpoint
from memfs.options import OF_THE_KERNEL, MountOptions, OptionError, RemountOptions, divide_remount

DEFAULTS_OF_MOUNT: Final = ("suid", "dev")  #: which are not those of `memfs mount`
_MOUNT: Final = "mount"


def add_to(commands: Commands) -> None:
    """Add the command to those of `memfs`."""
    parser = commands.add_parser("remount", help="change options of a mounted memfs", description=_run.__doc__)
    parser.add_argument("path", metavar="PATH", help="the mountpoint, or anything on it")
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        required=True,
        help="size=, nr_blocks=, nr_inodes=; for root and a mountpoint also ro, rw, suid, dev, exec, symfollow, "
        "noatime, relatime, strictatime and their opposites",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    """Change how large a mounted memfs may become, in bytes and inodes, and what the kernel allows on it.

    Less than is in use is refused. Options that say what is so already change nothing; all others are refused.
    """
    remount(arguments.path, arguments.options)


def remount(path: str, options: str, *, complete: bool = False) -> None:
    """Change options of the memfs that a path leads to. `complete`: what the kernel keeps is all said in them.

    Raises OptionError, and nothing is changed; CommandError or OSError, and what came before may have been changed.
    """
    with locate(path, last_link=True) as mount:
        mounted = _mounted_with(mount)
        limits, flags = divide_remount(options, mounted)
        RemountOptions.parse(limits, mounted.pagesize)  # for its clear words; the daemon parses it again
        wanted = _kept_by_the_kernel(path, flags, complete=complete) if flags else None
        if wanted and not wanted.ro:
            _set_flags(path, wanted)
        if limits:
            _set_limits(mount, limits)
        if wanted and wanted.ro:
            _set_flags(path, wanted)
        state = state_of(mount)
    lowest = None if state.get("memory_limit") is None else number(state, "memory_limit")
    if (warning := memory_limit.warning(lowest, number(state, "size"))) is not None:
        print(f"memfs: {warning}", file=sys.stderr)


def _mounted_with(mount: OnMemfs) -> MountOptions:
    try:
        return MountOptions.parse(str(state_of(mount).get("options", "")))
    except OptionError as error:
        raise CommandError(f"{mount.path}: what it says of its options makes no sense: {error}") from error


def _set_limits(mount: OnMemfs, options: str) -> None:
    try:
        try:
            mount.set("trusted.memfs.remount", options)
        except PermissionError:  # not root: then it must be our own
            mount.set("user.memfs.remount", options)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise CommandError(
                f"{mount.path}: {options} is less than what is in use; remove files first, or punch holes"
            ) from error
        if error.errno == errno.EROFS:
            raise CommandError(f"{mount.path}: mounted read-only; {options} can be changed together with rw") from error
        raise


def _kept_by_the_kernel(path: str, flags: Sequence[str], *, complete: bool) -> MountOptions:
    """Return what the kernel is to keep of a mount: what it keeps now, changed. Raises CommandError if it is none."""
    mounts = mounts_on(real_mountpoint(path))
    now = mount_flags(*mounts[0]) if mounts else None
    if now is None:
        raise CommandError(f"{path}: {', '.join(flags)} can be changed of a whole mount: name its mountpoint")
    before = [] if complete else ["strictatime", *sorted(now & OF_THE_KERNEL)]
    return MountOptions.parse(",".join([*DEFAULTS_OF_MOUNT, *before, *flags]))


def _set_flags(path: str, wanted: MountOptions) -> None:
    """Have mount(8) change what the kernel keeps, without its calling our helper again (-i)."""
    program = shutil.which(_MOUNT)
    if program is None:
        raise CommandError(
            f"{path}: there is no {_MOUNT}(8) to change flags of the mount with; install it (Debian: mount)"
        )
    flags = [
        "ro" if wanted.ro else "rw",
        wanted.atime,
        *([] if wanted.diratime else ["nodiratime"]),
        *([] if wanted.suid else ["nosuid"]),
        *([] if wanted.dev else ["nodev"]),
        *([] if wanted.exec else ["noexec"]),
        *([] if wanted.symfollow else ["nosymfollow"]),
    ]
    # With a source, mount(8) adds nothing of fstab(5) and of /proc/mounts to the flags.
    command = [program, "-i", "-o", ",".join(["remount", *flags]), "--", wanted.fsname, path]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = next(iter(done.stderr.strip().splitlines()), "no reason given").removeprefix(f"{_MOUNT}: ")
        raise CommandError(f"{path}: {', '.join(flags)}: {_MOUNT} says: {said}")
