"""What is fuzzed: functions of bytes that return, whatever the bytes are, or have found a defect and raise.

Each stands for an input that somebody else controls: what an owner sends, what the kernel sends, what is typed after
-o, and trace files. Errors that are the answer to bad input are caught here by name; any other is a defect. So is a
broken invariant: what is refused changes nothing, and what is accepted would be packed to the same bytes again.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import trio

from kvmsim.engines.trace_file import Trace, TraceError, read_lackey
from memfs.contract.protocol.connection import Connection, RemoteProtocolError, Role, State
from memfs.contract.protocol.messages import VERSION, Hello, HelloReply
from memfs.contract.units import PAGE_SIZE, ByteOffset
from memfs.fuse.abi import IN_HEADER, Malformed, Opcode, Request
from memfs.fuse.channel import Pyfuse3
from memfs.fuse.files import FileHandlers
from memfs.fuse.init import Init
from memfs.fuse.ioctl import IoctlHandlers
from memfs.fuse.names import NameHandlers
from memfs.fuse.opcodes import who_answers
from memfs.fuse.page_cache import PageCache
from memfs.fuse.passthrough import Passthrough, Wanted
from memfs.fuse.xattrs import XattrHandlers
from memfs.options import MountOptions, OptionError, RemountOptions
from memfs.store import seals
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.tree.access_times import AccessTimes
from memfs.tree.open_files import OpenFiles
from memfs.tree.tree import ROOT_INO, Tree
from memfs.tree.xattrs import Control, Xattrs
from tests.helpers import describe_nothing, notify_nobody

Target = Callable[[bytes], None]
OPCODES: Final = sorted(Opcode)  # inputs name opcodes by their place in this list
_HEADER: Final = struct.Struct("<HHIQ")


def _pieces(data: bytes, width: int) -> Iterator[bytes]:
    """Cut input into pieces, each behind its length in `width` bytes."""
    stream = io.BytesIO(data)
    while head := stream.read(width):
        yield stream.read(int.from_bytes(head, "little"))


def protocol(data: bytes) -> None:
    """Datagrams to a store and to an owner, which have greeted each other if the first byte is odd.

    Each piece: how many descriptors came with it, and which of the two gets it, then the datagram.
    """
    ends = {role: Connection(role) for role in Role}
    if data[:1] and data[0] & 1:
        number, hello = ends[Role.OWNER].send(Hello(name="fuzz"))
        ends[Role.STORE].receive(hello)
        ends[Role.OWNER].receive(ends[Role.STORE].send(HelloReply(VERSION, PAGE_SIZE), answers=number)[1])
    for piece in _pieces(data[1:], 2):
        if not piece:
            continue
        end = ends[Role.STORE if piece[0] & 1 else Role.OWNER]
        datagram, before = piece[1:], _state(end)
        try:
            received = end.receive(datagram, piece[0] >> 1 & 3)
        except RemoteProtocolError:
            assert _state(end) == before, "refused, and changed something"
            continue
        body = received.message.pack()
        version, kind, length, number = _HEADER.unpack_from(datagram)
        assert (version, kind, length, number) == (1, received.message.TYPE, len(datagram), received.id)
        assert _HEADER.pack(version, kind, length, number) + body == datagram, "would be packed otherwise"
        assert before[0] is not State.CLOSED


def _state(end: Connection) -> tuple[Any, ...]:
    sides = [(side.last_id, repr(side.unanswered), side.may_say) for side in (end._ours, end._theirs)]
    return end.state, end.unanswered, sides, end.invalidations, end.conversions


class _Mount:
    """All of a mount that answers requests by itself: files 2 (with a page) and 3 (guest-sealed), directory 4."""

    def __init__(self) -> None:
        self.backing = MemfdBacking(1 << 20)
        self.tree = Tree(lambda ino, born_with: File(self.backing, ino, born_with, held=True), 16, 0o1777, 0, 0)
        self.handles = OpenFiles(self.tree)
        for name, mode, born_with in (
            (b"file", stat.S_IFREG, 0),
            (b"private", stat.S_IFREG, seals.F_SEAL_GUEST),
            (b"directory", stat.S_IFDIR, 0),
        ):
            self.tree.looked_up(self.tree.create(ROOT_INO, name, mode | 0o755, 0, 0, seals=born_with))
        for ino in (2, 3):  # fh 1 and 2
            self.handles.open_file(self.tree.regular(ino), os.O_RDWR)
        self.tree.regular(2).file.write(ByteOffset(0), b"content")
        xattrs = Xattrs(self.tree, Control("/socket", describe_nothing, lambda options: None, lambda inode: "{}"))
        handlers = XattrHandlers(xattrs)
        files = FileHandlers(self.tree, self.handles, self.backing, PageCache(notify_nobody))
        self.table = who_answers(
            Init(Passthrough(-1, Wanted.OFF, None), handlers, lambda: None, idmapped=True),
            NameHandlers(self.tree, self.handles, files, xattrs, AccessTimes()),
            files,
            handlers,
            IoctlHandlers(self.tree, self.handles, lambda ino: None),
        )

    async def ask(self, data: bytes) -> None:
        """As Channel does; what it would make an error reply of passes silently, if its kind is meant for that."""
        with contextlib.suppress(OSError, Malformed):
            request = Request.parse(memoryview(data))
            match self.table.get(request.opcode):
                case None:
                    pass
                case Pyfuse3(amend=amend):
                    if amend is not None:
                        amend(request)
                case handler:
                    answer = await handler(request)
                    assert answer is None or isinstance(answer, bytes)

    def close(self) -> None:
        self.tree.check()
        self.handles.check()
        for inode in self.tree.files():
            inode.file.check()
        self.handles.close()
        self.tree.close()
        assert self.backing.free_pages == self.backing.total_pages, "pages are lost"


def requests(data: bytes) -> None:
    """Send requests as the kernel does.

    Each piece: which opcode, which inode, then the body; or, for opcode 255, all of it.
    """
    mount = _Mount()

    async def ask_all() -> None:
        for piece in _pieces(data, 1):
            if len(piece) < 2:
                continue
            opcode, nodeid, body = piece[0], piece[1], piece[2:]
            if opcode == 255:
                await mount.ask(piece[1:])
                continue
            opcode = OPCODES[opcode % len(OPCODES)]
            header = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, 2, nodeid, 0, 0, 0, 0, 0)
            await mount.ask(header + body)

    try:
        trio.run(ask_all)
    finally:
        mount.close()


def options(data: bytes) -> None:
    """Parse what follows -o, and seals by name."""
    text = data.decode(errors="surrogateescape")
    for parse in (MountOptions.parse, RemountOptions.parse):
        with contextlib.suppress(OptionError):
            parse(text)
    with contextlib.suppress(OSError):
        bits = seals.parse(text)
        assert seals.parse(seals.format_seals(bits)) == bits


def lackey(data: bytes) -> None:
    """Output of valgrind's lackey. What can be read can be saved and read again."""
    with contextlib.suppress(TraceError):
        trace = read_lackey(io.StringIO(data.decode(errors="replace")))
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "trace.npz")
            trace.save(path)
            assert (Trace.load(path).records == trace.records).all()


def trace(data: bytes) -> None:
    """Load a trace file."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(TraceError, OSError):
            loaded = Trace.load(Path(file.name))
            assert loaded.memory_size >= 0
            assert (loaded.records["size"] > 0).all()


TARGETS: Final[dict[str, Target]] = {target.__name__: target for target in (protocol, requests, options, lackey, trace)}
