"""Each kind of request, with the daemon killed before and after each commit that it makes: nobody notices.

What the calls return, and all of the tree afterwards, is as on a tmpfs beside it; for what a tmpfs has not, as without
a death. Random steps are in test_survival.py, and what owners ask for in tests of owners.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memfs.contract.faults import Point
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, PUNCH_HOLE, fallocate
from memfs.store.seals import F_SEAL_GUEST, F_SEAL_SHRINK, IOC_ARGUMENT, MEMFS_IOC_ADD_SEALS

from .conftest import memfs_command, run
from .injection import Injection
from .process import mounted_alike
from .test_survival import EXPECTED

PAGE = 4096
#: What is done in an empty directory, in two parts: the daemon dies in the second
Request = tuple[Callable[[Path], object], Callable[[Path], object]]


def nothing(directory: Path) -> None:
    """Nothing needs to be there."""


def files(directory: Path) -> None:
    """Two files, one of two names."""
    (directory / "a").write_bytes(b"content of a")
    (directory / "b").write_bytes(b"b" * 3 * PAGE)
    os.link(directory / "a", directory / "a too")
    (directory / "d").mkdir()


def create_write_read(directory: Path) -> object:
    fd = os.open(directory / "new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o640)
    try:
        return os.pwrite(fd, b"written", 5), os.pread(fd, 100, 0)
    finally:
        os.close(fd)


def unlink_open(directory: Path) -> object:
    with (directory / "b").open("r+b", buffering=0) as file:
        (directory / "b").unlink()
        status = os.fstat(file.fileno())
        return status.st_nlink, status.st_size, file.write(b"x"), os.pread(file.fileno(), 3, 0)


def unnamed_then_linked(directory: Path) -> object:
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        os.write(fd, b"no name yet")
        os.link(f"/proc/self/fd/{fd}", directory / "named", src_dir_fd=fd)  # which has it follow links
        return os.fstat(fd).st_nlink
    finally:
        os.close(fd)


def attributes(directory: Path) -> object:
    path = directory / "a"
    os.setxattr(path, "user.one", b"1", os.XATTR_CREATE)
    os.setxattr(path, "user.two", b"2" * 1000)
    os.setxattr(path, "user.one", b"11", os.XATTR_REPLACE)
    os.removexattr(path, "user.two")
    os.chmod(path, 0o4711)
    os.chown(path, 12001, 12002)
    os.utime(path, ns=(10**18, 2 * 10**18))
    return sorted(os.listxattr(path)), os.getxattr(path, "user.one"), path.stat().st_mtime_ns


def exclusively(call: Callable[[Path], object]) -> Callable[[Path], object]:
    """A call that succeeds once."""

    def twice(directory: Path) -> object:
        call(directory)
        try:
            return call(directory)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    return twice


def sizes(directory: Path) -> object:
    fd = os.open(directory / "b", os.O_RDWR)
    try:
        fallocate(fd, 0, 2 * PAGE, 4 * PAGE)
        fallocate(fd, PUNCH_HOLE, 0, PAGE)
        fallocate(fd, FALLOC_FL_KEEP_SIZE, 8 * PAGE, PAGE)
        os.ftruncate(fd, 5 * PAGE + 1)
        return os.fstat(fd).st_size, os.fstat(fd).st_blocks
    finally:
        os.close(fd)


REQUESTS: dict[str, Request] = {
    "create": (nothing, create_write_read),
    "mkdir": (files, exclusively(lambda at: (at / "new").mkdir())),
    "rmdir": (files, exclusively(lambda at: (at / "d").rmdir())),
    "symlink": (nothing, exclusively(lambda at: (at / "link").symlink_to("x" * 200))),
    "mknod": (nothing, exclusively(lambda at: os.mknod(at / "fifo", stat.S_IFIFO | 0o600))),
    "link": (files, exclusively(lambda at: os.link(at / "b", at / "b too"))),
    "rename over": (files, exclusively(lambda at: (at / "a").rename(at / "b"))),
    "rename": (files, exclusively(lambda at: (at / "b").rename(at / "d" / "c"))),
    "unlink": (files, exclusively(lambda at: (at / "a").unlink())),
    "unlink open": (files, unlink_open),
    "O_TMPFILE": (nothing, unnamed_then_linked),
    "attributes": (files, attributes),
    "fallocate, punch, truncate": (files, sizes),
}


def guest(directory: Path) -> None:
    """A guest-sealed file of eight pages."""
    os.mknod(directory / "guest", stat.S_IFREG | 0o600)
    fd = os.open(directory / "guest", os.O_ACCMODE)  # for ioctl only: what creates the file says another mode
    try:
        fcntl.ioctl(fd, MEMFS_IOC_ADD_SEALS, IOC_ARGUMENT.pack(F_SEAL_GUEST))
        os.truncate(directory / "guest", 8 * PAGE)
    finally:
        os.close(fd)


def guest_pages(directory: Path) -> object:
    fd = os.open(directory / "guest", os.O_RDWR)
    try:
        fallocate(fd, 0, 0, 6 * PAGE)
        fallocate(fd, PUNCH_HOLE, PAGE, 2 * PAGE)
        os.ftruncate(fd, 5 * PAGE)
        fcntl.ioctl(fd, MEMFS_IOC_ADD_SEALS, IOC_ARGUMENT.pack(F_SEAL_SHRINK))
        return os.lseek(fd, 0, os.SEEK_HOLE), os.fstat(fd).st_blocks, os.getxattr(fd, "user.memfs.seals")
    finally:
        os.close(fd)


def remount(directory: Path) -> object:
    os.setxattr(directory, "trusted.memfs.remount", b"size=24m,nr_inodes=3000")
    space = os.statvfs(directory)
    os.setxattr(directory, "trusted.memfs.remount", b"size=16m,nr_inodes=2000")
    return space.f_blocks, space.f_files


#: a tmpfs has none of these
REQUESTS_OF_OURS: dict[str, Request] = {
    "seal": (nothing, guest),
    "pages of a guest": (guest, guest_pages),
    "remount": (nothing, remount),
}


@pytest.fixture(scope="module")
def inject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injection]:
    """As in_memfs, for one memfs of all these tests."""
    injection = Injection(tmp_path_factory.mktemp("inject"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in injection.environment.items():
            patch.setenv(name, value)
        yield injection


@pytest.fixture(scope="module")
def alike(inject: Injection, can_mount: None) -> Iterator[tuple[Path, Path]]:
    """A memfs that can be killed, and a tmpfs."""
    with mounted_alike("size=16m,nr_inodes=2000", "survive=on", EXPECTED) as both:
        yield both


def snapshot(directory: Path) -> dict[str, object]:
    """All that is in a directory, but times that nobody has set."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        said: list[object] = [status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_size]
        if stat.S_ISREG(status.st_mode):
            said += [status.st_blocks, sorted(os.listxattr(path))]
            try:
                said.append(path.read_bytes())
            except PermissionError:  # a guest's
                said.append(None)
        elif stat.S_ISLNK(status.st_mode):
            said.append(os.readlink(path))
        found[str(path.relative_to(directory))] = said
    return found


