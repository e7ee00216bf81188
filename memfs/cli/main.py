"""The command `memfs`: mount a memfs, and create, seal and look at files on one.

Exit codes: 0, 1 for anything that went wrong (one sentence on standard error), 2 for wrong usage (argparse's).
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Final, NoReturn

from memfs import __version__
from memfs.cli.arguments import page_range, size
from memfs.cli.command import CommandError
from memfs.cli.states import state_of
from memfs.contract.on_memfs import OnMemfs, locate, naming
from memfs.contract.sizes import format_size
from memfs.contract.sys.standard_descriptors import fill_standard_descriptors
from memfs.contract.terminal import Parser, printable, quoted
from memfs.contract.units import ByteOffset
from memfs.options import OptionError
from memfs.store import seals

#: The commands that have a file of their own, which is imported only for them: some take longer to import than to run
_FILES: Final = {
    "mount": "memfs.cli.mount",
    "remount": "memfs.cli.remount",
    "list": "memfs.cli.mounts",
    "umount": "memfs.cli.mounts",
    "upgrade": "memfs.cli.upgrade",
    "metrics": "memfs.cli.metrics",
    "doctor": "memfs.cli.doctor",
    "map": "memfs.cli.watch.map",
    "top": "memfs.cli.watch.top",
    "web": "memfs.cli.watch.web",
}
_HERE: Final = frozenset({"--version", "stat", "seal", "seals", "create", "allocate", "convert", "populate"})


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit."""
    fill_standard_descriptors()
    given = sys.argv[1:] if arguments is None else arguments
    parsed = build_parser(given[0] if given else "").parse_args(given)
    try:
        parsed.run(parsed)
        sys.stdout.flush()
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


def build_parser(command: str = "") -> argparse.ArgumentParser:
    """Return the parser of the command line, which may lack other commands than the one that is given."""
    parser = Parser(prog="memfs", description="A filesystem that is the memory of virtual machines.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    needed = [_FILES[command]] if command in _FILES else [] if command in _HERE else dict.fromkeys(_FILES.values())
    for name in needed:
        import_module(name).add_to(commands)

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
        type=size,
        default=0,
        help="its size in bytes, or with k, m, g, t (a hole: no memory used)",
    )
    create.add_argument("--allocate", action="store_true", help="allocate its memory; otherwise it is a hole")
    create.set_defaults(run=_create)

    allocate = commands.add_parser("allocate", help="allocate the memory of a file", description=_allocate.__doc__)
    allocate.add_argument("file", metavar="FILE")
    allocate.add_argument("--offset", metavar="SIZE", type=size, default=0, help="where to begin (default 0)")
    allocate.add_argument("--length", metavar="SIZE", type=size, help="how much (default: to the file's end)")
    allocate.set_defaults(run=_allocate)

    convert = commands.add_parser("convert", help="convert memory between two files", description=_convert.__doc__)
    convert.add_argument("--to", choices=("private", "shared"), required=True, help="which side it is to be on")
    convert.add_argument("--preserve", action="store_true", help="keep its content, where the VM allows that")
    convert.add_argument("shared", metavar="SHARED")
    convert.add_argument("private", metavar="PRIVATE", help="a guest-sealed file")
    convert.add_argument(
        "ranges",
        metavar="OFFSET:LENGTH",
        type=page_range,
        nargs="+",
        help="in bytes, or with k, m, g, t; multiples of 4k",
    )
    convert.set_defaults(run=_convert)

    populate = commands.add_parser("populate", help="fill guest memory with an image", description=_populate.__doc__)
    populate.add_argument("file", metavar="FILE")
    populate.add_argument("source", metavar="SOURCE", nargs="?", default="-", help="a file; default: standard input")
    populate.add_argument(
        "--offset", metavar="SIZE", type=size, default=0, help="where in FILE; a multiple of 4k (default 0)"
    )
    populate.set_defaults(run=_populate)
    return parser


def _stat(arguments: argparse.Namespace) -> None:
    """Show the state of a mounted memfs: its options, what is in use, and whether it is in passthrough mode."""
    with locate(arguments.path, last_link=True) as mount:
        state = state_of(mount)
    if arguments.json:
        print(json.dumps(state))
        return
    # Those of another version are none.
    registry, notifications, conversions = (
        state.pop(name, None) or {} for name in ("registry", "notifications", "conversions")
    )
    said = {name.replace("_", " "): value for name, value in state.items() if value is not None}
    width = max(map(len, said), default=0)
    for name, value in said.items():
        print(f"{printable(name):{width}}  {_words(value)}")
    for side, count in conversions.items():
        print(f"conversions to {printable(side)}: {count['count']} of {count['pages']} pages")
    for kind, tally in notifications.items():
        mean, longest = 1000 * tally["seconds"] / max(1, tally["count"]), 1000 * tally["longest"]
        of = f"{tally['count']} of {tally['pages']} pages"
        print(f"{printable(kind)}: {of}, {mean:.3f} ms each, {longest:.3f} ms at most")
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
        return CommandError(f"{file.path}: somebody has it open for writing, or mapped; end that, and seal it again")
    if error.errno == errno.EPERM and seals.F_SEAL_SEAL & seals.parse(file.get("user.memfs.seals")):
        return CommandError(f"{file.path}: it is sealed against further seals; only a new file can have others")
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
    directory, name = os.path.split(arguments.file)
    if not name:
        raise CommandError(f"{arguments.file or 'FILE'}: there is no name for the file")
    with locate(directory or ".", last_link=True) as parent:
        if bits & seals.F_SEAL_GUEST and arguments.size % (granule := _granule(parent)):
            why = f"the size of a guest-sealed file here is a multiple of {format_size(granule)}"
            raise CommandError(f"{arguments.file}: {why}")
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


def _granule(on: OnMemfs) -> int:
    """Return in what multiples, in bytes, guest-sealed files of a mount get and lose memory. Raises CommandError."""
    granule = state_of(on).get("guest_page_size")
    if not isinstance(granule, int) or granule <= 0:
        raise CommandError(f"{on.path}: what it says of its state makes no sense; is it of this version?")
    return granule


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
        fd = file.open(os.O_RDWR)  # of a regular file only
        try:
            if seals.F_SEAL_GUEST & seals.parse(file.get("user.memfs.seals")):
                granule = _granule(file)
                for option, number in (("--offset", arguments.offset), ("--length", arguments.length or 0)):
                    if number % granule:
                        raise CommandError(f"{file.path}: {option} must be a multiple of {format_size(granule)}")
            with naming(file.path):
                populate.allocate(fd, ByteOffset(arguments.offset), arguments.length)
        finally:
            os.close(fd)


def _convert(arguments: argparse.Namespace) -> None:
    """Convert memory of a virtual machine: it leaves one of its two files for the other, where it arrives zeroed.

    What is on the wanted side already stays as it is. Either all is converted or nothing, up to 512 ranges.
    """
    from memfs.cli.convert import convert_files

    with locate(arguments.shared) as shared, locate(arguments.private) as private:
        to_private = arguments.to == "private"
        convert_files(shared, private, arguments.ranges, to_private=to_private, preserve=arguments.preserve)


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
