"""What the kernel's page cache has: what a program has stored to a mapping is data for everybody at once."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memfs.contract.sys.libc import PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE, ByteOffset

from .conftest import MountMemfs
from .process import mounted_alike

#: Which of 64 pages are stored to
STORED = {"apart": [10, 40], "first": [0], "last": [63], "neighbours": [5, 6, 7, 9], "all": [*range(64)], "none": []}


@pytest.fixture(scope="module", params=["passthrough=auto", "passthrough=off", "backing=memfd"])
def alike(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """A memfs and a tmpfs."""
    with mounted_alike("size=16m", request.param) as both:
        yield both


def extents(path: Path) -> list[tuple[int, int]]:
    """Return where a file has data, in bytes, as a program finds it that copies it."""
    found, end = list[tuple[int, int]](), 0
    fd = os.open(path, os.O_RDONLY)
    try:
        while True:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, end))
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return found
    finally:
        os.close(fd)


def seen(path: Path) -> tuple[object, ...]:
    """Return what is told of a file: its data, its blocks, and what is found from many places on."""
    fd = os.open(path, os.O_RDONLY)
    found: list[object] = []
    for offset in range(0, os.fstat(fd).st_size, 3 * PAGE_SIZE // 2):
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            try:
                found.append(os.lseek(fd, offset, whence))
            except OSError as error:
                found.append(errno.errorcode[error.errno or 0])
    os.close(fd)
    return extents(path), path.stat().st_blocks, found


class Mapped:
    """A new file, mapped for writing, of which somebody else may already have read the holes."""

    def __init__(self, directory: Path, size: int, *, read_before: bool = False) -> None:
        self.path = directory / "file"
        self.path.unlink(missing_ok=True)
        with self.path.open("xb") as file:
            file.truncate(size)
        if read_before:
            assert not self.path.read_bytes().strip(b"\0")
        self.fd = os.open(self.path, os.O_RDWR)
        self.area = mmap.mmap(self.fd, size)

    def store(self, pages: list[int]) -> None:
        for page in pages:
            self.area[page * PAGE_SIZE + 7] = 1

    def close(self) -> None:
        self.area.close()
        os.close(self.fd)


def both(alike: tuple[Path, Path], do: Callable[[Path], object]) -> None:
    """See that the same is seen on a memfs and on a tmpfs."""
    found = [do(directory) for directory in alike]
    assert found[0] == found[1]


@pytest.mark.parametrize("pages", STORED.values(), ids=STORED)
@pytest.mark.parametrize("size", [64 * PAGE_SIZE, 63 * PAGE_SIZE + 100], ids=["whole", "part"])
@pytest.mark.parametrize("read_before", [False, True], ids=["", "read-before"])
def test_what_was_stored_is_data(alike: tuple[Path, Path], pages: list[int], size: int, read_before: bool) -> None:
    def do(directory: Path) -> object:
        mapped = Mapped(directory, size, read_before=read_before)
        mapped.store(pages)
        before = seen(mapped.path)
        mapped.area.flush()
        after = seen(mapped.path)
        mapped.close()
        return before, after, seen(mapped.path)

    both(alike, do)


def test_what_the_kernel_has_dropped_is_a_hole(alike: tuple[Path, Path]) -> None:
    def do(directory: Path) -> object:
        mapped = Mapped(directory, 64 * PAGE_SIZE)
        os.pread(mapped.fd, 64 * PAGE_SIZE, 0)
        os.posix_fadvise(mapped.fd, 0, 32 * PAGE_SIZE, os.POSIX_FADV_DONTNEED)
        first = seen(mapped.path)
        mapped.store([40])
        second = seen(mapped.path)
        mapped.close()
        return first, second

    both(alike, do)


def test_what_was_punched_is_a_hole_again(alike: tuple[Path, Path]) -> None:
    def do(directory: Path) -> object:
        mapped = Mapped(directory, 64 * PAGE_SIZE)
        mapped.store([3, 4, 50])
        fallocate(mapped.fd, PUNCH_HOLE, ByteOffset(4 * PAGE_SIZE), 8 * PAGE_SIZE)
        first = seen(mapped.path)
        mapped.store([5])
        os.truncate(mapped.path, 50 * PAGE_SIZE)
        second = seen(mapped.path)
        mapped.close()
        return first, second

    both(alike, do)


def test_mapping_outlives_its_descriptor(alike: tuple[Path, Path]) -> None:
    def do(directory: Path) -> object:
        mapped = Mapped(directory, 64 * PAGE_SIZE)
        os.close(mapped.fd)
        mapped.store([20])
        found = seen(mapped.path)
        mapped.area.close()
        return found, seen(mapped.path)

    both(alike, do)


def test_what_stays_in_the_cache_after_the_last_close(alike: tuple[Path, Path]) -> None:
    """The next one who maps it stores to a page that is not read again."""

    def do(directory: Path) -> object:
        path = directory / "file"
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            file.truncate(64 * PAGE_SIZE)
        for _ in range(2):
            assert not path.read_bytes().strip(b"\0")
        fd = os.open(path, os.O_RDWR)
        area = mmap.mmap(fd, 64 * PAGE_SIZE)
        area[30 * PAGE_SIZE] = 1
        found = seen(path)
        area.close()
        os.close(fd)
        return found

    both(alike, do)


@pytest.mark.parametrize(
    "command",
    [
        "cp --sparse=auto {file} {copy}",
        "cp --sparse=always {file} {copy}",
        "tar --sparse -C {directory} -cf - file | tar -xOf - >{copy}",
    ],
    ids=["cp-auto", "cp-always", "tar"],
)
def test_copy_is_whole(alike: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    for directory in alike:
        # A child that is forked now and not later: if it closed a descriptor of the file, that would write it back.
        with subprocess.Popen("sh", stdin=subprocess.PIPE, text=True) as shell:
            mapped = Mapped(directory, 1 << 20)
            mapped.store([1, 100, 255])
            shell.communicate(command.format(file=mapped.path, copy=tmp_path / "copy", directory=directory))
        assert shell.returncode == 0
        assert (tmp_path / "copy").read_bytes() == mapped.area[:]
        mapped.close()


@pytest.mark.parametrize("way", ["passthrough=off", "backing=memfd"])
@pytest.mark.parametrize(
    ("pages", "step"), [(5000, 1), (1100, 1024)], ids=["more-than-is-looked-at", "more-than-is-remembered"]
)
def test_beyond_what_is_known_a_hole_is_data(mount_memfs: MountMemfs, way: str, pages: int, step: int) -> None:
    """Holes in the cache cost the daemon neither memory nor time without a bound, and no copy is wrong."""
    mapped = Mapped(mount_memfs(f"size=16m,{way}").path, (pages * step + 1) * PAGE_SIZE)
    for page in range(0, pages * step, step):
        os.pread(mapped.fd, PAGE_SIZE, page * PAGE_SIZE)
    stored = pages * step - step
    mapped.store([stored])
    assert any(start <= stored * PAGE_SIZE < end for start, end in extents(mapped.path))
    status = mapped.path.stat()
    assert 8 <= status.st_blocks <= status.st_size // 512
    mapped.close()
    assert extents(mapped.path) == [(stored * PAGE_SIZE, (stored + 1) * PAGE_SIZE)]
    assert mapped.path.stat().st_blocks == 8


@pytest.mark.parametrize("way", ["passthrough=off", "backing=memfd"])
def test_what_is_in_the_cache_is_read_without_asking_the_daemon(mount_memfs: MountMemfs, way: str) -> None:
    """A write leaves it there, although it changes the time by which other filesystems know what is out of date."""
    memfs = mount_memfs(f"size=16m,{way}")
    path = memfs.path / "file"
    path.write_bytes(b"x" * 8 * PAGE_SIZE)
    reads = "import os, sys; fd = os.open(sys.argv[1], 2); os.pwrite(fd, b'y', 0); os.stat(sys.argv[1])"
    reads += "; print(flush=True); input(); print(os.pread(fd, 2, 0))"
    with subprocess.Popen(
        [sys.executable, "-c", reads, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        memfs.process.send_signal(signal.SIGSTOP)
        try:
            assert reader.communicate("now\n", timeout=20)[0] == "b'yx'\n"
        finally:
            memfs.process.send_signal(signal.SIGCONT)
