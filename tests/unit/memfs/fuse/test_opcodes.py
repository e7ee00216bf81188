"""The table of who answers which request."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator

import pytest

from memfs.fuse.abi import (
    ATTR_OUT,
    ATTRIBUTES,
    DIRENT,
    ENTRY_OUT,
    FATTR_FH,
    FATTR_SIZE,
    IN_HEADER,
    LINK_IN,
    MKDIR_IN,
    MKNOD_IN,
    OPEN_IN,
    OPEN_OUT,
    READ_IN,
    RENAME2_IN,
    RENAME_IN,
    SETATTR_IN,
    SETXATTR_IN,
    Malformed,
    Opcode,
    Request,
)
from memfs.fuse.channel import Handler, Pyfuse3
from memfs.fuse.files import FileHandlers
from memfs.fuse.init import Init
from memfs.fuse.ioctl import IoctlHandlers
from memfs.fuse.names import NameHandlers
from memfs.fuse.opcodes import who_answers
from memfs.fuse.page_cache import PageCache
from memfs.fuse.passthrough import Passthrough, Wanted
from memfs.fuse.xattrs import XattrHandlers
from memfs.store.file import File
from memfs.store.memfd_backing import MemfdBacking
from memfs.tree.access_times import AccessTimes
from memfs.tree.open_files import OpenFiles
from memfs.tree.tree import ROOT_INO, Tree
from memfs.tree.xattrs import Control, Xattrs
from tests.helpers import describe_nothing, notify_nobody, raises


class Mount:
    """What answers requests, without a kernel."""

    def __init__(self) -> None:
        self.backing = MemfdBacking(1 << 20)
        self.tree = Tree(lambda ino, seals: File(self.backing, ino, seals, held=True), 100, 0o1777, 0, 0)
        self.open_files = OpenFiles(self.tree)
        xattrs = Xattrs(self.tree, Control("/socket", describe_nothing, lambda options: None, lambda inode: "{}"))
        handlers = XattrHandlers(xattrs)
        files = FileHandlers(self.tree, self.open_files, self.backing, PageCache(notify_nobody))
        self.table: dict[int, Handler | Pyfuse3] = who_answers(
            Init(Passthrough(-1, Wanted.OFF, None), handlers, lambda: None, idmapped=True),
            NameHandlers(self.tree, self.open_files, files, xattrs, AccessTimes()),
            files,
            handlers,
            IoctlHandlers(self.tree, self.open_files, lambda ino: None),
        )

    async def ask(self, opcode: Opcode, nodeid: int, body: bytes = b"") -> bytes:
        """Return what the kernel would be answered."""
        handler = self.table[opcode]
        assert not isinstance(handler, Pyfuse3)
        message = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, 2, nodeid, 0, 0, 0, 0, 0) + body
        return await handler(Request.parse(memoryview(message))) or b""

    def close(self) -> None:
        self.open_files.close()
        self.tree.check()
        self.tree.close()
        assert self.backing.free_pages == self.backing.total_pages


@pytest.fixture
def mount() -> Iterator[Mount]:
    mount = Mount()
    yield mount
    mount.close()


def test_every_request_is_answered_by_us_or_by_pyfuse3_for_a_reason(mount: Mount) -> None:
    assert set(mount.table) == set(Opcode)
    for opcode, entry in mount.table.items():
        if isinstance(entry, Pyfuse3):
            assert entry.why.startswith("immediate: "), Opcode(opcode).name


def test_pyfuse3_has_nothing_but_the_session(mount: Mount) -> None:
    theirs = {opcode for opcode, entry in mount.table.items() if isinstance(entry, Pyfuse3)}
    assert theirs == {Opcode.INIT, Opcode.DESTROY, Opcode.INTERRUPT}


async def test_names_are_made_renamed_and_removed_as_asked(mount: Mount) -> None:
    await mount.ask(Opcode.MKDIR, ROOT_INO, MKDIR_IN.pack(0o1777, 0o022) + b"d\0")
    directory = mount.tree.lookup(ROOT_INO, b"d")
    assert directory.mode == stat.S_IFDIR | 0o1755
    await mount.ask(Opcode.MKNOD, directory.ino, MKNOD_IN.pack(stat.S_IFCHR | 0o666, 0x103, 0o077, 0) + b"null\0")
    device = mount.tree.lookup(directory.ino, b"null")
    assert (device.mode, device.stat().rdev) == (stat.S_IFCHR | 0o600, 0x103)
    await mount.ask(Opcode.LINK, ROOT_INO, LINK_IN.pack(device.ino) + b"other\0")
    assert mount.tree.lookup(ROOT_INO, b"other") is device
    await mount.ask(Opcode.SYMLINK, ROOT_INO, b"link\0/a/target\0")
    link = mount.tree.lookup(ROOT_INO, b"link")
    assert await mount.ask(Opcode.READLINK, link.ino) == b"/a/target"
    await mount.ask(Opcode.RENAME, ROOT_INO, RENAME_IN.pack(directory.ino) + b"link\0moved\0")
    assert mount.tree.lookup(directory.ino, b"moved") is link
    with raises(errno.EEXIST):
        await mount.ask(Opcode.RENAME2, directory.ino, RENAME2_IN.pack(ROOT_INO, 1, 0) + b"moved\0other\0")
    for name in (b"null", b"moved"):
        await mount.ask(Opcode.UNLINK, directory.ino, name + b"\0")
    await mount.ask(Opcode.RMDIR, ROOT_INO, b"d\0")
    assert list(mount.tree.root.entries) == [b"other"]


@pytest.mark.parametrize("names", [b"one\0", b"one", b"\0two\0", b"one\0\0", b"one\0two", b""])
async def test_two_names_that_are_not_two_are_refused(mount: Mount, names: bytes) -> None:
    with pytest.raises((OSError, Malformed)):
        await mount.ask(Opcode.SYMLINK, ROOT_INO, names)
    assert not mount.tree.root.entries


def entries(data: bytes) -> list[tuple[bytes, int, int]]:
    """Names, numbers and cookies in the answer to READDIRPLUS."""
    found = []
    while data:
        ino, cookie, length, _ = DIRENT.unpack_from(data, ENTRY_OUT.size + ATTRIBUTES.size)
        start = ENTRY_OUT.size + ATTRIBUTES.size + DIRENT.size
        found.append((data[start : start + length], ino, cookie))
        data = data[start + -(-length // 8) * 8 :]
    return found


async def test_a_directory_is_read_in_parts_that_fit_and_what_was_read_is_looked_up(mount: Mount) -> None:
    made = [mount.tree.create(ROOT_INO, b"%0*d" % (number, number), stat.S_IFREG, 0, 0) for number in range(1, 20)]
    fh, _, _ = OPEN_OUT.unpack(await mount.ask(Opcode.OPENDIR, ROOT_INO, OPEN_IN.pack(0, 0)))
    read: list[tuple[bytes, int, int]] = []
    while True:
        cookie = read[-1][2] if read else 0
        part = await mount.ask(Opcode.READDIRPLUS, ROOT_INO, READ_IN.pack(fh, cookie, 700, 0, 0, 0, 0))
        assert len(part) <= 700
        if not part:
            break
        read += entries(part)
    assert [name for name, _, _ in read] == [b".", b"..", *(b"%0*d" % (n, n) for n in range(19, 0, -1))]
    assert {inode.nlookup for inode in made} == {1}
    assert mount.tree.root.nlookup == 0


@pytest.mark.parametrize(
    ("name", "flags", "error"),
    [
        (b"user.old", os.XATTR_CREATE, errno.EEXIST),
        (b"user.new", os.XATTR_REPLACE, errno.ENODATA),
        (b"user.new", os.XATTR_CREATE, None),
        (b"user.old", os.XATTR_REPLACE, None),
    ],
)
async def test_whether_an_attribute_may_be_there_is_heeded(
    mount: Mount, name: bytes, flags: int, error: int | None
) -> None:
    mount.tree.xattrs.set(mount.tree.root, b"user.old", b"old")
    body = SETXATTR_IN.pack(5, flags) + name + b"\0" + b"value"
    if error is None:
        await mount.ask(Opcode.SETXATTR, ROOT_INO, body)
        assert mount.tree.xattrs.get(mount.tree.root, name) == b"value"
    else:
        with raises(error):
            await mount.ask(Opcode.SETXATTR, ROOT_INO, body)


async def test_truncation_says_the_new_size(mount: Mount) -> None:
    inode = mount.tree.create(ROOT_INO, b"file", stat.S_IFREG | 0o600, 0, 0)
    fh, _ = mount.open_files.open_file(mount.tree.regular(inode.ino), os.O_RDWR)
    body = SETATTR_IN.pack(FATTR_SIZE | FATTR_FH, fh, 8192, 0, 0, 0, 0, 0, 0, 0, 0)
    answer = await mount.ask(Opcode.SETATTR, inode.ino, body)
    assert struct.unpack_from("=QQ", answer, ATTR_OUT.size) == (inode.ino, 8192)
