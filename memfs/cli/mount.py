"""`memfs mount`.

It returns when the mount answers. What serves it is forked off (background.py) before anything heavy is imported.

A service manager may start it anew after all processes of a mount have died, and give it the descriptors that were kept
of that; then it goes on with them.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from memfs.cli.background import prepare, serve_in_background
from memfs.cli.command import CommandError, Commands
from memfs.cli.remount import remount
from memfs.contract import logs
from memfs.contract.sys.mountinfo import real_mountpoint
from memfs.contract.terminal import printable, quoted
from memfs.handed_over import KEPT, handed_over
from memfs.inherited import InheritedError, leave_behind, raise_limits
from memfs.options import REMOUNT, MountOptions, OptionError


def add_to(commands: Commands) -> None:
    """Add the commands to those of `memfs`."""
    mount = commands.add_parser("mount", help="mount a memfs on a directory", description=_mount.__doc__)
    mount.add_argument("mountpoint", metavar="MOUNTPOINT")
    mount.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="as for tmpfs, separated by commas: size= (bytes, k/m/g/t or %% of RAM; default 50%%), nr_blocks=, "
        "nr_inodes=, mode= (octal), uid=, gid=, huge=never|always|within_size|advise, mpol=, noswap, inode32|inode64; "
        "as for hugetlbfs, for guest-sealed files: pagesize=2M|1G, min_size=; ro, "
        "noatime, strictatime, nodiratime, suid, dev, noexec, nosymfollow, and their opposites; allow_other, fsname=; "
        "passthrough=auto|on|off, backing=tmpfs|memfd, socket=, "
        "socket_mode= (octal; default 0600), socket_group=, "
        "survive=auto|on|off (default off), "
        "notify_timeout= (seconds that an owner may take to answer; default 5)",
    )
    mount.add_argument(
        "--socket",
        metavar="PATH",
        help="where owners connect, also as option socket= (default /run/memfs/NAME.sock, NAME from MOUNTPOINT)",
    )
    mount.add_argument("--mkdir", action="store_true", help="create MOUNTPOINT, with mode 755, if it does not exist")
    mount.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground and log to stderr")
    mount.add_argument(
        "--log-file", metavar="FILE", help="append the log to FILE (default in the background: /run/memfs/NAME.log)"
    )
    mount.add_argument("-v", "--verbose", action="store_true", help="log more")
    mount.add_argument("--check", action="store_true", help="verify every invariant at the end; exit code 1 if broken")
    mount.set_defaults(run=_mount)


@dataclass(frozen=True, slots=True)
class Mount:
    """What `memfs mount` is asked for. Paths are absolute, and the mountpoint's is without symbolic links."""

    mountpoint: str
    options: MountOptions
    socket: str | None = None
    log_file: str | None = None
    handed_over: int | None = None  #: a descriptor of the socket, from a service manager
    kept: Mapping[str, int] = field(default_factory=dict)  #: descriptors that one has kept of a mount, by name
    foreground: bool = False
    verbose: bool = False
    check: bool = False

    @classmethod
    def parse(cls, arguments: argparse.Namespace) -> Mount:
        """Parse the options and resolve the paths. Raises OptionError; CommandError for no path."""
        return cls(
            mountpoint=mountpoint_of(arguments.mountpoint),
            options=MountOptions.parse(",".join(arguments.options)),
            socket=arguments.socket and os.path.abspath(arguments.socket),
            log_file=arguments.log_file and os.path.abspath(arguments.log_file),
            foreground=arguments.foreground,
            verbose=arguments.verbose,
            check=arguments.check,
        )


def mountpoint_of(path: str) -> str:
    """Return where a path has a memfs mounted. Raises CommandError if none may be."""
    if not path:  # of a variable that is not set; it would be the working directory
        raise CommandError("MOUNTPOINT is empty; name a directory")
    return real_mountpoint(path)


@contextmanager
def _directory(path: str, is_wanted: bool) -> Iterator[None]:
    """Create a directory, and those that lead to it, if wanted. What was created goes if the block raises."""
    created: list[str] = []
    while is_wanted and not os.path.lexists(path):
        created.append(path)
        path = os.path.dirname(path)
    try:
        for each in reversed(created):
            os.mkdir(each, 0o755)
        yield
    except BaseException:
        for each in created:
            with suppress(OSError):
                os.rmdir(each)
        raise


