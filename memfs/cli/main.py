"""The command `memfs`: mount a memfs, and create, seal and look at files on one.

Exit codes: 0, 1 for anything that went wrong (one sentence on standard error), 2 for wrong usage (argparse's).

`memfs mount` returns when the mount answers. What serves it is forked off before anything heavy is imported, and
reports over a pipe: that it is ready and what could not be had, or why it cannot mount.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from memfs import __version__
from memfs.contract import logs
from memfs.contract.on_memfs import OnMemfs, locate, naming
from memfs.contract.sizes import parse_bytes
from memfs.contract.sys.mountinfo import real_mountpoint
from memfs.contract.sys.standard_descriptors import fill_standard_descriptors
from memfs.contract.terminal import Parser, printable, quoted
from memfs.contract.units import PAGE_SIZE, ByteOffset, is_page_aligned
from memfs.inherited import InheritedError, leave_behind, raise_limits
from memfs.options import REMOUNT, MountOptions, OptionError, RemountOptions
from memfs.store import seals


class CommandError(Exception):
    """Why a command failed: one sentence."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit."""
    fill_standard_descriptors()
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (CommandError, OptionError) as error:
        sys.exit(f"memfs: {printable(error)}")
    except BrokenPipeError:  # `memfs stat | head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        sys.exit(f"memfs: {printable(error.filename or parsed.command)}: {printable(error.strerror)}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="memfs", description="A filesystem that is the memory of virtual machines.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    mount = commands.add_parser("mount", help="mount a memfs on a directory", description=_mount.__doc__)
    mount.add_argument("mountpoint", metavar="MOUNTPOINT")
    mount.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="as for tmpfs, separated by commas: size= (bytes, k/m/g/t or %% of RAM; default 50%%), nr_blocks=, "
        "nr_inodes=, mode= (octal), uid=, gid=, huge=never|always|within_size|advise, mpol=, noswap, inode32; ro, "
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

    state = commands.add_parser("stat", help="show the state of a mounted memfs", description=_stat.__doc__)
    state.add_argument("path", metavar="PATH", help="the mountpoint, or anything on it")
    state.add_argument("--json", action="store_true", help="as JSON")
    state.set_defaults(run=_stat)

    seal = commands.add_parser("seal", help="add seals to a file", description=_seal.__doc__)
    seal.add_argument("file", metavar="FILE")
    seal.add_argument("seals", metavar="SEAL", nargs="+", help=f"one of {', '.join(seals.NAMES)}")
    seal.set_defaults(run=_seal)

    show = commands.add_parser("seals", help="show a file's seals", description=_show_seals.__doc__)
    show.add_argument("file", metavar="FILE")
    show.set_defaults(run=_show_seals)

    create = commands.add_parser("create", help="create a file, sealed from the start", description=_create.__doc__)
    create.add_argument("file", metavar="FILE")
    create.add_argument("--seals", metavar="SEAL[,SEAL]", default="", help="seals to create it with, e.g. guest")
    create.add_argument(
        "--size",
        metavar="SIZE",
        type=_size,
        default=0,
        help="its size in bytes, or with k, m, g, t (a hole: no memory used)",
    )
    create.add_argument("--allocate", action="store_true", help="allocate its memory; otherwise it is a hole")
    create.set_defaults(run=_create)

    allocate = commands.add_parser("allocate", help="allocate the memory of a file", description=_allocate.__doc__)
    allocate.add_argument("file", metavar="FILE")
    allocate.add_argument("--offset", metavar="SIZE", type=_size, default=0, help="where to begin (default 0)")
    allocate.add_argument("--length", metavar="SIZE", type=_size, help="how much (default: to the file's end)")
    allocate.set_defaults(run=_allocate)

    populate = commands.add_parser("populate", help="fill guest memory with an image", description=_populate.__doc__)
    populate.add_argument("file", metavar="FILE")
    populate.add_argument("source", metavar="SOURCE", nargs="?", default="-", help="a file; default: standard input")
    populate.add_argument(
        "--offset", metavar="SIZE", type=_size, default=0, help="where in FILE; a multiple of 4k (default 0)"
    )
    populate.set_defaults(run=_populate)
    return parser


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


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


def _stat(arguments: argparse.Namespace) -> None:
    """Show the state of a mounted memfs: its options, what is in use, and whether it is in passthrough mode."""
    with locate(arguments.path, last_link=True) as mount:
        text = mount.get("user.memfs.stat")
    try:
        state = json.loads(text)
    except ValueError as error:
        raise CommandError(f"{arguments.path}: what it says of its state is no JSON") from error
    if arguments.json:
        print(json.dumps(state))
        return
    registry = state.pop("registry")
    said = {name.replace("_", " "): value for name, value in state.items() if value is not None}
    width = max(map(len, said))
    for name, value in said.items():
        print(f"{printable(name):{width}}  {_words(value)}")
    for owner in registry:
        files, pending = owner.pop("files"), owner.pop("pending")
        print("", _line(owner), *(f"  {_line(each)}" for each in (*files, *pending)), sep="\n")


