"""`memfs mount`.

It returns when the mount answers. What serves it is forked off before anything heavy is imported, and
reports over a pipe: that it is ready and what could not be had, or why it cannot mount.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import NoReturn

from memfs.cli.command import CommandError, Commands
from memfs.cli.remount import remount
from memfs.contract import logs
from memfs.contract.sys.mountinfo import real_mountpoint
from memfs.contract.terminal import printable, quoted
from memfs.handed_over import handed_over
from memfs.inherited import InheritedError, leave_behind, raise_limits
from memfs.options import REMOUNT, MountOptions, OptionError

log = logging.getLogger(__name__)


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
        raise CommandError("MOUNTPOINT is empty")
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
    mount = replace(Mount.parse(arguments), handed_over=_handed_over())
    if mount.handed_over is not None and (said := _about_the_socket(mount)):
        raise CommandError(f"{said}: the socket was handed over (LISTEN_FDS), so its unit says that, and not we")
    with _directory(mount.mountpoint, arguments.mkdir):
        print_notes(start(mount))


def _handed_over() -> int | None:
    """Return the socket for owners that a service manager hands over, if it does. Raises CommandError."""
    match handed_over():
        case []:
            return None
        case [(_, fd)]:
            return fd
        case several:
            names = ", ".join(name for name, _ in several)
            raise CommandError(f"{len(several)} descriptors were handed over ({names}); there is one socket for owners")


def _about_the_socket(mount: Mount) -> str:
    """Return what is said of where the socket is and who may connect, as it was written."""
    said = [each for each in mount.options.said.split(",") if each.startswith("socket")]
    return ", ".join(["--socket"] * (mount.socket is not None) + [f"option {each}" for each in said])


def start(mount: Mount) -> list[str]:
    """Mount a memfs, and return when it answers what could not be had, or, in the foreground, when it has ended.

    Raises CommandError.
    """
    keep = [] if mount.handed_over is None else [mount.handed_over]
    if mount.foreground:

        def ready(notes: list[str]) -> None:
            print_notes(notes)
            print(f"memfs: {quoted(mount.mountpoint)} is mounted", flush=True)

        leave_behind(keep)
        _serve(mount, ready)
        return []
    reader, writer = os.pipe()
    sys.stdout.flush()
    if os.fork() == 0:
        leave_behind([writer, *keep])
        _detach()
        _serve_and_report(mount, writer)
    os.close(writer)
    with os.fdopen(reader, errors="surrogateescape") as report:
        outcome, *lines = report.read().split("\n")
    if outcome != "ready":
        raise CommandError(lines[0] if lines else "the daemon died while mounting; --foreground shows why")
    return [line for line in lines if line]


def _serve_and_report(mount: Mount, report: int) -> NoReturn:
    """Serve as the daemon of `memfs mount`, and tell the parent over a pipe how mounting went.

    When it has been told that all is well, the pipe is gone, and what ends the daemon is only in the log.
    """
    pipe = os.fstat(report)

    def is_awaited() -> bool:
        try:
            return os.path.samestat(os.fstat(report), pipe)
        except OSError:  # and the keeper closes it for workers to come
            return False

    def tell(outcome: str, lines: list[str]) -> None:
        try:
            os.write(report, os.fsencode("\n".join([outcome, *lines])))
        except BrokenPipeError:
            raise CommandError("who was mounting it is gone") from None
        finally:
            os.close(report)

    try:
        _serve(mount, lambda notes: tell("ready", notes), [report])
    except Exception as error:
        is_known = isinstance(error, CommandError | OSError)
        why = _sentence(error) if is_known else f"a bug in memfs: {_sentence(error)}; --foreground shows more"
        if is_awaited():
            tell("failed", [why])
        else:
            log.critical("memfs has ended: %s", why, exc_info=not is_known)
        os._exit(1)
    os._exit(0)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _serve(mount: Mount, ready: Callable[[list[str]], None], not_kept: Sequence[int] = ()) -> None:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start a thread a CPU for nothing
    from memfs import fault_points
    from memfs.daemon import run
    from memfs.fuse.mount import MountError
    from memfs.opening import Settings
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
        run(settings, ready, not_kept)
    except (InheritedError, ListenError, MountError, OptionError) as error:
        raise CommandError(str(error)) from error


def _detach() -> None:
    """Leave the terminal that the command was started from (daemon(7))."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def print_notes(notes: list[str]) -> None:
    """Print what could not be had."""
    for note in notes:
        print(f"memfs: {printable(note)}", file=sys.stderr)
