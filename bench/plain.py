"""An ordinary in-memory filesystem with pyfuse3, written as pyfuse3's own examples are: what memfs is compared with.

    python -m bench.plain MOUNTPOINT [--attr-timeout SECONDS]

Files are bytearrays, directories are dicts, and libfuse talks to the kernel itself. It prints one line when mounted,
and ends when it is unmounted. Nothing in it is slow on purpose: the examples keep their tables in SQLite, it does not.
"""

from __future__ import annotations

import argparse
import errno
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)


@dataclass
class _Node:
    ino: int
    mode: int
    uid: int
    gid: int
    nlink: int = 1
    nlookup: int = 0
    data: bytearray = field(default_factory=bytearray)
    entries: dict[bytes, _Node] = field(default_factory=dict)
    time_ns: int = field(default_factory=time.time_ns)


class Plain(pyfuse3.Operations):
    """As little as works."""

    enable_writeback_cache = False

    def __init__(self, attr_timeout: float) -> None:
        super().__init__()
        self._timeout = attr_timeout
        self._root = _Node(pyfuse3.ROOT_INODE, stat.S_IFDIR | 0o755, os.getuid(), os.getgid())
        self._nodes = {self._root.ino: self._root}
        self._next = self._root.ino + 1

    def _attributes(self, node: _Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino, entry.st_mode, entry.st_nlink = node.ino, node.mode, node.nlink
        entry.st_uid, entry.st_gid, entry.st_size = node.uid, node.gid, len(node.data)
        entry.st_blksize, entry.st_blocks = 4096, (len(node.data) + 511) // 512
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.time_ns
        entry.entry_timeout = entry.attr_timeout = self._timeout
        return entry

    def _looked_up(self, node: _Node) -> EntryAttributes:
        node.nlookup += 1
        return self._attributes(node)

    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        node = self._nodes[parent_inode].entries.get(name)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._looked_up(node)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for ino, nlookup in inode_list:
            node = self._nodes[ino]
            node.nlookup -= nlookup
            self._free(node)

    def _free(self, node: _Node) -> None:
        if not node.nlink and not node.nlookup:
            self._nodes.pop(node.ino, None)

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self._nodes[inode])

    async def setattr(
        self, inode: InodeT, attr: EntryAttributes, fields: SetattrFields, fh: FileHandleT | None, ctx: RequestContext
    ) -> EntryAttributes:
        node = self._nodes[inode]
        if fields.update_size:
            del node.data[attr.st_size :]
            node.data.extend(bytes(attr.st_size - len(node.data)))
        if fields.update_mode:
            node.mode = attr.st_mode
        return self._attributes(node)

    def _make(self, parent_inode: InodeT, name: FileNameT, mode: int, ctx: RequestContext) -> _Node:
        node = _Node(self._next, mode & ~ctx.umask, ctx.uid, ctx.gid)
        self._next += 1
        self._nodes[node.ino] = node
        self._nodes[parent_inode].entries[name] = node
        return node

    async def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        return self._looked_up(self._make(parent_inode, name, stat.S_IFDIR | mode, ctx))

    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        node = self._make(parent_inode, name, stat.S_IFREG | mode, ctx)
        return FileInfo(fh=FileHandleT(node.ino)), self._looked_up(node)

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        node = self._nodes[parent_inode].entries.pop(name)
        node.nlink -= 1
        self._free(node)

    rmdir = unlink

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        return FileInfo(fh=FileHandleT(inode))

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return FileHandleT(inode)

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        for number, (name, node) in enumerate(list(self._nodes[fh].entries.items())):
            if number >= start_id:
                if not pyfuse3.readdir_reply(token, FileNameT(name), self._attributes(node), number + 1):
                    break
                node.nlookup += 1

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return bytes(self._nodes[fh].data[off : off + size])

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        data = self._nodes[fh].data
        if len(data) < off:
            data.extend(bytes(off - len(data)))
        data[off : off + len(buf)] = buf
        return len(buf)

    async def release(self, fh: FileHandleT) -> None:
        pass

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        answer = StatvfsData()
        answer.f_bsize = answer.f_frsize = 4096
        answer.f_blocks = answer.f_bfree = answer.f_bavail = answer.f_files = answer.f_ffree = answer.f_favail = 1 << 20
        return answer


def main() -> None:
    """Mount and serve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("mountpoint")
    parser.add_argument("--attr-timeout", type=float, default=300)
    arguments = parser.parse_args()
    options = set(pyfuse3.default_options) | {"fsname=plain", "default_permissions"}
    pyfuse3.init(Plain(arguments.attr_timeout), arguments.mountpoint, options)
    print("mounted", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
