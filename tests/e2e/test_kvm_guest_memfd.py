"""A guest-sealed file of memfs against a real guest_memfd: the same calls, and the same answers.

Where they differ, the RFC is followed, and the difference is listed here: read(2) and write(2) are EPERM (EINVAL
there), and memory may be allocated past the end of the file (EINVAL there, where a file's size never changes).
"""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable, Iterator

import pytest

from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from memfs.contract.units import PAGE_SIZE
from tests.model.real_kvm import real_kvm_or_skip

from .conftest import Memfs, memfs_command

SIZE = 64 * PAGE_SIZE
FALLOC_FL_ZERO_RANGE = 0x10  # linux/falloc.h
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
MODES = [FALLOC_FL_KEEP_SIZE, PUNCH, FALLOC_FL_ZERO_RANGE, PUNCH | FALLOC_FL_ZERO_RANGE, 0x08, 0x20, 0x40]
OFFSETS = [0, PAGE_SIZE, 7 * PAGE_SIZE, 63 * PAGE_SIZE, 100, -PAGE_SIZE, SIZE, 1 << 40, (1 << 63) - PAGE_SIZE]
LENGTHS = [PAGE_SIZE, 5 * PAGE_SIZE, SIZE, 0, -PAGE_SIZE, 100, (1 << 63) - PAGE_SIZE]


@pytest.fixture
def files(memfs: Memfs) -> Iterator[tuple[int, int]]:
    """Descriptors of a guest-sealed file and of a guest_memfd, of the same size."""
    kvm = real_kvm_or_skip()
    try:
        try:
            real = kvm.create_guest_memfd(SIZE)
        except OSError as error:
            pytest.skip(f"no guest_memfd to compare with: {error.strerror}")
        made = memfs.run(*memfs_command("create", "--seals", "guest", "--size", str(SIZE), memfs.path / "guest.mem"))
        assert made.returncode == 0, made.stderr
        ours = os.open(memfs.path / "guest.mem", os.O_RDWR)
        try:
            yield ours, real
        finally:
            os.close(ours)
            os.close(real)
    finally:
        kvm.close()


def answer(call: Callable[..., object], *arguments: object) -> int:
    """0 or an errno."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0


def past_the_end(mode: int, offset: int, length: int) -> bool:
    """Whether a call allocates past the end: the one in which they differ."""
    return mode == FALLOC_FL_KEEP_SIZE and offset + length > SIZE


@pytest.mark.parametrize("seed", range(4))
def test_fallocate_gives_the_same_answers(files: tuple[int, int], seed: int) -> None:
    random_ = random.Random(seed)
    answers = set()
    for number in range(300):
        mode, offset, length = (random_.choice(values) for values in (MODES, OFFSETS, LENGTHS))
        if past_the_end(mode, offset, length):
            continue
        ours, real = (answer(fallocate, fd, mode, offset, length) for fd in files)
        assert ours == real, f"call {number}: mode {mode:#x}, offset {offset:#x}, length {length:#x}"
        answers.add(ours)
    assert len(answers) >= 3, "the calls were all alike"


def test_content_cannot_be_reached(files: tuple[int, int]) -> None:
    ours, real = files
    for fd, expected in ((ours, errno.EPERM), (real, errno.EINVAL)):
        assert answer(os.read, fd, 1) == expected
        assert answer(os.write, fd, b"x") == expected
        assert answer(mmap.mmap, fd, PAGE_SIZE) == errno.ENODEV
