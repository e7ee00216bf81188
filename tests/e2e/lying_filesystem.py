"""A FUSE filesystem of the type of a memfs, that says something else of its state.

`lying` runs it in a process of its own. Whoever may mount a filesystem for all can give it that type.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memfs.contract.sys.libc import mount
from memfs.fuse.abi import IN_HEADER, Opcode, error_reply, reply

from .conftest import run
from .stuck_filesystem import ANSWERS, ROOT


@contextmanager
def lying(mountpoint: Path, said: str, user: int = 0) -> Iterator[None]:
    """Have one mounted, as of a user, whose extended attributes all have this value."""
    if os.geteuid() != 0:
        pytest.skip("mounts by itself, so it needs root")
    command = [sys.executable, "-m", __name__, str(mountpoint), said, str(user)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "mounted\n"
            yield
        finally:
            run("umount", "--lazy", mountpoint)
            process.kill()


def main(mountpoint: str, said: str, user: str) -> None:
    """Mount it, say "mounted", and serve until it is unmounted."""
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mount("none", mountpoint, "fuse.memfs", 0, f"fd={fuse},rootmode=40000,user_id={user},group_id=0,allow_other")
    print("mounted", flush=True)
    while True:
        try:
            message = os.read(fuse, 1 << 17)
        except OSError:
            return
        _, opcode, unique, *_ = IN_HEADER.unpack_from(message)
        if opcode == Opcode.GETXATTR:
            (most,) = struct.unpack_from("=I", message, IN_HEADER.size)
            fits = len(os.fsencode(said)) <= most
            os.write(fuse, reply(unique, os.fsencode(said)) if fits else error_reply(unique, errno.ERANGE))
        elif opcode == Opcode.GETATTR:
            os.write(fuse, reply(unique, struct.pack("=QII", 60, 0, 0) + ROOT))
        elif opcode == Opcode.INIT:
            os.write(fuse, reply(unique, ANSWERS[Opcode.INIT]))
        elif opcode not in (Opcode.FORGET, Opcode.BATCH_FORGET):
            os.write(fuse, error_reply(unique, errno.ENOSYS))


if __name__ == "__main__":
    main(*sys.argv[1:])
