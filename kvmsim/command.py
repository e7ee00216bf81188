"""What the commands of `kvmsim` have in common: options that are sizes, and the two files of guest memory."""

from __future__ import annotations

import argparse
import os

from kvmsim.vmm.vmm import Vmm
from memfs.contract.picture import check_format
from memfs.contract.sizes import parse_size


class CommandError(Exception):
    """Why a command failed: one sentence."""


def size_of(text: str, option: str) -> int:
    """Parse a size in bytes, or with k, m, g. Raises CommandError naming the option."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise CommandError(f"{option} {text}: {error}") from None


def check_files(vmm: Vmm, shared_path: str, private_path: str) -> None:
    """Raise CommandError, with what to do, for files that no memslot can have."""
    shared, private = os.fstat(vmm.shared), os.fstat(vmm.private)
    if os.path.samestat(shared, private):
        raise CommandError(f"{shared_path}: --shared and --private are one file; a guest needs two")
    if shared.st_dev != private.st_dev:
        raise CommandError(f"{shared_path} and {private_path} lie on two mounts; a guest's files are on one")
    if _is_guest_sealed(vmm.shared):
        raise CommandError(
            f"{shared_path}: it is guest-sealed, so the host cannot share it (touch makes one that is not)"
        )
    if not _is_guest_sealed(vmm.private):
        how = "`memfs create --seals guest FILE` makes one that is"
        raise CommandError(f"{private_path}: it is not guest-sealed ({how})")


def _is_guest_sealed(fd: int) -> bool:
    return b"guest" in os.getxattr(fd, "user.memfs.seals").split(b",")


def picture_file(text: str) -> str:
    """Parse the name of a file that is to have a picture in it, as argparse has it."""
    try:
        return check_format(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
