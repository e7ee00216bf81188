"""Extended attributes: plain ones, judged by a tmpfs, and those of user.memfs that do something."""

from __future__ import annotations

import errno
import stat
import struct
from collections.abc import Callable
from typing import NoReturn

import pytest
import trio

from memfs.options import RemountOptions
from memfs.store.seals import F_SEAL_GROW, F_SEAL_GUEST, F_SEAL_SEAL
from memfs.tree import acl
from memfs.tree.inode import RegularFile
from memfs.tree.inode_flags import FS_APPEND_FL, FS_IMMUTABLE_FL
from memfs.tree.stored_xattrs import MOST_XATTRS
from memfs.tree.tree import ROOT_INO
from memfs.tree.xattrs import Control, Xattrs
from tests.helpers import raises

from .places import NR_INODES, OnTree, Place

INODE_BYTES = 1024  # what a tmpfs counts for one
OVERHEAD = 40  # bytes that it counts for an attribute beside name and value


# -- plain ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ["user", "trusted", "security"])
def test_what_is_set_is_there_until_it_is_removed(place: Place, namespace: str) -> None:
    place.make("file")
    name = f"{namespace}.a"
    place.setxattr("file", name, b"first")
    place.setxattr("file", name, b"\0second\0")
    place.setxattr("file", f"{name}.b", b"")
    assert sorted(place.listxattr("file")) == [name, f"{name}.b"]
    assert (place.getxattr("file", name), place.getxattr("file", f"{name}.b")) == (b"\0second\0", b"")
    place.removexattr("file", name)
    assert place.listxattr("file") == [f"{name}.b"]
    with raises(errno.ENODATA):
        place.getxattr("file", name)


def test_attributes_go_with_the_file(place: Place) -> None:
    place.make("file")
    place.mkdir("d")
    place.setxattr("file", "user.a", b"1")
    place.link("file", "second")
    place.rename("file", "d/file")
    assert place.getxattr("d/file", "user.a") == place.getxattr("second", "user.a") == b"1"