def _mount(arguments: argparse.Namespace) -> None:
    """Mount a memfs. Returns when the mount answers; ends with umount(8), SIGINT or SIGTERM."""
    options = ",".join(arguments.options)
    if REMOUNT in options.split(","):
        remount(arguments.mountpoint, options)
        return
    mount = replace(Mount.parse(arguments), **_handed_over())
    if mount.handed_over is not None and (said := _about_the_socket(mount)):
        raise CommandError(f"{said}: the socket was handed over (LISTEN_FDS), so its unit says that, and not we")
    if mount.kept:  # it is mounted, and answers nobody: nothing on the way there may be asked
        start(mount)
        return
    with _directory(mount.mountpoint, arguments.mkdir):
        print_notes(start(mount))


def _handed_over() -> dict[str, Any]:
    """Return the fields of Mount that a service manager has handed over. Raises CommandError."""
    given = handed_over()
    kept = {name: fd for name, fd in given if name in KEPT}
    sockets = [(name, fd) for name, fd in given if name not in KEPT]
    if len(sockets) > 1:
        names = ", ".join(name for name, _ in sockets)
        raise CommandError(f"{len(sockets)} descriptors were handed over ({names}); there is one socket for owners")
    return {"kept": kept, "handed_over": sockets[0][1] if sockets else None}


def _about_the_socket(mount: Mount) -> str:
    """Return what is said of where the socket is and who may connect, as it was written."""
    said = [each for each in mount.options.said.split(",") if each.startswith("socket")]
    return ", ".join(["--socket"] * (mount.socket is not None) + [f"option {each}" for each in said])


def start(mount: Mount) -> list[str]:
    """Mount a memfs, and return when it answers what could not be had, or, in the foreground, when it has ended.

    Raises CommandError.
    """
    keep = [*mount.kept.values(), *([] if mount.handed_over is None else [mount.handed_over])]
    if mount.foreground:

        def ready(notes: list[str]) -> None:
            print_notes(notes)
            print(f"memfs: {quoted(mount.mountpoint)} is mounted", flush=True)

        leave_behind(keep)
        _serve(mount, ready)
        return []
    return serve_in_background(functools.partial(_serve, mount), keep=keep)


def _serve(mount: Mount, ready: Callable[[list[str]], None], not_kept: Sequence[int] = ()) -> None:
    prepare()
    from memfs import fault_points
    from memfs.adoption import AdoptionError, adopt_kept
    from memfs.daemon import run
    from memfs.fuse.mount import MountError
    from memfs.opening import Settings, open_mount
    from memfs.owners.listener import ListenError, prepare_directory
    from memfs.run_files import default_paths

    fault_points.install_faults()
    by_default = mount.log_file is None and not mount.foreground
    log_files = [mount.log_file] if mount.log_file is not None else []
    asked_for = mount.socket or mount.options.socket
    socket_paths = [asked_for] if asked_for else default_paths(mount.mountpoint, "sock")
    if by_default:
        log_files = default_paths(mount.mountpoint, "log")
    if by_default or not asked_for:  # of what has been named, nothing is created but itself
        prepare_directory(os.path.dirname(default_paths(mount.mountpoint, "sock")[0]))
    logs.set_up(log_files, logging.INFO if mount.verbose else logging.WARNING, when_needed=by_default)
    try:
        raise_limits()
        settings = Settings(
            mount.mountpoint,
            socket_paths,
            mount.options,
            handed_over=mount.handed_over,
            log_beside_socket=by_default and not asked_for and mount.handed_over is None,
            check=mount.check,
        )
        run(lambda: adopt_kept(mount.kept) or open_mount(settings), ready, not_kept)
    except (AdoptionError, InheritedError, ListenError, MountError, OptionError) as error:
        raise CommandError(str(error)) from error


def print_notes(notes: list[str]) -> None:
    """Print what could not be had."""
    for note in notes:
        print(f"memfs: {printable(note)}", file=sys.stderr)
