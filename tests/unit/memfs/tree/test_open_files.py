"""Handles: how each reaches content, which exclude each other, and what a reader of a directory sees of changes."""

from __future__ import annotations

import errno
import itertools
import os
import random
import stat
import tracemalloc
from collections.abc import Callable, Iterable, Iterator

import pytest
import trio

from memfs.contract.sys.constants import F_SEAL_FUTURE_WRITE
from memfs.store.memfd_backing import MemfdBacking
from memfs.store.seals import F_SEAL_GROW, F_SEAL_GUEST, F_SEAL_SHRINK, F_SEAL_WRITE
from memfs.store.shares import Pool
from memfs.tree.holdings import Holdings
from memfs.tree.inode import Directory, RegularFile
from memfs.tree.open_files import CONTROL, Access, Fh, OpenDirectory, OpenFile, OpenFiles
from memfs.tree.tree import ROOT_INO
from tests.helpers import raises

from .places import SIZE, OnTree

ALICE, BOB = 12001, 12002
PASSTHROUGH, CACHED, DIRECT = Access.PASSTHROUGH, Access.CACHED, Access.DIRECT
READ, WRITE, APPEND = os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND


class Kernel:
    """What registers backing files: the numbers that are registered, each of an open descriptor."""

    def __init__(self) -> None:
        self.registered: set[int] = set()
        self.is_full = False
        self._next = 1

    def open(self, fd: int) -> int | None:
        """Register a descriptor."""
        os.fstat(fd)
        if self.is_full:
            return None
        self.registered.add(self._next)
        self._next += 1
        return self._next - 1

    def close(self, number: int) -> None:
        """Forget one that is registered."""
        self.registered.remove(number)


@pytest.fixture
def kernel() -> Kernel:
    """A kernel that has nothing open."""
    return Kernel()


@pytest.fixture
def opens(tree_place: OnTree, kernel: Kernel) -> Iterator[OpenFiles]:
    """The handles of a mount of which the kernel asks backing files itself."""
    opens = OpenFiles(tree_place.tree, kernel)
    yield opens
    opens.check()
    opens.close()
    opens.check()
    assert (len(opens), kernel.registered) == (0, set())


def make(place: OnTree, seals: int = 0, name: str = "file") -> RegularFile:
    """A new file that is born with seals."""
    inode = place.tree.create(ROOT_INO, name.encode(), stat.S_IFREG | 0o600, 0, 0, seals=seals)
    assert isinstance(inode, RegularFile)
    return inode


def access(opens: OpenFiles, inode: RegularFile, flags: int) -> Access:
    """How a new handle reaches content."""
    return opens.open_file(inode, flags)[1].access


@pytest.mark.parametrize("kind", [0, F_SEAL_GUEST, CONTROL], ids=["ordinary", "guest-sealed", "control handle"])
def test_user_has_a_share_of_files_and_page_maps(tree_place: OnTree, kernel: Kernel, kind: int) -> None:
    """Each file counts once for each user that has it open, and what is refused changes nothing."""
    holdings = Holdings(Pool("descriptors", 24), Pool("page maps", 24))
    pools = holdings.descriptors, holdings.page_maps
    opens = OpenFiles(tree_place.tree, kernel, holdings)
    flags = CONTROL if kind == CONTROL else READ
    files = [make(tree_place, kind if kind == F_SEAL_GUEST else 0, str(number)) for number in range(16)]
    fhs = list[Fh]()
    with raises(errno.EMFILE, match=f"user {ALICE} has "):
        for inode in files:
            fhs += [opens.open_file(inode, flags, ALICE)[0] for _ in range(3)]
    held = len(fhs) // 3
    assert 2 < held < 13
    refused = files[held]
    before = refused.holds, len(kernel.registered), [pool.used for pool in pools]
    with raises(errno.EMFILE):
        opens.open_file(refused, flags, ALICE)
    assert before == (refused.holds, len(kernel.registered), [pool.used for pool in pools])
    fhs.append(opens.open_file(files[0], flags, ALICE)[0])  # costs nothing more
    fhs += [opens.open_file(inode, flags, BOB)[0] for inode in (refused, refused)]
    assert holdings.descriptors.of(BOB) == holdings.descriptors.of(ALICE) // held
    holdings.check()
    opens.check()
    for fh in fhs:
        opens.release(fh)
    holdings.check()
    assert all(pool.of(user) == 0 for pool in pools for user in (ALICE, BOB))
    opens.open_file(refused, flags, ALICE)
    opens.close()


