"""Random reads, writes, mappings, truncations and punches on one file, each checked against what must be there.

As fsx does it: a bytearray is the oracle, and one wrong byte ends it. Two handles take turns, so that a cache that one
of them fills and the other does not know of shows. Where they are installed, fio does the same at speed, with several
processes, and stress-ng does everything else to files at once.
"""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

import pytest

from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate

from .conftest import MountMemfs
from .tools import needs

MODES = ("passthrough=auto", "passthrough=off", "backing=memfd")
LARGEST = 300_000  # bytes of the file: not a multiple of the page
STEPS = 3000


class Exerciser:
    """A file, two handles of it, and what it should hold."""

    def __init__(self, path: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self._handles = [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2)]
        self._content = bytearray()
        self.done: dict[str, int] = {}

    def close(self) -> None:
        for fd in self._handles:
            os.close(fd)

    def step(self) -> None:
        """Do one thing and see that it did what it should."""
        name = self._random.choice(
            ["read", "write", "append", "map_read", "map_write", "truncate", "punch", "allocate"]
        )
        getattr(self, f"_{name}")(self._random.choice(self._handles))
        self.done[name] = self.done.get(name, 0) + 1

    def check(self) -> None:
        """Everything, through each handle."""
        for fd in self._handles:
            assert os.fstat(fd).st_size == len(self._content)
            assert os.pread(fd, LARGEST + 1, 0) == self._content

    def _range(self, end: int) -> tuple[int, int]:
        start = self._random.randrange(max(1, end))
        return start, min(self._random.randint(1, 70_000), end - start)

    def _bytes(self, length: int) -> bytes:
        return self._random.randbytes(length)

    def _read(self, fd: int) -> None:
        start, length = self._range(LARGEST)
        assert os.pread(fd, length, start) == self._content[start : start + length], f"pread {length} at {start}"

    def _write(self, fd: int) -> None:
        start, length = self._range(LARGEST)
        data = self._bytes(length)
        assert os.pwrite(fd, data, start) == length
        self._grow(start)
        self._content[start : start + length] = data

    def _append(self, fd: int) -> None:
        data = self._bytes(min(self._random.randint(1, 5000), LARGEST - len(self._content)))
        assert os.pwrite(fd, data, len(self._content)) == len(data)
        self._content += data

    def _map_read(self, fd: int) -> None:
        if not self._content:
            return
        with mmap.mmap(fd, len(self._content), prot=mmap.PROT_READ) as area:
            start, length = self._range(len(self._content))
            assert area[start : start + length] == self._content[start : start + length], f"mapped {length} at {start}"

    def _map_write(self, fd: int) -> None:
        if not self._content:
            return
        with mmap.mmap(fd, len(self._content)) as area:
            start, length = self._range(len(self._content))
            self._content[start : start + length] = area[start : start + length] = self._bytes(length)

    def _truncate(self, fd: int) -> None:
        size = self._random.randrange(LARGEST)
        os.ftruncate(fd, size)
        del self._content[size:]
        self._grow(size)

    def _punch(self, fd: int) -> None:
        start, length = self._range(LARGEST)
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, length)
        end = min(start + length, len(self._content))
        if start < end:
            self._content[start:end] = bytes(end - start)

    def _allocate(self, fd: int) -> None:
        start, length = self._range(LARGEST)
        keep = self._random.random() < 0.5
        fallocate(fd, FALLOC_FL_KEEP_SIZE if keep else 0, start, length)
        if not keep:
            self._grow(start + length)

    def _grow(self, size: int) -> None:
        self._content += bytes(max(0, size - len(self._content)))


@pytest.mark.parametrize("mode", MODES)
def test_no_byte_is_wrong(mount_memfs: MountMemfs, mode: str, request: pytest.FixtureRequest) -> None:
    seed = int(os.environ.get("MEMFS_SOAK_SEED", "0")) or 1
    memfs = mount_memfs(f"size=64m,{mode}")
    exerciser = Exerciser(memfs.path / "f", seed)
    try:
        for number in range(STEPS):
            exerciser.step()
            if number % 50 == 0:
                exerciser.check()
        exerciser.check()
    finally:
        exerciser.close()
    assert len(exerciser.done) == 8, exerciser.done
    (memfs.path / "f").unlink()


@needs("fio")
@pytest.mark.parametrize("engine", ["psync", "mmap"])
@pytest.mark.parametrize("mode", MODES)
def test_fio_reads_what_it_wrote(mount_memfs: MountMemfs, mode: str, engine: str) -> None:
    memfs = mount_memfs(f"size=128m,{mode}")
    common = [
        "--directory=.",
        f"--ioengine={engine}",
        "--size=8m",
        "--numjobs=2",
        "--bsrange=512-64k",
        "--bs_unaligned",
    ]
    job = ["--name=random", "--rw=randrw", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--fallocate=keep"]
    result = memfs.run("fio", *common, *job, "--group_reporting", "--output-format=terse")
    assert result.returncode == 0, result.stdout + result.stderr
    errors = [line.split(";")[4] for line in result.stdout.splitlines() if line.startswith("3;")]
    assert errors == ["0"], result.stdout


#: Of stress-ng's stressors, those that work on files and check what they find
STRESSORS = (
    "access chmod chown dentry dir dirdeep fallocate fcntl filename flock fstat getdent hdd iomix link lockf mknod "
    "open readahead rename revio seek sendfile splice symlink sync-file touch utime xattr"
)


@needs("stress-ng")
@pytest.mark.parametrize("mode", MODES)
def test_stress_ng_finds_nothing_wrong(mount_memfs: MountMemfs, mode: str) -> None:
    """All of them at once; for MEMFS_SOAK_MINUTES if that is set."""
    memfs = mount_memfs(f"size=256m,{mode}")
    seconds = max(2, round(60 * float(os.environ.get("MEMFS_SOAK_MINUTES", "0"))))
    sizes = [f"--{name}-bytes=8m" for name in ("fallocate", "hdd", "iomix", "readahead", "revio", "sync-file")]
    sizes += ["--seek-size=4m", "--sendfile-size=4m", "--dentries=300"]
    each = [option for name in STRESSORS.split() for option in (f"--{name}", "1")]
    command = ["stress-ng", "--temp-path", ".", "--verify", "--timeout", f"{seconds}s", *each, *sizes]
    result = memfs.run(*command, timeout=seconds + 60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(memfs.path.iterdir()) == []
