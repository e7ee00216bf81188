"""What other filesystems' test suites found: each is done on a tmpfs and on a memfs, with the same outcome."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memfs.store.seals import F_SEAL_SEAL, MEMFS_IOC_ADD_SEALS

from .conftest import run, state_of
from .process import mounted_alike
from .tools import needs

FS_IOC_SETFLAGS = 0x40086602
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
FSXATTR = struct.Struct("=IIIII8x")  # xflags, extsize, nextents, projid, cowextsize
FS_NOATIME_FL = 0x80
IMMUTABLE, APPEND, SYNC, NODUMP, NOATIME, EXTSIZE, PROJINHERIT = 0x8, 0x10, 0x20, 0x80, 0x40, 0x800, 0x200


@pytest.fixture(scope="module", params=["passthrough=auto", "passthrough=off"])
def alike(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """A memfs and a tmpfs."""
    with mounted_alike("size=16m", request.param) as both:
        yield both


def outcome(of: Callable[[], object]) -> object:
    """Return what a call returned, or the name of its errno."""
    try:
        return of()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


# -- attributes that an ioctl changes ----------------------------------------------------------------------------------


def by_setflags(fd: int) -> None:
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", FS_NOATIME_FL))


def by_fssetxattr(fd: int) -> None:
    fcntl.ioctl(fd, FS_IOC_FSSETXATTR, FSXATTR.pack(NOATIME, 0, 0, 0, 0))


def by_seal(fd: int) -> None:
    fcntl.ioctl(fd, MEMFS_IOC_ADD_SEALS, struct.pack("=I", F_SEAL_SEAL))


@pytest.mark.parametrize("change", [by_setflags, by_fssetxattr])
@pytest.mark.parametrize("kind", ["empty", "file", "directory"])
def test_ctime_is_new_after_an_ioctl(alike: tuple[Path, Path], change: Callable[[int], None], kind: str) -> None:
    for directory in alike:
        path = directory / f"{change.__name__}-{kind}"
        if kind == "directory":
            path.mkdir()
        else:
            path.write_bytes(b"x" * (kind == "file"))
        assert ctime_grows(path, change, os.O_RDONLY), directory


@pytest.mark.parametrize("content", [b"", b"x"])
def test_ctime_is_new_after_a_seal(alike: tuple[Path, Path], content: bytes) -> None:
    path = alike[0] / f"sealed-{len(content)}"
    path.write_bytes(content)
    assert ctime_grows(path, by_seal, os.O_ACCMODE)


def ctime_grows(path: Path, change: Callable[[int], None], flags: int) -> bool:
    """Return whether stat(2) tells a newer ctime after a change by a descriptor opened with some flags."""
    before = path.stat().st_ctime_ns
    time.sleep(0.02)  # more than a tick of the clock that the kernel stamps files with
    fd = os.open(path, flags)
    change(fd)
    os.close(fd)
    return path.stat().st_ctime_ns > before


@pytest.mark.parametrize(
    "wanted",
    [
        *((flags, 0, 0, 0, 0) for flags in (0, IMMUTABLE, APPEND, NODUMP, NOATIME, NODUMP | NOATIME)),
        *((flags, 0, 0, 0, 0) for flags in (SYNC, EXTSIZE, PROJINHERIT, 1 << 30)),
        *((NODUMP, 4096, 0, 0, 0), (NODUMP, 0, 7, 0, 0), (NODUMP, 0, 0, 7, 0), (NODUMP, 0, 0, 0, 4096)),
    ],
)
def test_extended_flags(alike: tuple[Path, Path], wanted: tuple[int, ...]) -> None:
    found = []
    for directory in alike:
        path = directory / "flagged"
        path.touch()
        with path.open() as file:
            fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("l", 0))
            done = outcome(lambda: fcntl.ioctl(file, FS_IOC_FSSETXATTR, FSXATTR.pack(*wanted)))
            now = FSXATTR.unpack(fcntl.ioctl(file, FS_IOC_FSGETXATTR, bytes(FSXATTR.size)))
            fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("l", 0))
        found.append((done if isinstance(done, str) else "done", now))
    assert found[0] == found[1]


# -- access control lists ----------------------------------------------------------------------------------------------


@needs("setfacl", "setpriv")
@pytest.mark.parametrize("entry", ["u::rwx,g::rwx,o::rwx", "u:7:rw"])
@pytest.mark.parametrize(("group", "further"), [(101, None), (100, None), (101, 100)])
@pytest.mark.parametrize("default", [False, True])
def test_setgid_goes_when_an_owner_outside_the_group_sets_an_acl(
    alike: tuple[Path, Path], entry: str, group: int, further: int | None, default: bool
) -> None:
    modes = []
    for directory in alike:
        for make in (Path.touch, Path.mkdir):
            path = Path(tempfile.mktemp(dir=directory))
            make(path)
            os.chown(path, 100, 100)
            path.chmod(0o2755)
            groups = "--clear-groups" if further is None else f"--groups={further}"
            setfacl = ["setfacl", *(["-d"] if default else []), "-m", entry, str(path)]
            subprocess.run(["setpriv", "--reuid=100", f"--regid={group}", groups, *setfacl], check=False)
            modes.append(oct(stat.S_IMODE(path.stat().st_mode)))
    assert modes[:2] == modes[2:]


# -- positions in directories ------------------------------------------------------------------------------------------


class Listing:
    """A directory that is read by getdents64(2)."""

    _DIRENT = struct.Struct("=QqHB")
    _libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def rest(self, position: int | None = None) -> list[tuple[str, int]]:
        """Return names and positions from a position on, or from where it is."""
        if position is not None:
            os.lseek(self._fd, position, os.SEEK_SET)
        buffer, entries, at = ctypes.create_string_buffer(4096), [], 0
        length = self._libc.syscall(217, self._fd, buffer, 4096)
        while at < length:
            _, offset, size, _ = self._DIRENT.unpack_from(buffer.raw, at)
            entries.append((os.fsdecode(buffer.raw[at + self._DIRENT.size : at + size].partition(b"\0")[0]), offset))
            at += size
        return entries

    def close(self) -> None:
        os.close(self._fd)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="calls getdents64(2) by its number on x86-64")
def test_from_each_position_that_was_told_the_same_follows(alike: tuple[Path, Path]) -> None:
    followed = []
    for directory in alike:
        path = directory / "listed"
        path.mkdir()
        for number in range(5):
            (path / str(number)).touch()
        listing = Listing(path)
        entries = listing.rest()
        after = [[name for name, _ in listing.rest(position)] for _, position in entries]
        (path / "2").unlink()
        (path / "new").touch()
        later = [[name for name, _ in listing.rest(position)] for _, position in entries[2:]]
        listing.close()
        followed.append(([name for name, _ in entries], after, later))
    assert followed[0] == followed[1]


# -- access times ------------------------------------------------------------------------------------------------------

#: Mounts again with options, and says for a file, a directory and a link whether reading it once, and once more, sets
#: its access time
READS = """
set -e; cd "$1"; mount -i -o remount,$2 .
said() { stat -c %x "$1"; }
for kind in file dir link; do
    name=$kind-$(date +%N)
    case $kind in file) echo x > $name;; dir) mkdir $name;; link) ln -s x $name;; esac
    touch -h -a -d 2001-01-01 $name
    for turn in 1 2; do
        before=$(said $name); sleep 0.02
        case $kind in file) cat $name > /dev/null;; dir) ls $name;; link) readlink $name > /dev/null;; esac
        test "$before" = "$(said $name)" && echo $kind same || echo $kind new
    done
done
"""


@pytest.mark.parametrize(
    "options", ["noatime", "strictatime", "relatime", "nodiratime", "strictatime,nodiratime", "relatime,diratime"]
)
def test_remount_says_when_access_times_are_set(alike: tuple[Path, Path], options: str) -> None:
    def reads(path: Path) -> list[str]:
        result = run("bash", "-c", READS, "bash", path, options)
        assert result.returncode == 0, result.stderr
        # Without passthrough, access times of regular files stay as they are.
        return [line for line in result.stdout.splitlines() if passes or not line.startswith("file")]

    passes = state_of(alike[0])["passthrough"]
    expected = reads(alike[1])
    deadline = time.monotonic() + 10
    while (found := reads(alike[0])) != expected and time.monotonic() < deadline:
        pass  # it is told of the change a moment after mount(8) has returned
    assert found == expected