def _words(value: object) -> str:
    """Return a value of the state as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return quoted(value)


def _line(values: dict[str, object]) -> str:
    return "  ".join(f"{printable(name)} {_words(value)}" for name, value in values.items() if value != "")


def _seal(arguments: argparse.Namespace) -> None:
    """Add seals to a file on a memfs. It must be empty and open nowhere for the guest seal."""
    names = ",".join(arguments.seals)
    bits = seals.parse(names)
    with _sealable(arguments.file) as file:
        try:
            file.set("user.memfs.seals", names)
        except OSError as error:
            raise _refused_seal(file, bits, error) from error


def _refused_seal(file: OnMemfs, bits: int, error: OSError) -> Exception:
    """Return why a file cannot be sealed, in words where the errno's are few."""
    if error.errno == errno.EBUSY and bits & seals.F_SEAL_GUEST:
        what = "is not empty" if os.fstat(file.fd).st_size else "is open or mapped somewhere"
        return CommandError(f"{file.path}: it {what}; the guest seal is for empty files that nobody has open")
    if error.errno == errno.EBUSY:
        return CommandError(f"{file.path}: somebody has it open for writing, or mapped")
    if error.errno == errno.EPERM and seals.F_SEAL_SEAL & seals.parse(file.get("user.memfs.seals")):
        return CommandError(f"{file.path}: it is sealed against further seals")
    return error


def _show_seals(arguments: argparse.Namespace) -> None:
    """Print the seals of a file on a memfs, separated by commas; an empty line if it has none."""
    with _sealable(arguments.file) as file:
        print(printable(file.get("user.memfs.seals")))


@contextmanager
def _sealable(path: str) -> Iterator[OnMemfs]:
    """Hold a regular file on a memfs. Raises CommandError for something else."""
    with locate(path) as file:
        mode = os.fstat(file.fd).st_mode
        if stat.S_ISDIR(mode):
            raise CommandError(f"{path}: a directory; what its files are sealed with is user.memfs.default_seals")
        if not stat.S_ISREG(mode):
            raise CommandError(f"{path}: not a regular file")
        yield file


def _create(arguments: argparse.Namespace) -> None:
    """Create a file on a memfs. It must not exist."""
    bits = seals.parse(arguments.seals)
    if bits & seals.F_SEAL_GUEST and not is_page_aligned(arguments.size):
        raise CommandError(f"{arguments.file}: the size of a guest-sealed file is a multiple of {PAGE_SIZE}")
    directory, name = os.path.split(arguments.file)
    if not name:
        raise CommandError(f"{arguments.file or 'FILE'}: there is no name for the file")
    with locate(directory or ".", last_link=True) as parent:
        fd = parent.create(name)
        path = f"/proc/self/fd/{fd}"
        try:
            with naming(arguments.file):
                # A guest-sealed file begins empty; what is sealed in another way may be unable to grow.
                _add_seals(path, bits & seals.F_SEAL_GUEST)
                os.truncate(path, arguments.size)
                if arguments.allocate and arguments.size:
                    from memfs.cli import populate

                    with open(path, "r+b", buffering=0) as file:
                        populate.allocate(file.fileno(), ByteOffset(0), arguments.size)
                _add_seals(path, bits & ~seals.F_SEAL_GUEST)
        except OSError:
            os.unlink(name, dir_fd=parent.fd)
            raise
        finally:
            os.close(fd)


def _add_seals(path: str, bits: int) -> None:
    if not bits:
        return
    # A handle for ioctl only (open(2): access mode 3) cannot be mapped, so it does not stand in the way of a seal.
    fd = os.open(path, os.O_ACCMODE | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, seals.MEMFS_IOC_ADD_SEALS, seals.IOC_ARGUMENT.pack(bits))
    finally:
        os.close(fd)


def _allocate(arguments: argparse.Namespace) -> None:
    """Allocate the memory of a file on a memfs, as fallocate(1) does, with a progress bar on a terminal."""
    from memfs.cli import populate

    with locate(arguments.file) as file:
        fd = file.open(os.O_RDWR)
        try:
            with naming(file.path):
                populate.allocate(fd, ByteOffset(arguments.offset), arguments.length)
        finally:
            os.close(fd)


def _populate(arguments: argparse.Namespace) -> None:
    """Fill a guest-sealed file with its first content, before its guest runs, and print the measurement.

    It is the SHA-384 over page index (u64, little-endian) and content of each page in order, of all that was populated
    so far.
    """
    from memfs.cli import populate

    if arguments.source == "-" and sys.stdin.isatty():
        raise CommandError("populate: name a file as SOURCE, or have a pipe on standard input")
    with (
        locate(arguments.file) as file,
        open(
            0 if arguments.source == "-" else arguments.source, "rb", buffering=0, closefd=arguments.source != "-"
        ) as source,
    ):
        status = os.fstat(source.fileno())
        total = status.st_size if stat.S_ISREG(status.st_mode) else None
        print(populate.populate(file, source, ByteOffset(arguments.offset), total).hex())
