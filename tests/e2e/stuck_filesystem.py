"""A FUSE filesystem with one file that never answers when the file is closed, and a client that registers that file.

Run as `python -m tests.e2e.stuck_filesystem MOUNTPOINT SOCKET`. Says "asked" when the kernel has asked it to flush the
file, that is, when somebody is in close(2). In a process of its own: who inherits its descriptor is stuck, too.
"""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
import struct
import sys

from memfs.fuse.wire import IN_HEADER, Opcode, error_reply, reply
from memfs.libc import mount

ROOT = struct.pack("=QQQqqqIIIIIIIIII", 1, 0, 0, *[0] * 6, 0o40755, 2, 0, 0, 0, 4096, 0)
FILE = struct.pack("=QQQqqqIIIIIIIIII", 2, 0, 0, *[0] * 6, 0o100644, 1, 0, 0, 0, 4096, 0)
ANSWERS = {
    Opcode.INIT: struct.pack("=IIIIHHIIHHII24x", 7, 31, 0, 0, 10, 5, 4096, 1, 1, 0, 0, 0),
    Opcode.LOOKUP: struct.pack("=QQQQII", 2, 0, 60, 60, 0, 0) + FILE,
    Opcode.OPEN: struct.pack("=QIi", 1, 0, 0),
}


def serve(fuse: int) -> None:
    while True:
        _, opcode, unique, nodeid, *_ = IN_HEADER.unpack_from(os.read(fuse, 1 << 17))
        if opcode == Opcode.FLUSH:
            print("asked", flush=True)
        elif opcode == Opcode.GETATTR:
            os.write(fuse, reply(unique, struct.pack("=QII", 60, 0, 0) + (ROOT if nodeid == 1 else FILE)))
        elif opcode in ANSWERS:
            os.write(fuse, reply(unique, ANSWERS[Opcode(opcode)]))
        elif opcode not in (Opcode.FORGET, Opcode.BATCH_FORGET):
            os.write(fuse, error_reply(unique, errno.ENOSYS))


def main(mountpoint: str, path: str) -> None:
    """Two processes: one that had both the file and /dev/fuse could not even be killed."""
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mount("stuck", mountpoint, "fuse", 0, f"fd={fuse},rootmode=40000,user_id=0,group_id=0")
    if os.fork():
        serve(fuse)
    os.close(fuse)
    file = os.open(f"{mountpoint}/file", os.O_RDWR)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(path)
    client.send(struct.pack("<HHIQHH", 1, 1, 20, 1, 1, 1))  # Hello
    client.recv(100)
    register = struct.pack("<HHIQ", 1, 3, 16, 2)
    client.sendmsg([register], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))])
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
