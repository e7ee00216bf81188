"""The program mount.fuse.memfs, which mount(8) runs for `mount -t fuse.memfs` and for lines of that type in fstab.

    mount.fuse.memfs SOURCE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]

SOURCE is any name (`none`, `memfs#guest`). It stands in /proc/mounts as it is, since that is how `mount -a` finds that
a line is mounted already. mount(8) has taken away what it does itself (X-mount.mkdir), and says the rest: flags of its
own for which there is nothing to do, and when it remounts, what /proc/mounts has of FUSE's. What it does not say is as
for every filesystem that it mounts: suid and dev are allowed, and it does not pass on that they are.

Rejected: to be run through mount.fuse3, which is what mount(8) falls back to without this program. It has a shell run
`memfs SOURCE MOUNTPOINT`, adds options of its own, and knows no remount.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NoReturn

from memfs import __version__
from memfs.cli.command import CommandError
from memfs.cli.mount import Mount, mountpoint_of, print_notes, start
from memfs.cli.remount import DEFAULTS_OF_MOUNT, remount
from memfs.contract.sys.mount_namespace import enter_mount_namespace
from memfs.contract.sys.mountinfo import MEMFS
from memfs.contract.sys.standard_descriptors import fill_standard_descriptors
from memfs.contract.terminal import printable
from memfs.options import REMOUNT, MountOptions, OptionError

_PROGRAM: Final = "mount.fuse.memfs"
# mount(8), exit status
_WRONG_USAGE: Final = 1
_FAILED: Final = 32
#: what /proc/mounts says of a FUSE filesystem beside what was asked for
_OF_FUSE: Final = ("user_id=", "group_id=", "fd=", "rootmode=", "max_read=", "blksize=")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the command line and exit with mount(8)'s code for that."""
        self.print_usage(sys.stderr)
        self.exit(_WRONG_USAGE, f"{self.prog}: {printable(message)}\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(prog=_PROGRAM, description="Mount a memfs, for mount(8) and fstab(5).")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("source", metavar="SOURCE", help="any name; it stands in /proc/mounts in the place of a device")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.add_argument(
        "-o", dest="options", metavar="OPTIONS", action="append", default=[], help="as for `memfs mount`, and remount"
    )
    parser.add_argument("-f", dest="fake", action="store_true", help="check everything, and do not mount")
    parser.add_argument("-v", dest="verbose", action="store_true", help="have the daemon log more")
    parser.add_argument("-n", action="store_true", help="nothing: there is no mtab to be written")
    parser.add_argument("-s", action="store_true", help="nothing: an unknown option is refused all the same")
    parser.add_argument("-N", dest="namespace", metavar="NAMESPACE", help="mount in another mount namespace")
    parser.add_argument("-t", dest="type", metavar="TYPE", choices=[MEMFS], help=f"{MEMFS}; there is no other")
    return parser


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit."""
    fill_standard_descriptors()
    parsed = build_parser().parse_args(arguments)
    try:
        _run(parsed)
    except (CommandError, OptionError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or parsed.mountpoint}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _fail(why: str) -> NoReturn:
    print(f"{_PROGRAM}: {printable(why)}", file=sys.stderr)
    sys.exit(_FAILED)


def _run(parsed: argparse.Namespace) -> None:
    if parsed.namespace is not None:
        _enter(parsed)
    items = ",".join(parsed.options).split(",")
    if REMOUNT in items:
        if not parsed.fake:
            wanted = (each for each in items if not each.startswith(_OF_FUSE))
            remount(parsed.mountpoint, ",".join(wanted), complete=True)
        return
    options = replace(MountOptions.parse(",".join([*DEFAULTS_OF_MOUNT, *items])), fsname=parsed.source)
    mountpoint = mountpoint_of(parsed.mountpoint)
    if not parsed.fake:
        print_notes(start(Mount(mountpoint, options, verbose=parsed.verbose)))


def _enter(parsed: argparse.Namespace) -> NoReturn:
    """Run the same again in another mount namespace."""
    program, mountpoint = os.path.abspath(sys.argv[0]), os.path.abspath(parsed.mountpoint)
    flags = [flag for flag, is_set in (("-f", parsed.fake), ("-v", parsed.verbose)) if is_set]
    options = [f"-o{','.join(parsed.options)}"] if any(parsed.options) else []
    enter_mount_namespace(parsed.namespace)
    os.execv(program, [program, *flags, *options, "--", parsed.source, mountpoint])