REFUSED: dict[str, tuple[int, Callable[[Place], object]]] = {
    "no such namespace": (errno.EOPNOTSUPP, lambda place: place.setxattr("file", "mine.a", b"")),
    "no namespace": (errno.EOPNOTSUPP, lambda place: place.setxattr("file", "a", b"")),
    "another of the system's": (errno.EOPNOTSUPP, lambda place: place.setxattr("file", "system.a", b"")),
    "nothing in a namespace": (errno.EINVAL, lambda place: place.setxattr("file", "user.", b"")),
    "a long name": (errno.ERANGE, lambda place: place.setxattr("file", "user." + "n" * 251, b"")),
    "a large value": (errno.E2BIG, lambda place: place.setxattr("file", "user.a", bytes(65537))),
    "a value that has no room": (errno.ENOSPC, lambda place: place.setxattr("file", "user.a", bytes(65536))),
    "get what is not there": (errno.ENODATA, lambda place: place.getxattr("file", "user.no")),
    "get from no namespace": (errno.EOPNOTSUPP, lambda place: place.getxattr("file", "mine.a")),
    "get nothing in a namespace": (errno.EINVAL, lambda place: place.getxattr("file", "user.")),
    "remove what is not there": (errno.ENODATA, lambda place: place.removexattr("file", "user.no")),
    "remove from no namespace": (errno.EOPNOTSUPP, lambda place: place.removexattr("file", "mine.a")),
    "an ACL that is none": (errno.EINVAL, lambda place: place.setxattr("file", "system.posix_acl_access", b"abc")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_changes_nothing(place: Place, name: str) -> None:
    number, call = REFUSED[name]
    place.make("file")
    place.setxattr("file", "user.old", b"value")
    before = place.everything(), place.free_inodes
    with raises(number):
        call(place)
    assert (place.everything(), place.free_inodes) == before
    place.check()


def test_attributes_take_the_room_of_inodes(place: Place) -> None:
    place.make("file")
    rest = NR_INODES - 2
    assert place.free_inodes == rest
    place.setxattr("file", "user.a", bytes(INODE_BYTES - OVERHEAD - len("user.a")))
    assert place.free_inodes == rest - 1
    place.setxattr("file", "user.b", b"")
    assert place.free_inodes == rest - 2
    place.removexattr("file", "user.b")
    place.setxattr("file", "user.a", b"")
    assert place.free_inodes == rest - 1
    place.unlink("file")
    assert place.free_inodes == rest + 1
    place.check()


def test_last_byte_of_room_can_be_had(place: Place) -> None:
    place.make("file")
    room = place.free_inodes * INODE_BYTES - OVERHEAD - len("user.a")
    with raises(errno.ENOSPC):
        place.setxattr("file", "user.a", bytes(room + 1))
    assert place.listxattr("file") == []
    place.setxattr("file", "user.a", bytes(room))
    assert place.free_inodes == 0
    with raises(errno.ENOSPC):
        place.make("new")
    with raises(errno.ENOSPC):
        place.setxattr(".", "user.a", b"")
    place.check()


def test_only_root_is_shown_the_trusted_ones(tree_place: OnTree) -> None:
    tree_place.make("file")
    for name in ("trusted.a", "user.a", "security.a"):
        tree_place.setxattr("file", name, b"")
    ino = tree_place.number("file")
    assert tree_place.xattrs.list(ino, uid=lambda: 0) == [b"trusted.a", b"user.a", b"security.a"]
    assert tree_place.xattrs.list(ino, uid=lambda: 1000) == [b"user.a", b"security.a"]


@pytest.mark.parametrize("flag", [FS_IMMUTABLE_FL, FS_APPEND_FL])
@pytest.mark.parametrize("name", ["user.a", "user.memfs.seals", "system.posix_acl_access"])
def test_protected_file_keeps_its_attributes(tree_place: OnTree, flag: int, name: str) -> None:
    tree_place.make("file")
    tree_place.setxattr("file", "user.a", b"1")
    inode = tree_place.inode("file")
    inode.flags = flag
    before = tree_place.everything()
    with raises(errno.EPERM):
        tree_place.setxattr("file", name, b"grow")
    with raises(errno.EPERM):
        tree_place.removexattr("file", "user.a")
    assert tree_place.everything() == before
    assert tree_place.getxattr("file", "user.memfs.seals") == b""
    inode.flags = 0


# -- seals ------------------------------------------------------------------------------------------------------------


def regular(place: OnTree, path: str) -> RegularFile:
    inode = place.inode(path)
    assert isinstance(inode, RegularFile)
    return inode


def test_seals_are_added(tree_place: OnTree) -> None:
    tree_place.make("file")
    assert (tree_place.getxattr("file", "user.memfs.seals"), tree_place.listxattr("file")) == (b"", [])
    tree_place.setxattr("file", "user.memfs.seals", b"grow\0")
    tree_place.setxattr("file", "user.memfs.seals", b"seal")
    assert regular(tree_place, "file").file.seals == F_SEAL_GROW | F_SEAL_SEAL
    assert tree_place.getxattr("file", "user.memfs.seals") == b"seal,grow"
    assert tree_place.listxattr("file") == ["user.memfs.seals"]


@pytest.mark.parametrize(
    ("seals", "number"), [(b"nonsense", errno.EINVAL), (b"grow,nonsense", errno.EINVAL), (b"\xff", errno.EINVAL)]
)
def test_seals_that_are_none_add_none(tree_place: OnTree, seals: bytes, number: int) -> None:
    tree_place.make("file")
    before = tree_place.everything()
    with raises(number):
        tree_place.setxattr("file", "user.memfs.seals", seals)
    assert (tree_place.everything(), regular(tree_place, "file").file.seals) == (before, 0)


def test_seals_stay(tree_place: OnTree) -> None:
    tree_place.make("file")
    tree_place.setxattr("file", "user.memfs.seals", b"guest,seal")
    for value in (b"grow", b""):
        with raises(errno.EPERM):
            tree_place.setxattr("file", "user.memfs.seals", value)
    with raises(errno.EPERM):
        tree_place.removexattr("file", "user.memfs.seals")
    assert tree_place.getxattr("file", "user.memfs.seals") == b"seal,guest"


def test_only_a_regular_file_has_seals(tree_place: OnTree) -> None:
    tree_place.mkdir("d")
    tree_place.make("fifo", stat.S_IFIFO | 0o600)
    for path in ("d", "fifo"):
        with raises(errno.EOPNOTSUPP):
            tree_place.setxattr(path, "user.memfs.seals", b"guest")
        with raises(errno.ENODATA):
            tree_place.getxattr(path, "user.memfs.seals")
        with raises(errno.ENODATA):
            tree_place.removexattr(path, "user.memfs.seals")
        assert tree_place.listxattr(path) == []


def test_default_seals_belong_to_a_directory(tree_place: OnTree) -> None:
    tree_place.mkdir("d")
    tree_place.make("file")
    assert tree_place.xattrs.default_seals(tree_place.number("d")) == 0
    tree_place.setxattr("d", "user.memfs.default_seals", b"guest,seal")
    assert tree_place.xattrs.default_seals(tree_place.number("d")) == F_SEAL_GUEST | F_SEAL_SEAL
    assert tree_place.getxattr("d", "user.memfs.default_seals") == b"guest,seal"
    with raises(errno.EINVAL):
        tree_place.setxattr("d", "user.memfs.default_seals", b"nonsense")
    with raises(errno.EOPNOTSUPP):
        tree_place.setxattr("file", "user.memfs.default_seals", b"guest")
    assert tree_place.getxattr("d", "user.memfs.default_seals") == b"guest,seal"
    assert tree_place.listxattr("file") == []
    tree_place.removexattr("d", "user.memfs.default_seals")
    assert tree_place.xattrs.default_seals(tree_place.number("d")) == 0


# -- what they cost ---------------------------------------------------------------------------------------------------


class NotAllAtOnce(dict[bytes, bytes]):
    """Attributes at which nobody looks one after the other."""

    def _no(self, *_: object) -> NoReturn:
        raise AssertionError("the work grows with the number of attributes")

    __iter__ = keys = values = items = copy = _no


@pytest.mark.parametrize("namespace", ["user", "trusted"])
def test_one_attribute_costs_the_same_however_many_there_are(tree_place: OnTree, namespace: str) -> None:
    tree_place.make("file")
    inode = tree_place.tree.inode(tree_place.number("file"))
    inode.xattrs = NotAllAtOnce()
    for value in ("1", "22"):
        tree_place.setxattr("file", f"{namespace}.a", value.encode())
        tree_place.setxattr("file", f"{namespace}.b", value.encode())
    assert tree_place.getxattr("file", f"{namespace}.b") == b"22"
    tree_place.removexattr("file", f"{namespace}.a")
    inode.xattrs = dict(dict.items(inode.xattrs))
    assert tree_place.listxattr("file") == [f"{namespace}.b"]


def test_an_inode_has_a_bounded_number_of_attributes(tree_place: OnTree) -> None:
    tree_place.make("file")
    tree = tree_place.tree
    file, xattrs = tree.inode(tree_place.number("file")), tree.xattrs
    tree.space.set_limit(100_000)
    for number in range(MOST_XATTRS):
        xattrs.set(file, b"user.%d" % number, b"")
    with raises(errno.ENOSPC):
        xattrs.set(file, b"user.more", b"")
    xattrs.set(file, b"user.1", b"another value")
    xattrs.remove(file, b"user.2")
    xattrs.set(file, b"user.more", b"")
    tree.check()


def test_what_is_looked_at_whenever_a_file_is_created_is_bounded(tree_place: OnTree) -> None:
    """Default seals and default ACLs are a user's text, and work for each file that is created in its directory."""
    tree_place.mkdir("d")
    acl_entries = b"".join(struct.pack("<HHI", 0x02, 7, uid) for uid in range(1000))
    with raises(errno.ENOSPC):
        tree_place.setxattr("d", "system.posix_acl_default", struct.pack("<I", 2) + acl_entries)
    with raises(errno.EINVAL):
        tree_place.setxattr("d", "user.memfs.default_seals", b"seal," * 1000)


# -- the mount's own --------------------------------------------------------------------------------------------------


class Mount:
    """What a mount does when it is asked by attribute."""

    def __init__(self, place: OnTree) -> None:
        self.asked: list[object] = []
        self.refuses = False
        self.xattrs = Xattrs(
            place.tree, Control("/run/socket", self._describe, self._remount, lambda inode: '{"locked": 1}')
        )

    async def _describe(self, limit: int, user: int) -> str:
        self.asked.append(limit)
        return '{"inodes": 1}'

    def _remount(self, options: RemountOptions) -> None:
        self.asked.append(options)
        if self.refuses:
            raise OSError(errno.EINVAL, "less than what is in use")

    def remount(self, options: bytes, uid: int | None = None) -> None:
        """Set the attribute that changes options: that for CAP_SYS_ADMIN, or that for a user."""
        name = b"trusted.memfs.remount" if uid is None else b"user.memfs.remount"

        async def set_xattr() -> None:
            await self.xattrs.set(ROOT_INO, name, options, uid=lambda: uid or 0)

        trio.run(set_xattr)


@pytest.fixture
def mount(tree_place: OnTree) -> Mount:
    """A mount of which nothing is known but its attributes."""
    return Mount(tree_place)


def test_any_inode_says_where_owners_connect_and_how_the_mount_is(tree_place: OnTree, mount: Mount) -> None:
    tree_place.make("file")
    for ino in (ROOT_INO, tree_place.number("file")):
        assert mount.xattrs.get(ino, b"user.memfs.socket") == b"/run/socket"
        assert trio.run(mount.xattrs.describe, 0) == b'{"inodes": 1}'
        assert mount.xattrs.list(ino, uid=lambda: 0) == []
    assert mount.asked == [65536, 65536]


def test_regular_file_says_which_pages_its_owner_has_locked(tree_place: OnTree, mount: Mount) -> None:
    tree_place.make("file")
    assert mount.xattrs.get(tree_place.number("file"), b"user.memfs.locks") == b'{"locked": 1}'
    with raises(errno.ENODATA):
        mount.xattrs.get(ROOT_INO, b"user.memfs.locks")


@pytest.mark.parametrize("name", ["socket", "stat", "locks", "nonsense", ""])
def test_others_of_memfs_cannot_be_set(tree_place: OnTree, name: str) -> None:
    tree_place.make("file")
    for path in ("file", "."):
        with raises(errno.EOPNOTSUPP):
            tree_place.setxattr(path, f"user.memfs.{name}", b"1")
        with raises(errno.ENODATA):
            tree_place.removexattr(path, f"user.memfs.{name}")
        assert tree_place.listxattr(path) == []


def test_remount_is_for_the_capable_and_who_mounted_it(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    mount.remount(b"size=8k,nr_inodes=5")
    mount.remount(b"nr_inodes=6\0", uid=1000)
    for uid in (0, 1001):
        with raises(errno.EPERM):
            mount.remount(b"nr_inodes=7", uid=uid)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("memfs.tree.xattrs.is_root_of_the_host", lambda: True)
    with raises(errno.EPERM):  # uid 0 is not all that it takes
        mount.remount(b"nr_inodes=7", uid=0)
    assert mount.asked == [RemountOptions(8192, 5), RemountOptions(None, 6)]


@pytest.mark.parametrize("options", [b"nonsense", b"size=", b"size=x", b"mode=700", b"\xff"])
def test_remount_of_what_cannot_be_changed(mount: Mount, options: bytes) -> None:
    with raises(errno.EINVAL):
        mount.remount(options)
    assert mount.asked == []


def test_remount_that_the_mount_refuses(mount: Mount) -> None:
    mount.refuses = True
    with raises(errno.EINVAL, match="less than what is in use"):
        mount.remount(b"size=4k")


def test_remount_cannot_be_read(tree_place: OnTree) -> None:
    with raises(errno.ENODATA):
        tree_place.getxattr(".", "user.memfs.remount")


def test_attributes_of_what_is_gone(tree_place: OnTree) -> None:
    for call in (
        lambda: tree_place.xattrs.get(99, b"user.a"),
        lambda: tree_place.xattrs.get(99, b"user.memfs.socket"),
        lambda: tree_place.xattrs.list(99, uid=lambda: 0),
        lambda: tree_place.xattrs.remove(99, acl.ACCESS),
        lambda: tree_place.xattrs.default_seals(99),
    ):
        with raises(errno.ESTALE):
            call()
