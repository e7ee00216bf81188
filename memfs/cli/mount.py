"""`memfs mount` and `memfs remount`.

`memfs mount` returns when the mount answers. What serves it is forked off before anything heavy is imported, and
reports over a pipe: that it is ready and what could not be had, or why it cannot mount.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from memfs import memory_limit
from memfs.cli.command import CommandError, Commands
from memfs.contract import logs
from memfs.contract.on_memfs import locate
from memfs.contract.sys.mountinfo import real_mountpoint
from memfs.contract.terminal import printable, quoted
from memfs.inherited import InheritedError, leave_behind, raise_limits
from memfs.options import REMOUNT, MountOptions, OptionError, RemountOptions


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
        "nr_inodes=, mode= (octal), uid=, gid=, huge=never|always|within_size|advise, mpol=, noswap, inode32; as for "
        "hugetlbfs, for guest-sealed files: pagesize=2M|1G, min_size=; ro, "
        "noatime, strictatime, nodiratime, suid, dev, noexec, allow_other; passthrough=auto|on|off, "
        "backing=tmpfs|memfd, socket=, "
        "socket_mode= (octal; default 0600), socket_group=, "
        "notify_timeout= (seconds that an owner may take to answer; default 5)",
    )
    mount.add_argument(
        "--socket",
        metavar="PATH",
        help="where owners connect, also as option socket= (default /run/memfs/NAME.sock, NAME from MOUNTPOINT)",
    )
    mount.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground and log to stderr")
    mount.add_argument(
        "--log-file", metavar="FILE", help="append the log to FILE (default in the background: /run/memfs/NAME.log)"
    )
    mount.add_argument("-v", "--verbose", action="store_true", help="log more")
    mount.add_argument("--check", action="store_true", help="verify every invariant at the end; exit code 1 if broken")
    mount.set_defaults(run=_mount)

    remount = commands.add_parser("remount", help="change options of a mounted memfs", description=_remount.__doc__)
    remount.add_argument("path", metavar="PATH", help="the mountpoint, or anything on it")
    remount.add_argument("-o", dest="options", metavar="OPTIONS", required=True, help="size=, nr_blocks=, nr_inodes=")
    remount.set_defaults(run=_remount)


@dataclass(frozen=True, slots=True)
class _Mount:
    """The command line of `memfs mount`. Paths are absolute, and the mountpoint's is without symbolic links."""

    mountpoint: str
    options: MountOptions
    socket: str | None
    log_file: str | None
    foreground: bool
    verbose: bool
    check: bool

    @classmethod
    def parse(cls, arguments: argparse.Namespace) -> _Mount:
        """Parse the options and resolve the paths. Raises OptionError; CommandError for no path."""
        if not arguments.mountpoint:  # of a variable that is not set; it would be the working directory
            raise CommandError("MOUNTPOINT is empty")
        return cls(
            mountpoint=real_mountpoint(arguments.mountpoint),
            options=MountOptions.parse(",".join(arguments.options)),
            socket=arguments.socket and os.path.abspath(arguments.socket),
            log_file=arguments.log_file and os.path.abspath(arguments.log_file),
            foreground=arguments.foreground,
            verbose=arguments.verbose,
            check=arguments.check,
        )


def _mount(arguments: argparse.Namespace) -> None:
    """Mount a memfs. Returns when the mount answers; ends with umount(8), SIGINT or SIGTERM."""
    options = ",".join(arguments.options)
    if REMOUNT in options.split(","):
        _remount(argparse.Namespace(path=arguments.mountpoint, options=options))
        return
    mount = _Mount.parse(arguments)
    if mount.foreground:

        def ready(notes: list[str]) -> None:
            _print_notes(notes)
            print(f"memfs: {quoted(mount.mountpoint)} is mounted", flush=True)

        leave_behind()
        _serve(mount, ready)
        return
    reader, writer = os.pipe()
    sys.stdout.flush()
    if os.fork() == 0:
        leave_behind([writer])
        _detach()
        _serve_and_report(mount, writer)
    os.close(writer)
    with os.fdopen(reader, errors="surrogateescape") as report:
        outcome, *lines = report.read().split("\n")
    if outcome != "ready":
        raise CommandError(lines[0] if lines else "the daemon died while mounting; --foreground shows why")
    _print_notes([line for line in lines if line])


def _serve_and_report(mount: _Mount, report: int) -> NoReturn:
    """Serve as the daemon of `memfs mount`, and tell the parent over a pipe how it went."""

    def tell(outcome: str, lines: list[str]) -> None:
        os.write(report, os.fsencode("\n".join([outcome, *lines])))
        os.close(report)

    try:
        _serve(mount, lambda notes: tell("ready", notes))
    except CommandError as error:
        tell("failed", [str(error)])
        os._exit(1)
    except OSError as error:
        tell("failed", [f"{error.filename}: {error.strerror}" if error.filename else str(error)])
        os._exit(1)
    os._exit(0)


def _serve(mount: _Mount, ready: Callable[[list[str]], None]) -> None:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start a thread a CPU for nothing
    import trio

    from memfs import fault_points
    from memfs.daemon import Settings, serve
    from memfs.fuse.mount import MountError
    from memfs.owners.closer import Closer
    from memfs.owners.listener import ListenError, prepare_directory
    from memfs.run_files import default_paths

    fault_points.install_faults()
    by_default = mount.log_file is None and not mount.foreground
    log_files = [mount.log_file] if mount.log_file is not None else []
    if by_default:
        log_files = default_paths(mount.mountpoint, "log")
        prepare_directory(os.path.dirname(log_files[0]))
    logs.set_up(log_files, logging.INFO if mount.verbose else logging.WARNING, when_needed=by_default)
    asked_for = mount.socket or mount.options.socket
    try:
        raise_limits()
        settings = Settings(
            mount.mountpoint,
            [asked_for] if asked_for else default_paths(mount.mountpoint, "sock"),
            mount.options,
            Closer.start(),
            log_beside_socket=by_default and not asked_for,
            check=mount.check,
        )
        trio.run(serve, settings, ready)
    except (InheritedError, ListenError, MountError, OptionError) as error:
        raise CommandError(str(error)) from error


def _detach() -> None:
    """Leave the terminal that the command was started from (daemon(7))."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"memfs: {printable(note)}", file=sys.stderr)


def _remount(arguments: argparse.Namespace) -> None:
    """Change how large a mounted memfs may become, in bytes and inodes. Less than is in use is refused."""
    RemountOptions.parse(arguments.options)  # for its clear words; the daemon parses it again
    with locate(arguments.path, last_link=True) as mount:
        try:
            try:
                mount.set("trusted.memfs.remount", arguments.options)
            except PermissionError:  # not root: then it must be our own
                mount.set("user.memfs.remount", arguments.options)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise CommandError(f"{arguments.path}: {arguments.options} is less than what is in use") from error
        state = json.loads(mount.get("user.memfs.stat"))
    limit = memory_limit.warning(state["memory_limit"], state["size"])
    _print_notes([limit] if limit is not None else [])
