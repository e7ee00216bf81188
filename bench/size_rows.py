"""How cost grows with size: a conversion there and back, and punching a file that is nearly all hole.

For `make bench-plot`, which draws them; the sizes of real memory end where the machine's memory is still well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from bench.conversion_rows import owner
from bench.harness import Row, Run, compare, measure, memfs, now, placements, tmpfs, work
from memfs.contract.sys.libc import fallocate
from memfs.contract.units import PAGE_SIZE

NAMES: Final = {"convert": "convert there and back: ", "sparse": "punch a file of which one page is there: "}
SIZES: Final = {
    "4 KiB": 1 << 12,
    "64 KiB": 1 << 16,
    "1 MiB": 1 << 20,
    "16 MiB": 1 << 24,
    "256 MiB": 1 << 28,
    "1 GiB": 1 << 30,
}
SPARSE: Final = {**SIZES, "16 GiB": 1 << 34, "1 TiB": 1 << 40}
_TEBIBYTE: Final = 50e3  # microseconds, and no more, to punch that much of nothing
_MOST: Final = 256 << 20  # bytes to convert in one repetition, if more than one conversion


def rows(run: Run) -> Iterator[Row]:
    """Measure both, the smallest size first."""
    if not run.wants("by size"):
        return
    placement, (cpu, daemon_cpu) = list(placements().items())[-1]
    options = "size=3g"
    with memfs(run, options) as ours, tmpfs(run, options) as theirs:
        ours.pin(daemon_cpu)
        for name, size in SPARSE.items():
            samples = measure(
                {
                    "memfs": partial(_punch_sparse, ours.path / "sparse", size),
                    "tmpfs": partial(_punch_sparse, theirs.path / "sparse", size),
                },
                run.repetitions,
            )
            yield compare(
                *(NAMES["sparse"] + name, placement, samples["memfs"], "us", "tmpfs", samples["tmpfs"]),
                at_most=_TEBIBYTE if size == 1 << 40 else None,
            )
        for each in ("shared", "private"):
            (theirs.path / each).touch()
        with owner(ours.path, 1, 1, (1 << 30) // PAGE_SIZE):
            for name, size in SIZES.items():
                count = max(1, min(50, _MOST // size))
                samples = measure(
                    {
                        "memfs": partial(_convert, ours.path, size, count, cpu),
                        "tmpfs": partial(_convert, theirs.path, size, count, cpu),
                    },
                    max(3, run.repetitions // 2),
                )
                yield compare(NAMES["convert"] + name, placement, samples["memfs"], "us", "tmpfs", samples["tmpfs"])


def _convert(directory: Path, size: int, count: int, cpu: int) -> float:
    return work(f"convert:{size // PAGE_SIZE}", directory, count, cpu) / count / 1e3


def _punch_sparse(path: Path, size: int) -> float:
    """Microseconds to punch all of a file that has its last page."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, size)
    fallocate(fd, 0, size - PAGE_SIZE, PAGE_SIZE)
    started = now()
    fallocate(fd, 3, 0, size)
    taken = now() - started
    os.close(fd)
    return taken * 1e6
