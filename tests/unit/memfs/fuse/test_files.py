"""Answers on open files that could take long."""

from __future__ import annotations

import os
import stat
import threading

import pytest
import trio

from memfs.contract.units import ByteOffset
from memfs.fuse.abi import IN_HEADER, LSEEK_IN, LSEEK_OUT, Opcode, Request
from memfs.fuse.files import FileHandlers
from memfs.store.backing import MemfdBacking
from memfs.store.chunks import LONG
from memfs.store.file import File
from memfs.store.seals import F_SEAL_GUEST
from memfs.tree.inode import RegularFile
from memfs.tree.open_files import OpenFiles
from memfs.tree.tree import ROOT_INO, Tree


@pytest.mark.parametrize("seals", [0, F_SEAL_GUEST], ids=["ordinary", "guest-sealed"])
async def test_to_search_a_large_file_holds_up_nobody(seals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may look at every page of it: not in the event loop's thread."""
    backing = MemfdBacking(1 << 30)
    tree = Tree(lambda ino, seals: File(backing, ino, seals), 100, 0o755, 0, 0)
    inode = tree.create(ROOT_INO, b"file", stat.S_IFREG | 0o600, 0, 0, seals=seals)
    assert isinstance(inode, RegularFile)
    open_files = OpenFiles(tree)
    handlers = FileHandlers(tree, open_files, backing)
    fh, _ = open_files.open_file(inode, os.O_RDWR)
    threads, seek = list[int](), File.seek

    def seeking(file: File, offset: ByteOffset, whence: int) -> ByteOffset:
        threads.append(threading.get_ident())
        return seek(file, offset, whence)

    monkeypatch.setattr(File, "seek", seeking)
    for size, is_here in ((LONG, True), (700 << 20, False)):
        await inode.file.truncate(size)
        body = LSEEK_IN.pack(fh, 4096, os.SEEK_HOLE, 0)
        header = IN_HEADER.pack(IN_HEADER.size + len(body), Opcode.LSEEK, 2, inode.ino, 0, 0, 0, 0, 0)
        reply = await handlers.lseek(Request.parse(memoryview(header + body)))
        assert LSEEK_OUT.unpack(reply) == (4096,)
        assert (threads.pop() == threading.get_ident()) == is_here
    open_files.close()
    tree.close()
    await trio.lowlevel.checkpoint()
