"""A FUSE filesystem with one file that never answers when it is read or closed, and a client that makes use of it.

Run as `python -m tests.e2e.stuck_filesystem MOUNTPOINT SOCKET WHAT`. WHAT says which descriptor the client registers:

    file    of that file: who closes it waits for ever
    epoll   of an epoll in which somebody waits for ever, with its lock, because what it finds is written to a mapping
            of that file: who looks at /proc/PID/fdinfo of it waits as long

Says "asked" when the kernel has asked it for what it does not answer. In a process of its own: who inherits its
descriptor is stuck, too.
"""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time

from memfs.contract.protocol.connection import Connection, Role
from memfs.contract.protocol.messages import Hello, Register
from memfs.contract.sys.libc import mount
from memfs.fuse.abi import IN_HEADER, Opcode, error_reply, reply

FUSE_READ = 15  # linux/fuse.h
ROOT = struct.pack("=QQQqqqIIIIIIIIII", 1, 0, 0, *[0] * 6, 0o40755, 2, 0, 0, 0, 4096, 0)
FILE = struct.pack("=QQQqqqIIIIIIIIII", 2, mmap.PAGESIZE, 8, *[0] * 6, 0o100644, 1, 0, 0, 0, 4096, 0)
ANSWERS = {
    Opcode.INIT: struct.pack("=IIIIHHIIHHII24x", 7, 31, 0, 0, 10, 5, 4096, 1, 1, 0, 0, 0),
    Opcode.LOOKUP: struct.pack("=QQQQII", 2, 0, 60, 60, 0, 0) + FILE,
    Opcode.OPEN: struct.pack("=QIi", 1, 0, 0),
}


def serve(fuse: int) -> None:
    while True:
        _, opcode, unique, nodeid, *_ = IN_HEADER.unpack_from(os.read(fuse, 1 << 17))
        if opcode in (Opcode.FLUSH, FUSE_READ):
            print("asked", flush=True)
        elif opcode == Opcode.GETATTR:
            os.write(fuse, reply(unique, struct.pack("=QII", 60, 0, 0) + (ROOT if nodeid == 1 else FILE)))
        elif opcode in ANSWERS:
            os.write(fuse, reply(unique, ANSWERS[Opcode(opcode)]))
        elif opcode not in (Opcode.FORGET, Opcode.BATCH_FORGET):
            os.write(fuse, error_reply(unique, errno.ENOSYS))


def busy_epoll(file: int) -> int:
    """An epoll whose lock a child has, for as long as a page of the file does not come."""
    epoll = select.epoll()
    epoll.register(os.pipe()[1], select.EPOLLOUT)
    if os.fork() == 0:
        there = ctypes.c_char.from_buffer(mmap.mmap(file, mmap.PAGESIZE))
        ctypes.CDLL(None).epoll_wait(epoll.fileno(), ctypes.byref(there), 1, -1)
        os._exit(0)
    return os.dup(epoll.fileno())


def main(mountpoint: str, path: str, what: str) -> None:
    """Two processes: one that had both the file and /dev/fuse could not even be killed."""
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mount("stuck", mountpoint, "fuse", 0, f"fd={fuse},rootmode=40000,user_id=0,group_id=0")
    if os.fork():
        serve(fuse)
    os.close(fuse)
    fd = os.open(f"{mountpoint}/file", os.O_RDWR)
    if what == "epoll":
        fd = busy_epoll(fd)
        time.sleep(0.3)  # the child has come to its mapping
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(path)
    connection = Connection(Role.OWNER)
    client.send(connection.send(Hello())[1])
    connection.receive(client.recv(100))
    client.sendmsg(
        [connection.send(Register(), descriptors=1)[1]],
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))],
    )
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