def done_in(mounted: Path, request: Request) -> tuple[object, dict[str, object]]:
    """What a request returns in a new directory, and what is there then."""
    prepare, act = request
    with tempfile.TemporaryDirectory(dir=mounted) as name:
        directory = Path(name)
        prepare(directory)
        return act(directory), snapshot(directory)


@pytest.mark.parametrize("name", [*REQUESTS, *REQUESTS_OF_OURS])
def test_a_death_at_any_commit_is_not_noticed(alike: tuple[Path, Path], inject: Injection, name: str) -> None:
    ours, theirs = alike
    prepare, act = request = (REQUESTS | REQUESTS_OF_OURS)[name]
    expected = done_in(theirs if name in REQUESTS else ours, request)
    deaths = 0
    for point in (Point.BEFORE_COMMIT, Point.AFTER_COMMIT):
        for number in range(100):
            armed = list[bool]()

            def dies(directory: Path, point: Point = point, number: int = number, armed: list[bool] = armed) -> object:
                inject.arm(point, spared=number)
                try:
                    return act(directory)
                finally:
                    armed.append(inject.armed)
                    inject.disarm()

            assert done_in(ours, (prepare, dies)) == expected, f"killed {point.value}, the {number}th"
            if armed == [True]:
                break
            deaths += 1
        else:
            pytest.fail("it commits without an end")
    assert deaths >= 2


def test_what_is_populated_is_there_after_a_death_at_any_commit(
    alike: tuple[Path, Path], inject: Injection, tmp_path: Path
) -> None:
    """The command makes many requests; the measurement tells of the death (test_survival.py)."""
    content = tmp_path / "content"
    content.write_bytes(b"x" * 2 * PAGE)
    ours, _ = alike
    for point in (Point.BEFORE_COMMIT, Point.AFTER_COMMIT):
        for number in (0, 2, 5):
            with tempfile.TemporaryDirectory(dir=ours) as name:
                guest(Path(name))
                inject.arm(point, spared=number)
                result = run(*memfs_command("populate", Path(name) / "guest", content))
                inject.disarm()
                if result.returncode == 0:
                    assert (Path(name) / "guest").stat().st_blocks == 16
                else:  # the connection has ended, and the sentence says so
                    assert result.stderr.startswith("memfs: ")


def test_nothing_is_left_over(alike: tuple[Path, Path]) -> None:
    """What the kernel has forgotten while nobody listened is freed a second after a death."""
    ours, _ = alike
    deadline = time.monotonic() + 20
    while (space := os.statvfs(ours)).f_ffree != space.f_files - 1 or space.f_bfree != space.f_blocks:
        assert time.monotonic() < deadline, f"{space.f_files - space.f_ffree} inodes are in use"
        time.sleep(0.05)