def test_page_maps_have_shares_of_their_own(tree_place: OnTree) -> None:
    holdings = Holdings(Pool("descriptors", 24), Pool("page maps", 0, frozenset({0})))
    opens = OpenFiles(tree_place.tree, None, holdings)
    if not tree_place.tree.regular(make(tree_place, name="ordinary").ino).file.is_tracked:
        opens.open_file(make(tree_place), READ, ALICE)
    with raises(errno.EMFILE, match="page maps"):
        opens.open_file(make(tree_place, F_SEAL_GUEST, "guest"), READ, ALICE)
    opens.open_file(make(tree_place, F_SEAL_GUEST, "root's"), READ, 0)
    opens.close()


# -- regular files ----------------------------------------------------------------------------------------------------


def test_ordinary_handles_pass_through_with_one_number(opens: OpenFiles, tree_place: OnTree, kernel: Kernel) -> None:
    inode = make(tree_place)
    assert [access(opens, inode, flags) for flags in (READ, WRITE, APPEND, WRITE | os.O_DIRECT)] == [PASSTHROUGH] * 4
    assert kernel.registered == {inode.file.opens.backing_id} == {1}
    other = make(tree_place, name="other")
    assert access(opens, other, READ) is PASSTHROUGH
    assert kernel.registered == {1, 2}
    opens.check()


def test_number_goes_with_the_last_handle(opens: OpenFiles, tree_place: OnTree, kernel: Kernel) -> None:
    inode = make(tree_place)
    (first, _), (second, _) = opens.open_file(inode, READ), opens.open_file(inode, WRITE)
    opens.release(first)
    assert kernel.registered == {1}
    opens.release(second)
    assert (kernel.registered, inode.holds, inode.file.fd) == (set(), 0, -1)
    assert access(opens, inode, READ) is PASSTHROUGH
    assert kernel.registered == {2}


def test_without_passthrough_content_is_cached(tree_place: OnTree) -> None:
    opens, inode = OpenFiles(tree_place.tree), make(tree_place)
    assert [access(opens, inode, flags) for flags in (READ, WRITE, WRITE | os.O_DIRECT)] == [CACHED] * 3
    opens.check()
    opens.close()


def test_file_that_is_cached_stays_so_while_it_is_open(opens: OpenFiles, tree_place: OnTree, kernel: Kernel) -> None:
    inode = make(tree_place)
    kernel.is_full = True
    fh, handle = opens.open_file(inode, READ)
    assert handle.access is CACHED
    kernel.is_full = False
    assert access(opens, inode, WRITE) is CACHED
    assert access(opens, inode, WRITE | os.O_DIRECT) is CACHED
    assert access(opens, inode, CONTROL) is DIRECT
    opens.release(fh)
    assert kernel.registered == set()
    opens.close()
    assert access(opens, inode, READ) is PASSTHROUGH


def test_control_handle_excludes_nothing(opens: OpenFiles, tree_place: OnTree) -> None:
    inode = make(tree_place)
    assert access(opens, inode, CONTROL) is DIRECT
    assert (inode.file.opens.mappable, inode.file.opens.writable) == (0, 0)
    assert access(opens, inode, READ) is PASSTHROUGH
    assert (inode.file.opens.mappable, inode.file.opens.writable) == (1, 0)
    assert access(opens, inode, WRITE) is PASSTHROUGH
    assert (inode.file.opens.mappable, inode.file.opens.writable) == (2, 1)


def test_control_handle_goes_the_way_of_those_that_are_there(
    opens: OpenFiles, tree_place: OnTree, kernel: Kernel
) -> None:
    inode = make(tree_place)
    fh, _ = opens.open_file(inode, READ)
    control, handle = opens.open_file(inode, CONTROL)
    assert (handle.access, handle.writable, handle.may_seal) == (PASSTHROUGH, False, True)
    opens.release(fh)
    assert kernel.registered == {1}, "the kernel believes that of the inode as long as a handle says so"
    with raises(errno.EBUSY):
        trio.run(inode.file.add_seals, F_SEAL_GUEST)
    opens.release(control)
    trio.run(inode.file.add_seals, F_SEAL_GUEST)


@pytest.mark.parametrize("flags", [READ, WRITE, APPEND, WRITE | os.O_DIRECT, CONTROL])
@pytest.mark.parametrize(
    ("seals", "expected"),
    [
        # each in the order of the flags above
        (F_SEAL_SHRINK, (PASSTHROUGH, PASSTHROUGH, PASSTHROUGH, PASSTHROUGH, DIRECT)),
        (F_SEAL_GUEST, (DIRECT, DIRECT, DIRECT, DIRECT, DIRECT)),
        (F_SEAL_GROW, (CACHED, CACHED, CACHED, CACHED, DIRECT)),
        (F_SEAL_WRITE, (CACHED, DIRECT, DIRECT, DIRECT, DIRECT)),
        (F_SEAL_FUTURE_WRITE, (CACHED, DIRECT, DIRECT, DIRECT, DIRECT)),
    ],
)
def test_seals_decide(
    opens: OpenFiles, tree_place: OnTree, seals: int, expected: tuple[Access, ...], flags: int
) -> None:
    inode = make(tree_place, seals)
    wanted = dict(zip([READ, WRITE, APPEND, WRITE | os.O_DIRECT, CONTROL], expected, strict=True))
    assert access(opens, inode, flags) is wanted[flags]
    assert inode.file.opens.mappable == (wanted[flags] is not DIRECT)


