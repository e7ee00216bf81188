"""A tree that was written down is built again as it was: for every prefix of what was committed."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memfs.state import log
from memfs.state.journal import Committed, LogJournal
from memfs.store.file import File
from memfs.store.shares import Pool
from memfs.store.tmpfs_backing import TmpfsBacking
from memfs.tree import acl
from memfs.tree.holdings import Holdings
from memfs.tree.inode import CAPABILITY, Directory, RegularFile, Symlink
from memfs.tree.open_files import CONTROL, OpenFiles
from memfs.tree.rebuild import free_forgotten, keep, keys_of, rebuild
from memfs.tree.tree import ROOT_INO, Tree
from tests.helpers import raises

_name = st.sampled_from([b"a", b"b", b"c"])
_directory = st.integers(0, 3)  #: of those that there are
_xattr = st.sampled_from([b"user.a", b"user.b", CAPABILITY])
#: user::rw-, user:1:r--, group::r--, mask::r--, other::---
NAMED = struct.pack("<I" + 5 * "HHI", 2, 1, 6, 0, 2, 4, 1, 4, 4, 0, 16, 4, 0, 32, 0, 0)
_step = st.one_of(
    st.tuples(st.just("create"), _directory, _name, st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO])),
    st.tuples(st.just("symlink"), _directory, _name, st.sampled_from([b"short", b"long" * 50])),
    st.tuples(st.just("link"), _directory, _name, _directory, _name),
    st.tuples(st.just("rename"), _directory, _name, _directory, _name, st.sampled_from([0, 1, 2, 4])),
    st.tuples(st.sampled_from(["unlink", "rmdir"]), _directory, _name),
    st.tuples(st.just("setxattr"), _directory, _name, _xattr, st.binary(max_size=9)),
    st.tuples(st.just("setxattr"), _directory, _name, st.just(acl.ACCESS), st.just(NAMED)),
    st.tuples(st.just("chmod"), _directory, _name, st.sampled_from([0o600, 0o6755])),
    st.tuples(st.just("kill_suidgid"), _directory, _name),
    st.tuples(st.just("removexattr"), _directory, _name, st.just(b"user.a")),
    st.tuples(st.just("tmpfile"), _directory),
    st.tuples(st.just("open"), _directory, _name, st.sampled_from([os.O_RDONLY, os.O_RDWR, os.O_ACCMODE])),
    st.tuples(st.just("release"), st.integers(0, 3)),
)


class World:
    """A tree, its open files, its backing and its journal."""

    def __init__(self, backing: TmpfsBacking, holdings: Holdings | None = None) -> None:
        assert backing.state is not None
        self.backing = backing
        self.journal = LogJournal(backing.state.root)
        self.tree = Tree(
            lambda ino, seals: File(backing, ino, seals, journal=self.journal, held=True),
            *(40, 0o755, 0, 0),
            journal=self.journal,
            is_known=lambda ino: False,
        )
        self.open_files = OpenFiles(self.tree, holdings=holdings, journal=self.journal)
        keep(self.tree, self.journal)

    def do(self, what: str, *arguments: object) -> None:
        """Do a step, as the kernel would ask for it."""
        tree = self.tree
        directories = sorted(inode.ino for inode in tree.inodes.all() if isinstance(inode, Directory))
        places: list[object] = [
            directories[each % len(directories)] if isinstance(each, int) and at in (0, 2) else each
            for at, each in enumerate(arguments)
        ]
        match what, *places:
            case "create", int(parent), bytes(name), int(kind):
                tree.create(parent, name, kind | 0o644, 0, 0)
            case "symlink", int(parent), bytes(name), bytes(target):
                tree.symlink(parent, name, target, 0, 0)
            case "link", int(parent), bytes(name), int(new_parent), bytes(new_name):
                inode = tree.lookup(parent, name)
                if not isinstance(inode, Directory):
                    tree.link(inode.ino, new_parent, new_name)
            case "rename", int(parent), bytes(name), int(new_parent), bytes(new_name), int(flags):
                inode = tree.lookup(parent, name)
                if not isinstance(inode, Directory):  # the kernel sees that none comes below itself
                    other = tree.directory(new_parent).entries.get(new_name)
                    if other is None or not isinstance(other.inode, Directory) or not flags & 2:
                        tree.rename(parent, name, new_parent, new_name, flags)
            case (("unlink" | "rmdir"), int(parent), bytes(name)):
                getattr(tree, what)(parent, name)
            case "setxattr", int(parent), bytes(name), bytes(xattr), bytes(value):
                tree.xattrs.set(tree.lookup(parent, name), xattr, value)
            case "chmod", int(parent), bytes(name), int(mode):
                tree.chmod(tree.lookup(parent, name), mode)
            case "kill_suidgid", int(parent), bytes(name):
                tree.kill_suidgid(tree.lookup(parent, name), in_group=False)
            case "removexattr", int(parent), bytes(name), bytes(xattr):
                tree.xattrs.remove(tree.lookup(parent, name), xattr)
            case "tmpfile", int(parent):
                made = tree.create_unlinked(parent, stat.S_IFREG | 0o600, 0, 0)
                assert isinstance(made, RegularFile)
                self.open_files.open_file(made, os.O_RDWR, is_held=True)
            case "open", int(parent), bytes(name), int(flags):
                inode = tree.lookup(parent, name)
                if isinstance(inode, RegularFile):
                    self.open_files.open_file(inode, flags)
            case "release", int(number):
                handles = sorted(self.open_files.keys)
                if handles:
                    self.open_files.release(int.from_bytes(handles[number % len(handles)][1:], "big"))

    def describe(self) -> dict[str, object]:
        """Everything that there is."""
        inodes: dict[str, object] = {}
        for inode in self.tree.inodes.all():
            said = inode.stat()._asdict()
            said |= {"xattrs": inode.xattrs or None, "flags": inode.flags, "holds": inode.holds}
            if isinstance(inode, Directory):
                entries = [(each.name, each.inode.ino, each.cookie) for each in inode.entries_after(0)]
                said |= {"entries": entries, "next": inode.next_cookie}
                if inode.nlink:
                    said["parent"] = inode.parent.ino
            if isinstance(inode, Symlink):
                said["target"] = inode.target
            inodes[str(inode.ino)] = said
        free = self.tree.space.free_inodes, self.tree.next_ino
        return {"inodes": inodes, "free": free, "handles": sorted(self.open_files.keys)}

    def close(self) -> None:
        self.open_files.close()
        self.journal.commit()
        self.tree.close()
        self.journal.close()


def new_backing_of_state(size: int = 1 << 20) -> TmpfsBacking:
    """A backing that outlives its process. Skips the test where there is none."""
    try:
        backing = TmpfsBacking(size)
    except PermissionError:
        pytest.skip("without CAP_SYS_ADMIN there is no detached tmpfs")
    if backing.state is None:
        pytest.skip("a mount that is nowhere cannot be cloned before Linux 6.15")
    return backing


def successor(world: World, holdings: Holdings | None = None, *, backwards: bool = False) -> World:
    """The world after its process was killed. `backwards`: what was written down is read in the other order."""
    other = World(world.backing, holdings)
    state = other.journal.load()
    if backwards:
        values = dict(state)
        state = Committed(reversed(values), lambda keys: map(values.__getitem__, keys))

    def old_file(ino: int, seals: int) -> File:
        return File(world.backing, ino, seals, journal=other.journal, exists=True)

    other.journal.dirty.clear()
    rebuild(other.tree, state, other.journal, old_file)
    other.open_files.restore(state)
    return other


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_step, max_size=25))
def test_after_each_request_the_tree_can_be_built_again(steps: list[tuple[object, ...]]) -> None:
    backing = new_backing_of_state()
    world = World(backing)
    try:
        world.journal.commit()
        for unique, (what, *arguments) in enumerate(steps, 1):
            with suppress(OSError):
                world.do(str(what), *arguments)
            world.journal.commit(unique, b"")
            world.journal.check(keys_of(world.tree) | world.open_files.keys)
            other = successor(world)
            assert other.describe() == world.describe()
            other.tree.check()
            other.open_files.check()
        for _ in range(2):  # and it can be gone on with
            world = successor(world)
            world.do("create", 0, b"new", stat.S_IFREG)
            world.tree.unlink(ROOT_INO, b"new")
            world.journal.commit()
            world.tree.check()
    finally:
        world.close()
        backing.close()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.booleans(), _step), max_size=25))
def test_who_goes_on_does_all_as_if_nobody_had_died(steps: list[tuple[bool, tuple[object, ...]]]) -> None:
    """Whatever has been built of what is from before."""
    backings = new_backing_of_state(), new_backing_of_state()
    lasting, dying = (World(backing) for backing in backings)
    try:
        for unique, (dies, (what, *arguments)) in enumerate(steps, 1):
            if dies:
                dying.journal.commit()
                dying = successor(dying)
            raised = [raises_in(world, unique, str(what), *arguments) for world in (lasting, dying)]
            assert raised[0] == raised[1]
        assert timeless(dying.describe()) == timeless(lasting.describe())
        dying.tree.check()
        dying.journal.commit()
        dying.journal.check(keys_of(dying.tree) | dying.open_files.keys)
    finally:
        for world, backing in zip((lasting, dying), backings, strict=True):
            world.close()
            backing.close()


def raises_in(world: World, unique: int, what: str, *arguments: object) -> int | None:
    """Do a step, and return the errno if there was one."""
    try:
        world.do(what, *arguments)
    except OSError as error:
        return error.errno
    finally:
        world.journal.commit(unique, b"")
    return None


def timeless(described: dict[str, object]) -> dict[str, object]:
    """What is described, without times, and without numbers of handles, which may be given anew."""
    inodes = described["inodes"]
    assert isinstance(inodes, dict)
    return {
        "inodes": {
            ino: {key: value for key, value in said.items() if not key.endswith("time_ns")}
            for ino, said in inodes.items()
        },
        "free": described["free"],
    }


def test_killed_before_all_attributes_of_a_file_are_forgotten() -> None:
    backing = new_backing_of_state()
    world = World(backing)
    inode = world.tree.create(ROOT_INO, b"file", stat.S_IFREG | 0o600, 0, 0)
    for number in range(100):  # more than one commit drops
        world.tree.xattrs.set(inode, b"trusted.%d" % number, b"value")
    world.journal.commit()
    world.tree.unlink(ROOT_INO, b"file")
    world.journal.commit()
    other = successor(world)
    assert other.tree.inodes.count == 1
    other.tree.check()
    other.journal.commit()
    other.journal.check(keys_of(other.tree))
    other.close()
    backing.close()


def test_ordinary_files_from_before_are_built_when_somebody_asks_for_them() -> None:
    backing = new_backing_of_state()
    world = World(backing)
    for number in range(20):
        world.tree.create(ROOT_INO, b"%d" % number, stat.S_IFREG | 0o600, 0, 0)
    world.tree.link(world.tree.lookup(ROOT_INO, b"3").ino, ROOT_INO, b"other name of 3")
    world.journal.commit()
    other = successor(world)
    assert list(other.tree.inodes) == [ROOT_INO]
    assert other.tree.inodes.count == 21
    assert other.tree.lookup(ROOT_INO, b"3").nlink == 2
    assert len(other.tree.inodes) == 2
    other.tree.forget(7, 1)  # of what is not built nobody has counted look-ups
    other.tree.unlink(ROOT_INO, b"19")
    assert len(other.tree.inodes) == 2
    assert other.tree.space.free_inodes == world.tree.space.free_inodes + 1
    other.journal.commit()
    assert other.tree.inodes.find(21) is None
    other.tree.check()
    other.close()
    backing.close()


def test_an_inode_from_before_goes_when_the_kernel_does_not_know_it(tmp_path: Path) -> None:
    backing = new_backing_of_state()
    world = World(backing)
    inode = world.tree.create(ROOT_INO, b"a", stat.S_IFREG, 0, 0)
    world.tree.looked_up(inode)
    world.tree.unlink(ROOT_INO, b"a")
    world.journal.commit()
    other = successor(world)
    assert inode.ino in other.tree.inodes
    assert [each.ino for each in free_forgotten(other.tree)] == [inode.ino]
    other.journal.commit()
    assert list(other.tree.inodes) == [ROOT_INO]
    assert backing.used_pages == 0
    other.close()
    backing.close()


def small_holdings() -> Holdings:
    return Holdings(Pool("descriptors", 32), Pool("page maps", 16))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("flags", [os.O_RDWR, CONTROL])
def test_what_was_granted_is_had_again_in_whichever_order(flags: int, backwards: bool) -> None:
    """One user takes its share, another one then: the first has more than would be granted to it now."""
    backing = new_backing_of_state()
    world = World(backing, small_holdings())
    for user in (12001, 12002):
        with suppress(OSError):
            while True:
                inode = world.tree.create_unlinked(ROOT_INO, stat.S_IFREG | 0o600, 0, 0)
                assert isinstance(inode, RegularFile)
                world.open_files.open_file(inode, flags, user, is_held=True)
    assert len(world.open_files) > 8
    world.journal.commit()
    holdings = small_holdings()
    other = successor(world, holdings, backwards=backwards)
    assert other.open_files.keys == world.open_files.keys
    holdings.check()
    other.open_files.check()
    other.open_files.close()
    holdings.check()
    world.close()
    backing.close()


def test_a_handle_whose_file_cannot_be_opened_is_closed_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    backing = new_backing_of_state()
    world = World(backing)
    fhs = []
    for name in (b"a", b"b"):
        inode = world.tree.create(ROOT_INO, name, stat.S_IFREG, 0, 0)
        assert isinstance(inode, RegularFile)
        fhs.append(world.open_files.open_file(inode, os.O_RDWR)[0])
    world.journal.commit()
    other = World(backing)
    state = other.journal.load()
    other.journal.dirty.clear()
    rebuild(
        *(other.tree, state, other.journal),
        lambda ino, seals: File(backing, ino, seals, journal=other.journal, exists=True),
    )
    lost = other.tree.regular(ROOT_INO + 1).file
    backing.free(backing.find(lost.number, guest=False))  # so that there is nothing to open
    other.open_files.restore(state)
    with raises(errno.EBADF):
        other.open_files.file(fhs[0])
    assert other.open_files.file(fhs[1]).inode.file.size == 0
    assert "an open file is closed" in caplog.text
    other.journal.commit()
    other.journal.check(keys_of(other.tree) | other.open_files.keys)
    other.journal.close()
    world.journal.close()
    backing.close()


@pytest.fixture
def world() -> Iterator[World]:
    backing = new_backing_of_state()
    world = World(backing)
    world.journal.commit()
    yield world
    world.close()
    backing.close()


def state_bytes(world: World) -> int:
    """How much has been written down: every record, true or not."""
    assert world.backing.state is not None
    root = f"/proc/self/fd/{world.backing.state.root}"
    end = struct.Struct("=Q")
    nbytes = 0
    for name in os.listdir(root):
        if name.startswith("log-"):
            with open(f"{root}/{name}", "rb") as file:
                file.seek(16)
                nbytes += end.unpack(file.read(end.size))[0]
    return nbytes


def test_a_change_of_an_inode_writes_none_of_its_attributes(world: World) -> None:
    """A chmod(2) of a file with megabytes of attributes costs as much as another one's."""
    inode = world.tree.create(ROOT_INO, b"a", stat.S_IFIFO, 0, 0)
    for number in range(16):
        world.tree.xattrs.set(inode, b"trusted.%d" % number, bytes(60_000))
    world.journal.commit()
    before = state_bytes(world)
    world.tree.chmod(inode, 0o600)
    world.journal.commit()
    assert 0 < state_bytes(world) - before < 200
    assert successor(world).describe() == world.describe()


