"""Makes the seeds in corpus/: one file for each thing that the input of a target can say, all of them valid.

Run as `python -m tests.fuzz.make_corpus`; what fuzzing found lies beside them, named after what it was.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

import numpy as np

from kvmsim.engines.trace_file import RECORD, Trace
from memfs.contract.page_ranges import PageRanges
from memfs.contract.protocol.messages import (
    VERSION,
    Ack,
    AllowPreserve,
    ConvertBegin,
    ConvertEnd,
    Done,
    Failed,
    Fallocate,
    Fenced,
    FileId,
    GetPfn,
    Hello,
    HelloReply,
    InvalidateBegin,
    InvalidateEnd,
    Launch,
    Measured,
    Message,
    PfnReply,
    PfnRun,
    Populate,
    PutPfn,
    Register,
    Registered,
    Unregister,
)
from memfs.contract.units import ByteOffset, PageIndex, PageRange, Pfn
from memfs.fuse import abi
from memfs.fuse.abi import Opcode
from memfs.store import seals
from tests.helpers import packed

from .targets import OPCODES

CORPUS: Final = Path(__file__).with_name("corpus")
PAGES: Final = PageRange(PageIndex(0), PageIndex(512))
RANGES: Final = PageRanges.of([PAGES, PageRange(PageIndex(600), PageIndex(601))])
TO_STORE, TO_OWNER = 1, 0


def piece(data: bytes, width: int) -> bytes:
    return len(data).to_bytes(width, "little") + data


def said(message: Message, to: int, number: int, descriptors: int = 0) -> bytes:
    return piece(bytes([descriptors << 1 | to]) + packed(message, number), 2)


def protocol() -> dict[str, bytes]:
    file = FileId(1)
    to_store = [(Register(), 1), (Unregister(file), 0), (GetPfn(file, PAGES, True), 0), (PutPfn(file, PAGES, True), 0)]
    begin, end = InvalidateBegin(file, PAGES), InvalidateEnd(file, PAGES)
    told = (begin, Fallocate(file, PAGES), end)
    runs = PfnReply(file, PAGES, (PfnRun(PAGES, Pfn(512), 9),))
    return {
        "greeting": b"\0" + said(Hello(name="vm"), TO_STORE, 1) + said(HelloReply(VERSION, 4096), TO_OWNER, 1),
        "requests": b"\1" + b"".join(said(m, TO_STORE, n, fds) for n, (m, fds) in enumerate(to_store, 2)),
        "notifications": b"\1" + b"".join(said(m, TO_OWNER, n) for n, m in enumerate(told, 1)),
        "replies": b"\1"
        + said(Registered(file, 2, 3, 4), TO_OWNER, 2, 2)
        + said(runs, TO_OWNER, 3)
        + said(Done(), TO_OWNER, 4)
        + said(Failed(22, "no"), TO_OWNER, 5)
        + said(Ack(), TO_STORE, 1),
        "initial image": b"\1"
        + said(Populate(PAGES, ByteOffset(0)), TO_STORE, 2, 2)
        + said(Launch(file), TO_STORE, 3)
        + said(Measured(bytes(48)), TO_OWNER, 2),
        "conversion": b"\1"
        + said(AllowPreserve(file), TO_STORE, 2)
        + said(ConvertBegin(FileId(2), file, True, RANGES), TO_OWNER, 1)
        + said(Ack(), TO_STORE, 1)
        + said(ConvertEnd(FileId(2), file, True, RANGES), TO_OWNER, 2),
        "fenced": b"\1" + said(Fenced(110, "too late"), TO_OWNER, 1),
    }


def requests() -> dict[str, bytes]:
    def asked(opcode: Opcode, nodeid: int, body: bytes) -> bytes:
        return piece(bytes([OPCODES.index(opcode), nodeid]) + body, 1)

    def fallocate(fh: int, offset: int, length: int, mode: int) -> bytes:
        return asked(Opcode.FALLOCATE, fh + 1, abi.FALLOCATE_IN.pack(fh, offset, length, mode, 0))

    def seek(fh: int, whence: int) -> bytes:
        return asked(Opcode.LSEEK, fh + 1, abi.LSEEK_IN.pack(fh, 0, whence, 0))

    def ioctl(command: int, data: bytes, out: int) -> bytes:
        return asked(Opcode.IOCTL, 2, abi.IOCTL_IN.pack(1, 0, command, 0, len(data), out) + data)

    def set_attributes(valid: int, size: int = 0) -> bytes:
        return asked(Opcode.SETATTR, 2, abi.SETATTR_IN.pack(valid, 1, size, -1, 1 << 40, 5, 5, 0, 0o600, 1, 2))

    create = abi.CREATE_IN.pack(2, 0o644, 0o22, 0)
    allocate = [(fh, place, length, mode) for fh in (1, 2) for place, length, mode in ((0, 65536, 0), (4096, 4096, 3))]
    said = {
        "names": [asked(Opcode.LOOKUP, 1, b"file\0"), asked(Opcode.UNLINK, 1, b"file\0")],
        "forget": [
            asked(Opcode.FORGET, 2, struct.pack("=Q", 1)),
            asked(Opcode.BATCH_FORGET, 0, struct.pack("=IIQQ", 1, 0, 3, 1)),
        ],
        "attributes": [asked(Opcode.GETATTR, 2, bytes(16)), asked(Opcode.STATX, 2, bytes(24))],
        "create": [
            asked(Opcode.CREATE, 4, create + b"new\0"),
            asked(Opcode.RELEASE, 5, abi.RELEASE_IN.pack(3, 0, 0, 0)),
        ],
        "temporary": [asked(Opcode.TMPFILE, 4, create + b"#1\0")],
        "open": [
            asked(Opcode.OPEN, 2, abi.OPEN_IN.pack(0o1002, 1)),
            asked(Opcode.OPENDIR, 1, abi.OPEN_IN.pack(0, 0)),
        ],
        "allocate": [fallocate(*each) for each in allocate],
        "too much": [fallocate(1, 0, 1 << 62, 0), fallocate(2, 0, 1 << 40, 1), fallocate(1, (1 << 63) - 1, 1 << 63, 3)],
        "seek": [seek(1, 3), seek(2, 4)],
        "seals": [ioctl(seals.MEMFS_IOC_GET_SEALS, b"", 4), ioctl(seals.MEMFS_IOC_ADD_SEALS, b"\4\0\0\0", 0)],
        "flags": [
            ioctl(abi.FS_IOC_SETFLAGS, b"\x40\0\0\0", 0),
            ioctl(abi.FS_IOC_GETFLAGS, b"", 4),
            ioctl(abi.FS_IOC_FSGETXATTR, b"", 28),
        ],
        "change": [set_attributes(abi.FATTR_KILL_SUIDGID), set_attributes(0x37), set_attributes(0x48, 4096)],
        "content": [
            asked(Opcode.WRITE, 2, abi.WRITE_IN.pack(1, 0, 4, 4, 0, 0, 0) + b"data"),
            asked(Opcode.READ, 2, abi.READ_IN.pack(1, 0, 4096, 0, 0, 0, 0)),
        ],
        "directory": [
            asked(Opcode.OPENDIR, 1, abi.OPEN_IN.pack(0, 0)),
            asked(Opcode.READDIRPLUS, 1, abi.READ_IN.pack(3, 0, 4096, 0, 0, 0, 0)),
            asked(Opcode.RELEASEDIR, 1, abi.RELEASE_IN.pack(3, 0, 0, 0)),
        ],
        "extended attributes": [
            asked(Opcode.SETXATTR, 2, abi.SETXATTR_IN.pack(5, 1) + b"user.name\0value"),
            asked(Opcode.GETXATTR, 2, abi.GETXATTR_IN.pack(0, 0) + b"user.name\0"),
            asked(Opcode.LISTXATTR, 2, abi.GETXATTR_IN.pack(4096, 0)),
            asked(Opcode.REMOVEXATTR, 2, b"user.name\0"),
            asked(Opcode.SETXATTR, 2, abi.SETXATTR_IN.pack(4, 0) + b"user.memfs.seals\0grow"),
        ],
        "space": [asked(Opcode.STATFS, 1, b"")],
        "session": [
            asked(Opcode.INIT, 0, abi.INIT_IN.pack(7, 40, 0, 0xFFFFFFFF, 0xFFFFFFFF)),
        ],
        "whole": [piece(b"\xff" + abi.IN_HEADER.pack(40, Opcode.GETATTR, 2, 1, 0, 0, 0, 0, 0), 1)],
    }
    return {name: b"".join(parts) for name, parts in said.items()}


def options() -> dict[str, bytes]:
    return {
        "usual": b"size=1g,mode=700,uid=root,allow_other,notify_timeout=0.5",
        "percent": b"size=50%,nr_inodes=2k",
        "tmpfs": b"huge=within_size,mpol=bind:0,noswap",
        "hugetlbfs": b"pagesize=2M,min_size=25%,size=50%",
        "socket": b"socket=/a,socket_mode=0660,socket_group=0",
        "seals": b"guest,shrink,grow",
    }


def lackey() -> dict[str, bytes]:
    return {"usual": b"==1== \nI  04001a30,3\n L 1ffeffe7e0,8\n S 1ffeffe7fe,8\n M 0421c7c8,4\n"}


def trace() -> dict[str, bytes]:
    records = np.zeros(3, RECORD)
    records["gpa"], records["size"] = (0, 4096, 8), 8
    path = CORPUS / "trace" / "usual"
    Trace(records, "true").save(path.with_suffix(".npz"))
    content = path.with_suffix(".npz").read_bytes()
    path.with_suffix(".npz").unlink()
    return {"usual": content}


def main() -> None:
    for make in (protocol, requests, options, lackey, trace):
        directory = CORPUS / make.__name__
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in make().items():
            (directory / name.replace(" ", "-")).write_bytes(content)


if __name__ == "__main__":
    main()
