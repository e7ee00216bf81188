"""Whatever a program does, memfs answers as a tmpfs answers: a state machine does every step on both and compares.

A step is one system call by one of three processes (root and two users, of which one shares a group with what root
makes). After each step both trees are compared whole: every attribute, every extended attribute, where each file has
data and what, and which times moved. Errors are compared by errno.

`make test` runs it for a while with a fixed seed, so that a failure is the change's and not the day's; `make soak`
(MINUTES=n, SEED=n) runs it long, with a new seed each time, which it prints.
"""

from __future__ import annotations

import errno
import functools
import operator
import os
import random
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from .actor import UTIME_NOW, UTIME_OMIT
from .process import USERS, Process, mounted_alike
from .time_bar import time_bar

PAGE = 4096
SIZE = 4 << 20  # of both filesystems, in bytes: small, so that they fill up
INODES = 400
_TICK = time.clock_getres(5)  # seconds, of CLOCK_REALTIME_COARSE: by which file times may be coarse
_SETTLE = 3.0  # seconds in which what close(2) leaves to be done later must be done

MINUTES = float(os.environ.get("MEMFS_SOAK_MINUTES", "0"))
SEED = int(os.environ.get("MEMFS_SOAK_SEED", "0"))


class Side:
    """A filesystem and the processes that work on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._count = 0
        self.users = {name: Process(*ids) for name, ids in USERS.items()}
        self.observer = Process(0, 0)

    def begin(self) -> None:
        """Go on in a new directory in which everybody may write."""
        self._count += 1
        os.chown(self.root, 0, 0)  # what somebody did to ".." is over
        self.root.chmod(0o755)
        directory = self.root / str(self._count) / "here"
        directory.mkdir(parents=True)
        directory.chmod(0o777)
        for process in (*self.users.values(), self.observer):
            process.revive()
            assert process("begin", str(directory)) == ("returned", None)

    def clear(self) -> None:
        """Leave the directory, and nothing of it."""
        for process in (*self.users.values(), self.observer):
            process.revive()
            assert process("begin", "/") == ("returned", None)
        subprocess.run(["rm", "-rf", "--", str(self.root / str(self._count))], check=True)

    def close(self) -> None:
        for process in (*self.users.values(), self.observer):
            process.end()


_component = st.sampled_from("abc")
_new_path = st.one_of(
    _component,
    _component,
    st.lists(_component, min_size=2, max_size=3).map("/".join),
    st.sampled_from(["", ".", "..", "a/.", "a/..", "a/", "b/", "a//b"]),
    st.sampled_from(["n" * 255, "n" * 256, "a/" + "n" * 256, "a/" * 3000]),
)
_path = st.one_of(st.integers(0, 20), st.integers(0, 20), _new_path)  #: a number: of what there is, in order
_handle = st.integers(0, 20)  #: of the handles that are open, in order
_user = st.sampled_from(["root", "root", "alice", "alice", "bob"])
_slot = st.integers(0, 1)
#: Not in the last page below 1 << 63: there the kernel's own SEEK_HOLE overflows.
_offset = st.one_of(
    st.integers(0, 6 * PAGE),
    st.sampled_from([0, PAGE, 2 * PAGE, 3 * PAGE]),
    st.sampled_from([SIZE - PAGE, SIZE, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1, -1]),
)
_length = st.one_of(
    st.integers(0, 4 * PAGE), st.sampled_from([0, 1, PAGE, 2 * PAGE, SIZE // 2, SIZE, SIZE + PAGE, 1 << 40, -1])
)
_read_length = st.integers(1, 3 * PAGE)  #: of no bytes the kernel's FUSE asks no backing file, so atime stays
_data = st.one_of(
    st.binary(min_size=1, max_size=20),
    st.builds(lambda byte, length: bytes([byte]) * length, st.integers(1, 255), st.integers(0, 4 * PAGE)),
    st.builds(lambda byte: bytes([byte]) * (SIZE // 2), st.integers(1, 255)),
)
_mode = st.sampled_from([0o644, 0o666, 0o600, 0o755, 0o777, 0o000, 0o4755, 0o2755, 0o2745, 0o6777, 0o1777, 0o2775])
_access = st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR])
_flag = [
    *(os.O_CREAT, os.O_CREAT, os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_DIRECTORY, os.O_NOFOLLOW),
    *(os.O_TMPFILE, os.O_SYNC, os.O_NOATIME, os.O_PATH),
]
_flags = st.lists(st.sampled_from(_flag), max_size=3).map(lambda flags: functools.reduce(operator.or_, flags, 0))
#: not ZERO_RANGE, which both refuse: the kernel's FUSE drops setgid before it asks, tmpfs after
_fallocate_mode = st.sampled_from([0, 0, 1, 1, 3, 3, 3, 2, 8, 32, 64])
#: not (-1, -1): what the kernel's FUSE then sends is what it sends when setuid is to be dropped (test_completeness.py)
_owner = st.tuples(st.sampled_from([-1, 0, 12001, 12002]), st.sampled_from([-1, 0, 12001, 12002, 13000])).filter(
    lambda owner: owner != (-1, -1)
)
_time = st.one_of(
    st.sampled_from([(0, UTIME_NOW), (0, UTIME_OMIT)]),
    st.tuples(st.sampled_from([0, 1, 1_000_000_000]), st.sampled_from([0, 1, 123_456_789, 999_999_999])),
    st.sampled_from([(-1, 0), (1 << 40, 0), (0, 1_000_000_000), (0, -1)]),
)
_name = st.one_of(
    st.sampled_from(["user.a", "user.b", "trusted.a", "security.a"]),
    st.sampled_from(["user.", "nonsense", "other.a", "system.a", "user." + "n" * 250, "user." + "n" * 251]),
)
_value = st.one_of(st.binary(max_size=8), st.integers(0, 65537).map(bytes))


class Differential(RuleBasedStateMachine):
    """Every rule is one system call, done by one process on each side."""

    sides: ClassVar[tuple[Side, Side]]  #: memfs, tmpfs
    passes_through: ClassVar[bool]  #: whether memfs was mounted so that content passes through

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[tuple[str, int]] = []  #: who has what open
        self.paths = ["."]  #: what there is

    @initialize()
    def begin(self) -> None:
        for side in self.sides:
            side.begin()
        self._compare("begin", *(side.observer("snapshot") for side in self.sides))

    def teardown(self) -> None:
        for side in self.sides:
            side.clear()
        self._compare_room()

    def do(self, user: str, name: str, *arguments: object, same_atime: bool = True) -> bool:
        """Do it on both sides and see that nobody could tell which was which. Whether it was done, not refused."""
        time.sleep(_TICK)  # so that a time that is set anew is another time
        what = f"{user}: {name}{arguments}"
        ours, theirs = (side.users[user](name, *arguments) for side in self.sides)
        if self.passes_through:
            self._compare(what, ours, theirs)
        else:
            self._compare(what, _without_atime(ours), _without_atime(theirs))
        time.sleep(_TICK)  # and so that to look is later than to do
        ours_after, theirs_after = (side.observer("snapshot") for side in self.sides)
        _forget_pipes(ours_after[1])
        _forget_pipes(theirs_after[1])
        if not (self.passes_through and same_atime):
            _forget_reading(ours_after[1])
            _forget_reading(theirs_after[1])
        self._compare(f"tree after {what}", ours_after, theirs_after)
        self.paths = sorted(theirs_after[1])
        return theirs[0] == "returned"

    def do_to(self, handle: int, name: str, *arguments: object) -> None:
        """Do it to an open handle, as whoever opened it."""
        user, slot = self.handles[handle % len(self.handles)]
        self.do(user, name, slot, *arguments)

    def at(self, path: str | int) -> str:
        """A path, perhaps one of those that there are."""
        return path if isinstance(path, str) else self.paths[path % len(self.paths)]

    def _compare(self, what: str, ours: object, theirs: object) -> None:
        assert ours == theirs, f"{what}\n  memfs: {_shorten(ours, theirs)}\n  tmpfs: {_shorten(theirs, ours)}"

    def _compare_room(self) -> None:
        """statfs(2). Closing and forgetting reach a FUSE server after the call that caused them has returned."""
        deadline = time.monotonic() + _SETTLE
        while True:
            ours, theirs = (os.statvfs(side.root) for side in self.sides)
            fields = "f_bsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax"
            answers = [{field: getattr(answer, field) for field in fields} for answer in (ours, theirs)]
            if answers[0] == answers[1] or time.monotonic() > deadline:
                break
            time.sleep(0.001)
        self._compare("statfs", *answers)

    # -- descriptors ------------------------------------------------------------------------------------------------

    def _open(self, user: str, slot: int, path: str, flags: int, mode: int) -> None:
        if (user, slot) in self.handles:
            self.handles.remove((user, slot))
        if self.do(user, "open", slot, path, flags, mode):
            self.handles.append((user, slot))

    @rule(user=_user, slot=_slot, path=_path, access=_access, flags=_flags, mode=_mode)
    def open(self, user: str, slot: int, path: str | int, access: int, flags: int, mode: int) -> None:
        self._open(user, slot, self.at(path), access | flags, mode)

    @rule(user=_user, slot=_slot, path=st.sampled_from(["a", "b", "c", "a/a"]), mode=_mode)
    def make(self, user: str, slot: int, path: str | int, mode: int) -> None:
        self._open(user, slot, self.at(path), os.O_RDWR | os.O_CREAT, mode)

    @precondition(lambda self: self.handles)
    @rule(handle=_handle)
    def close(self, handle: int) -> None:
        self.do_to(handle, "close")
        self.handles.pop(handle % len(self.handles))

    @precondition(lambda self: self.handles)
    @rule(handle=_handle, length=_read_length)
    def read(self, handle: int, length: int) -> None:
        self.do_to(handle, "read", length)

    @precondition(lambda self: self.handles)
    @rule(handle=_handle, data=_data)
    def write(self, handle: int, data: bytes) -> None:
        self.do_to(handle, "write", data)

    @precondition(lambda self: self.handles)
    @rule(handle=_handle, length=_read_length, offset=_offset)
    def pread(self, handle: int, length: int, offset: int) -> None:
        self.do_to(handle, "pread", length, offset)

    @precondition(lambda self: self.handles)
    @rule(handle=_handle, data=_data, offset=_offset)
    def pwrite(self, handle: int, data: bytes, offset: int) -> None:
        self.do_to(handle, "pwrite", data, offset)

    @precondition(lambda self: self.handles)
    @rule(
        handle=_handle,
        offset=_offset,
        whence=st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE]),
    )
    def lseek(self, handle: int, offset: int, whence: int) -> None:
        self.do_to(handle, "lseek", offset, whence)

    @precondition(lambda self: self.handles)
    @rule(handle=_handle, size=_offset)
    def ftruncate(self, handle: int, size: int) -> None:
        self.do_to(handle, "ftruncate", size)

    @precondition(lambda self: self.handles)
    @rule(
        handle=_handle, mode=_fallocate_mode,
        offset=_offset, length=_length,
    )  # fmt: skip
    def fallocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        user, slot = self.handles[handle % len(self.handles)]
        _, facts = self.sides[1].users[user]("fstat", slot)
        if user != "root" and "s" in facts[0].lower():  # dropped before memfs is asked, and so even if it is refused
            return
        self.do(user, "fallocate", slot, mode, offset, length)

    @precondition(lambda self: self.handles)
    @rule(handle=_handle, mode=_mode)
    def fchmod(self, handle: int, mode: int) -> None:
        self.do_to(handle, "fchmod", mode)

    @precondition(lambda self: self.handles)
    @rule(handle=_handle, owner=_owner)
    def fchown(self, handle: int, owner: tuple[int, int]) -> None:
        self.do_to(handle, "fchown", *owner)

    @precondition(lambda self: self.handles)
    @rule(handle=_handle, what=st.sampled_from(["fstat", "fsync", "getflags", "poll", "getdents"]))
    def ask(self, handle: int, what: str) -> None:
        self.do_to(handle, what)

    @precondition(lambda self: self.handles)
    @rule(handle=_handle, path=_path)
    def name_it(self, handle: int, path: str | int) -> None:
        self.do_to(handle, "name_it", self.at(path))

    @precondition(lambda self: self.handles)
    @rule(handle=_handle, other=_handle, length=st.integers(0, 5 * PAGE), start=_offset, to=_offset)
    def copy_file_range(self, handle: int, other: int, length: int, start: int, to: int) -> None:
        user, slot = self.handles[handle % len(self.handles)]
        slots = [number for name, number in self.handles if name == user]
        # Within one file it depends on which end the kernel looks at first whether relatime finds it read since.
        self.do(user, "copy_file_range", slot, slots[other % len(slots)], length, start, to, same_atime=False)

    @precondition(lambda self: self.handles)
    @rule(handle=_handle, offset=st.integers(0, 6 * PAGE), data=_data)
    def map_write(self, handle: int, offset: int, data: bytes) -> None:
        if not self.passes_through and os.statvfs(self.sides[1].root).f_bavail < 4:
            return  # the page cache takes what is written to a mapping and has no limit
        self.do_to(handle, "map_write", offset, data[: 3 * PAGE])

    @precondition(lambda self: self.handles and self.passes_through)
    @rule(handle=_handle, offset=st.integers(0, 6 * PAGE), data=_data)
    def map_private(self, handle: int, offset: int, data: bytes) -> None:
        self.do_to(handle, "map_private", offset, data[: 3 * PAGE])

    @precondition(lambda self: self.handles and self.passes_through)
    @rule(handle=_handle, offset=st.integers(0, 6 * PAGE), length=st.integers(1, 3 * PAGE))
    def map_read(self, handle: int, offset: int, length: int) -> None:
        self.do_to(handle, "map_read", offset, length)

    @precondition(lambda self: self.handles)
    @rule(handle=_handle, operation=st.sampled_from([1, 2, 8]))
    def flock(self, handle: int, operation: int) -> None:
        self.do_to(handle, "flock", operation)

    @precondition(lambda self: self.handles)
    @rule(
        handle=_handle, operation=st.sampled_from([1, 2, 8]),
        start=st.integers(0, 20), length=st.integers(0, 20),
    )  # fmt: skip
    def lockf(self, handle: int, operation: int, start: int, length: int) -> None:
        self.do_to(handle, "lockf", operation, start, length)

    # -- paths ------------------------------------------------------------------------------------------------------

    @rule(user=_user, path=_path, what=st.sampled_from(["stat", "listdir", "readlink"]))
    def look(self, user: str, path: str | int, what: str) -> None:
        self.do(user, what, self.at(path))

    @rule(user=_user, path=_path, mode=st.integers(0, 7))
    def access(self, user: str, path: str | int, mode: int) -> None:
        self.do(user, "access", self.at(path), mode)

    @rule(user=_user, path=_path, size=_offset)
    def truncate(self, user: str, path: str | int, size: int) -> None:
        self.do(user, "truncate", self.at(path), size)

    @rule(user=_user, path=_path, mode=_mode)
    def mkdir(self, user: str, path: str | int, mode: int) -> None:
        self.do(user, "mkdir", self.at(path), mode)

    @rule(user=_user, path=_path)
    def rmdir(self, user: str, path: str | int) -> None:
        self.do(user, "rmdir", self.at(path))

    @rule(user=_user, path=_path)
    def unlink(self, user: str, path: str | int) -> None:
        self.do(user, "unlink", self.at(path))

    @rule(user=_user, path=_path, to=_path, flags=st.sampled_from([0, 0, 0, 1, 2, 2, 4, 5, 3, 6, 8]))
    def rename(self, user: str, path: str | int, to: str | int, flags: int) -> None:
        self.do(user, "rename", self.at(path), self.at(to), flags)

    @rule(user=_user, path=_path, to=_path, follow=st.booleans())
    def link(self, user: str, path: str | int, to: str | int, follow: bool) -> None:
        self.do(user, "link", self.at(path), self.at(to), follow)

    @rule(user=_user, content=st.one_of(_path, st.integers(1, 4097).map(lambda length: "t" * length)), path=_path)
    def symlink(self, user: str, content: str, path: str | int) -> None:
        self.do(user, "symlink", self.at(content), self.at(path))

    @rule(
        user=_user, path=_path, mode=_mode,
        kind=st.sampled_from([stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR, 0]),
        device=st.sampled_from([0, os.makedev(1, 3), os.makedev(1, 5)]),
    )  # fmt: skip
    def mknod(self, user: str, path: str | int, mode: int, kind: int, device: int) -> None:
        self.do(user, "mknod", self.at(path), mode | kind, device)

    @rule(user=_user, path=_path, mode=_mode)
    def chmod(self, user: str, path: str | int, mode: int) -> None:
        self.do(user, "chmod", self.at(path), mode)

    @rule(user=_user, path=_path, owner=_owner, follow=st.booleans())
    def chown(self, user: str, path: str | int, owner: tuple[int, int], follow: bool) -> None:
        self.do(user, "chown", self.at(path), *owner, follow)

    @rule(user=_user, path=_path, atime=_time, mtime=_time, follow=st.booleans())
    def utimens(self, user: str, path: str | int, atime: tuple[int, int], mtime: tuple[int, int], follow: bool) -> None:
        self.do(user, "utimens", self.at(path), atime, mtime, follow)

    @rule(user=_user, path=_path, name=_name, value=_value, flags=st.sampled_from([0, 0, 1, 2]), follow=st.booleans())
    def setxattr(self, user: str, path: str | int, name: str, value: bytes, flags: int, follow: bool) -> None:
        self.do(user, "setxattr", self.at(path), name, value, flags, follow)

    @rule(user=_user, path=_path, name=_name, what=st.sampled_from(["getxattr", "removexattr"]), follow=st.booleans())
    def xattr(self, user: str, path: str | int, name: str, what: str, follow: bool) -> None:
        self.do(user, what, self.at(path), name, follow)

    @rule(user=_user, path=_path, follow=st.booleans())
    def listxattr(self, user: str, path: str | int, follow: bool) -> None:
        self.do(user, "listxattr", self.at(path), follow)

    @rule(user=_user, mask=st.sampled_from([0, 0o022, 0o077]))
    def umask(self, user: str, mask: int) -> None:
        self.do(user, "umask", mask)


def _forget_pipes(tree: dict[str, dict[str, Any]]) -> None:
    """The kernel tells no FUSE server that something went through a pipe (test_completeness.py: pipe_times)."""
    for entry in tree.values():
        if entry["facts"][0].startswith("p") and entry["moved"] != "new":
            entry["moved"] = ""


def _forget_reading(tree: dict[str, dict[str, Any]]) -> None:
    """Without passthrough the kernel answers reads from its cache, so that nobody knows when a file was read last."""
    for entry in tree.values():
        if "content" in entry:
            entry["moved"] = entry["moved"].replace("a", "") if entry["moved"] != "new" else "new"
            _, entry["facts"] = _without_atime(("returned", entry["facts"]))


def _without_atime(answer: tuple[str, Any]) -> tuple[str, Any]:
    """What a call returns (the facts of a regular file, perhaps), but for the access time."""
    match answer:
        case ("returned", (str(mode), *facts, (_, mtime))) if mode.startswith("-"):
            return "returned", (mode, *facts, mtime)
    return answer


def _shorten(value: object, other: object) -> object:
    """What differs between two answers; of a long one only the beginning."""
    if isinstance(value, tuple) and isinstance(other, tuple) and value[0] == other[0] == "returned":
        return _shorten(value[1], other[1])
    if isinstance(value, dict) and isinstance(other, dict):
        return {key: _shorten(item, other.get(key)) for key, item in value.items() if item != other.get(key)}
    text = repr(value)
    return text if len(text) < 500 else f"{text[:300]}... ({len(text)} characters)"


@pytest.fixture(params=["passthrough=auto", "passthrough=off"])
def sides(request: pytest.FixtureRequest, can_mount: None) -> Iterator[tuple[Side, Side]]:
    """A memfs and a tmpfs that were mounted alike."""
    Differential.passes_through = request.param != "passthrough=off"
    with mounted_alike(f"size={SIZE},nr_inodes={INODES},mode=755", request.param) as (ours, theirs):
        pair = Side(ours), Side(theirs)
        try:
            yield pair
        finally:
            for side in pair:
                side.close()


def run_machine(
    sides: tuple[Side, Side],
    examples: int,
    steps: int,
    number: int,
    *,
    shrink: bool = False,
    machine: type[Differential] = Differential,
) -> None:
    """Run so many examples of a state machine, of so many steps each."""
    machine.sides = sides
    run_state_machine_as_test(
        seed(number)(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            verbosity=Verbosity.normal,
            phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(300)
def test_every_step_is_tmpfs_s(sides: tuple[Side, Side]) -> None:
    run_machine(sides, examples=12, steps=50, number=SEED)


@pytest.mark.skipif(not MINUTES, reason="long: run by `make soak`")
@pytest.mark.timeout(0)
def test_soak(sides: tuple[Side, Side]) -> None:
    first = SEED or random.SystemRandom().randrange(1 << 32)
    end = time.monotonic() + MINUTES * 60 / 2  # there are two ways of mounting
    with time_bar(end - time.monotonic()) as show:
        for number in range(first, first + (1 << 32)):
            print(f"SEED={number}", flush=True)
            show(f"seed {number}")
            run_machine(sides, examples=20, steps=100, number=number, shrink=True)
            if time.monotonic() > end:
                break


def test_errno_names_are_compared() -> None:
    """The comparison itself: what differs must not pass for equal."""
    process = Process(os.geteuid(), os.getegid())
    try:
        assert process("stat", "/nonexistent") == ("failed", errno.errorcode[errno.ENOENT])
        assert process("stat", "/")[0] == "returned"
    finally:
        process.end()