@pytest.mark.parametrize("seal", [F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE])
def test_reader_that_passes_through_excludes_writers_once_sealed(
    opens: OpenFiles, tree_place: OnTree, kernel: Kernel, seal: int
) -> None:
    inode = make(tree_place)
    fh, _ = opens.open_file(inode, READ)
    trio.run(inode.file.add_seals, seal)
    for flags in (WRITE, APPEND, WRITE | os.O_DIRECT):
        before = len(opens), inode.holds, inode.file.opens.mappable, set(kernel.registered)
        with raises(errno.EBUSY):
            opens.open_file(inode, flags)
        assert (len(opens), inode.holds, inode.file.opens.mappable, kernel.registered) == before
        opens.check()
    another, handle = opens.open_file(inode, READ)
    assert handle.access is PASSTHROUGH
    opens.release(fh)
    with raises(errno.EBUSY):
        opens.open_file(inode, WRITE)
    opens.release(another)
    assert access(opens, inode, WRITE) is (CACHED if seal == F_SEAL_GROW else DIRECT)
    assert kernel.registered == set()


def test_without_a_descriptor_nothing_is_opened(
    opens: OpenFiles, tree_place: OnTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor(content: object) -> int:
        raise OSError(errno.EMFILE, "no descriptor left")

    inode = make(tree_place)
    monkeypatch.setattr(tree_place.backing, "open", no_descriptor)
    with raises(errno.EMFILE):
        opens.open_file(inode, READ)
    assert (len(opens), inode.holds, inode.file.opens.mappable, inode.file.fd) == (0, 0, 0, -1)
    opens.check()


def test_unlinked_file_lives_until_it_is_released(opens: OpenFiles, tree_place: OnTree) -> None:
    inode = make(tree_place)
    fh, handle = opens.open_file(inode, WRITE)
    tree_place.unlink("file")
    assert opens.file(fh) is handle
    assert tree_place.tree.inode(inode.ino) is inode
    opens.release(fh)
    with raises(errno.ESTALE):
        tree_place.tree.inode(inode.ino)


def test_numbers_of_what_is_not_open(opens: OpenFiles, tree_place: OnTree) -> None:
    fh, _ = opens.open_file(make(tree_place), READ)
    directory = opens.open_directory(tree_place.tree.root, 0)
    for call in (opens.file, opens.directory, opens.release):
        with raises(errno.EBADF):
            call(99)
    with raises(errno.EBADF):
        opens.file(directory)
    with raises(errno.EBADF):
        opens.directory(fh)
    assert len(opens) == 2
    opens.release(fh)
    for call in (opens.file, opens.release):
        with raises(errno.EBADF):
            call(fh)
    assert opens.open_file(make(tree_place, name="other"), READ)[0] not in (fh, directory), "never used twice"


BROKEN: dict[str, tuple[Callable[[OpenFiles, RegularFile], object], str]] = {
    "a handle too few": (lambda opens, inode: inode.file.opens.remove(writable=True), "mappable opens"),
    "a number that nobody uses": (lambda opens, inode: setattr(inode.file.opens, "backing_id", None), "backing id"),
    "a hold too few": (lambda opens, inode: setattr(inode, "holds", 0), "fewer holds"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_finds_what_is_broken(name: str) -> None:
    spoil, sentence = BROKEN[name]
    place = OnTree(MemfdBacking(SIZE))
    opens, inode = OpenFiles(place.tree, Kernel()), make(place)
    opens.open_file(inode, WRITE)
    opens.open_file(inode, READ)
    opens.check()
    spoil(opens, inode)
    with pytest.raises(AssertionError, match=sentence):
        opens.check()


def test_handle_says_what_it_can(tree_place: OnTree) -> None:
    inode = make(tree_place)
    for flags, writable in ((READ, False), (WRITE, True), (os.O_WRONLY, True), (READ | os.O_APPEND, False)):
        assert OpenFile(inode, flags, CACHED).writable == writable
    assert [OpenFile(inode, READ, way).mappable for way in (PASSTHROUGH, CACHED, DIRECT)] == [True, True, False]


# -- directories ------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(opens: OpenFiles, tree_place: OnTree) -> OpenDirectory:
    """A handle of a directory with the names a, b, c, d and e, of which e is the newest."""
    for name in "abcde":
        tree_place.make(name)
    root = tree_place.tree.root
    assert isinstance(root, Directory)
    return opens.directory(opens.open_directory(root, os.O_RDONLY))


def read(reader: OpenDirectory, cookie: int, count: int = 99) -> tuple[str, int]:
    """Some names, and the cookie of the last one."""
    names = ""
    for entry in list(reader.inode.entries_after(cookie))[:count]:
        names, cookie = names + entry.name.decode(), entry.cookie
    return names, cookie


def test_reader_goes_on_where_it_stopped(reader: OpenDirectory) -> None:
    first, cookie = read(reader, 0, 2)
    second, cookie = read(reader, cookie, 2)
    rest, cookie = read(reader, cookie)
    assert (first, second, rest) == ("ed", "cb", "a")
    assert read(reader, cookie)[0] == ""
    assert read(reader, 0)[0] == "edcba"


def test_reader_sees_what_is_removed_no_more_and_what_is_new_only_when_it_begins_anew(
    reader: OpenDirectory, tree_place: OnTree
) -> None:
    _, cookie = read(reader, 0, 2)
    tree_place.unlink("e")
    tree_place.unlink("c")
    tree_place.make("f")
    tree_place.unlink("b")
    tree_place.make("b")
    assert read(reader, cookie)[0] == "a", "b is another one now"
    assert read(reader, 0)[0] == "bfda"


def test_reader_whose_entry_was_removed_goes_on_behind_it(reader: OpenDirectory, tree_place: OnTree) -> None:
    _, cookie = read(reader, 0, 3)
    tree_place.unlink("c")
    assert read(reader, cookie)[0] == "ba"


def test_readers_do_not_concern_each_other(reader: OpenDirectory, opens: OpenFiles, tree_place: OnTree) -> None:
    _, cookie = read(reader, 0, 1)
    tree_place.make("f")
    other = opens.directory(opens.open_directory(tree_place.tree.root, os.O_RDONLY))
    assert read(other, 0)[0] == "fedcba"
    assert read(reader, cookie)[0] == "dcba"


def test_removed_directory_is_empty_and_lives_until_it_is_released(opens: OpenFiles, tree_place: OnTree) -> None:
    tree_place.mkdir("d")
    inode = tree_place.tree.directory(tree_place.number("d"))
    fh: Fh = opens.open_directory(inode, os.O_RDONLY)
    tree_place.rmdir("d")
    assert read(opens.directory(fh), 0)[0] == ""
    opens.release(fh)
    with raises(errno.ESTALE):
        tree_place.tree.inode(inode.ino)


def make_names(tree_place: OnTree, names: Iterable[str]) -> None:
    """Create very many names, of what takes no descriptor."""
    tree_place.tree.space.set_limit(10_000)
    for name in names:
        tree_place.tree.create(ROOT_INO, name.encode(), stat.S_IFIFO | 0o600, 0, 0)


def test_reading_directories_keeps_nothing_for_their_readers(opens: OpenFiles, tree_place: OnTree) -> None:
    """Whatever is kept for a reader, one user can have as often as it has descriptors."""
    make_names(tree_place, (str(number) for number in range(2000)))
    handles = [opens.directory(opens.open_directory(tree_place.tree.root, os.O_RDONLY)) for _ in range(100)]
    tracemalloc.start()
    for handle in handles:
        assert next(iter(handle.inode.entries_after(0))).name == b"1999"
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2000 * 8


def test_cookies_lead_through_a_directory_that_changes(tree_place: OnTree) -> None:
    """Entries are neither shown twice nor lost, whatever else comes and goes in a directory of many blocks."""
    root, chance = tree_place.tree.root, random.Random(1)
    names = {str(number).encode() for number in range(3000)}
    make_names(tree_place, sorted(name.decode() for name in names))
    cookie, seen = 0, list[bytes]()
    removed = set[bytes]()
    while entries := list(itertools.islice(root.entries_after(cookie), 50)):
        seen += [entry.name for entry in entries]
        cookie = entries[-1].cookie
        for name in chance.sample(sorted(names - removed), 40):
            tree_place.unlink(name.decode())
            removed.add(name)
        make_names(tree_place, [f"new{cookie}"])
    assert len(set(seen)) == len(seen)
    assert set(seen) >= names - removed
    assert set(seen) <= names
    cookies = [entry.cookie for entry in root.entries_after(0)]
    assert cookies == sorted((entry.cookie for entry in root.entries.values()), reverse=True)