def test_attributes_of_an_inode_that_is_freed_go_little_by_little(world: World) -> None:
    """And whoever takes over meanwhile does not see them."""
    inode = world.tree.create(ROOT_INO, b"a", stat.S_IFIFO, 0, 0)
    for number in range(1000):
        world.tree.xattrs.set(inode, b"trusted.%d" % number, b"")
    world.journal.commit()
    before = state_bytes(world)
    world.tree.unlink(ROOT_INO, b"a")
    world.journal.commit()
    assert state_bytes(world) - before < 5000
    assert sum(key.startswith(b"x") for key in world.journal.load()) > 800
    other = successor(world)
    assert other.describe() == world.describe()
    other.journal.check(keys_of(other.tree))
    for number in range(50):
        world.tree.chmod(world.tree.root, 0o700 + number % 2)
        world.journal.commit()
    assert not any(key.startswith(b"x") for key in world.journal.load())


def test_where_nothing_more_can_be_written_down_nothing_new_is_created(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What there is can still be changed, and removed."""
    inode = world.tree.create(ROOT_INO, b"a", stat.S_IFIFO, 0, 0)
    world.tree.xattrs.set(inode, b"trusted.a", b"12345")
    world.journal.commit()
    monkeypatch.setattr(log, "_MOST_TRUE", 10)
    before = world.describe()
    for create in (
        lambda: world.tree.create(ROOT_INO, b"b", stat.S_IFREG, 0, 0),
        lambda: world.tree.create_unlinked(ROOT_INO, stat.S_IFREG, 0, 0),
        lambda: world.tree.symlink(ROOT_INO, b"b", b"target", 0, 0),
        lambda: world.tree.link(inode.ino, ROOT_INO, b"b"),
        lambda: world.tree.xattrs.set(inode, b"trusted.b", b""),
        lambda: world.tree.xattrs.set(inode, b"trusted.a", b"123456"),
    ):
        with pytest.raises(OSError, match="no space for what outlives"):
            create()
    assert world.describe() == before
    world.tree.xattrs.set(inode, b"trusted.a", b"54321")
    world.tree.chmod(inode, 0o600)
    world.tree.rename(ROOT_INO, b"a", ROOT_INO, b"b")
    world.tree.unlink(ROOT_INO, b"b")
    world.journal.commit()


def test_attributes_that_tmpfs_does_not_count_have_a_limit_as_well(world: World) -> None:
    """Any user can set ACLs, and new directories inherit them."""
    tree, space = world.tree, world.tree.space
    directory = tree.create(ROOT_INO, b"a", stat.S_IFDIR, 0, 0)
    tree.xattrs.set(directory, acl.DEFAULT, NAMED)
    for number in range(17):
        tree.xattrs.set(directory, b"trusted.%d" % number, bytes(60_000))
    with pytest.raises(OSError, match="no space for attributes"):
        tree.xattrs.set(directory, b"trusted.17", bytes(60_000))
    tree.xattrs.set(directory, b"trusted.17", bytes(space.free_other_bytes - 50))
    assert space.free_other_bytes == 0
    world.journal.commit()
    before = world.describe()
    with pytest.raises(OSError, match="no space for ACLs"):
        tree.create(directory.ino, b"b", stat.S_IFDIR, 0, 0)
    assert world.describe() == before
    tree.xattrs.remove(directory, b"trusted.0")
    tree.create(directory.ino, b"b", stat.S_IFDIR, 0, 0)
    tree.check()
    world.journal.commit()
    assert successor(world).tree.space.free_other_bytes == space.free_other_bytes
