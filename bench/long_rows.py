"""How long the slowest stat(2) waits while gibibytes are allocated, freed or removed.

The daemon has one event loop, so all callers wait for whatever it does without a checkpoint. The process that allocates
and the one that calls stat share a CPU, with the daemon or without it.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from bench.harness import BenchError, Row, Run, compare, measure, memfs, now, placements, tmpfs

_OPTIONS: Final = "size=5g"
_AFTERWARDS: Final = 1000  # stats
_LONG: Final = 4 << 30  # bytes: sixteen of the pieces that memfs does it in
_TARGET: Final = 20.0  # ms
_ALLOCATED: Final = "allocated"
_FREED: Final = "freed"
_REMOVED: Final = "removed"  # with the file


def rows(run: Run) -> Iterator[Row]:
    """Measure allocating, freeing and removing a file, for each placement."""
    if not run.wants("longest stat"):
        return
    size = _LONG // (4 if run.quick else 1)
    with memfs(run, _OPTIONS) as ours, tmpfs(run, _OPTIONS) as theirs:
        for path in (ours.path, theirs.path):
            (path / "small").write_bytes(b"x")
        for placement, (cpu, daemon_cpu) in placements().items():
            ours.pin(daemon_cpu)
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {cpu})
            try:
                for what in (_ALLOCATED, _FREED, _REMOVED):
                    samples = measure(
                        {
                            "memfs": partial(_longest_stat, ours.path, what, size),
                            "tmpfs": partial(_longest_stat, theirs.path, what, size),
                        },
                        max(3, run.repetitions // 2),
                    )
                    yield compare(
                        *(f"longest stat while {size >> 30} GiB are {what}", placement, samples["memfs"], "ms"),
                        *("tmpfs", samples["tmpfs"]),
                        at_most=_TARGET,
                    )
            finally:
                os.sched_setaffinity(0, before)


def _longest_stat(directory: Path, what: str, size: int) -> float:
    """Return the milliseconds of the longest of many. The file has content, so that memfs is asked each time."""
    path = directory / "long"
    command = ["fallocate", "--length", str(size), str(path)]
    if what != _ALLOCATED:
        subprocess.run(command, check=True)
        command = ["rm", str(path)] if what == _REMOVED else [*command, "--punch-hole"]
    longest = 0.0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            started = now()
            os.stat(directory / "small")
            longest = max(longest, now() - started)
    for _ in range(_AFTERWARDS if what == _REMOVED else 0):  # it may be freed when it has been removed
        time.sleep(0.001)
        started = now()
        os.stat(directory / "small")
        longest = max(longest, now() - started)
    path.unlink(missing_ok=True)
    if process.returncode:
        raise BenchError(f"{' '.join(command)}: exit code {process.returncode}")
    return longest * 1e3
