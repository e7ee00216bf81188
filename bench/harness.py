"""How the benchmarks measure, so that their numbers can be believed on a noisy machine.

Everything is a ratio. A thing and its reference are measured alternately in one run, after one round that does not
count, and their medians are compared. Each round takes them in another order, drawn by lot, because what ran before
decides which memory comes next: with an order that only rotates, each always gets what the same other one has freed,
and reads of the same kind of file differ by a fifth. Where a daemon answers, the row says whether it shared a CPU with
its client (`placement`): a wake-up across CPUs costs several times one on the same CPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).parent
_MOUNT_TIMEOUT: Final = 20  # seconds
_SEED: Final = 1  # of the order in which things are measured


class BenchError(Exception):
    """Why something cannot be measured here: one sentence."""


@dataclass(frozen=True)
class Row:
    """One line of the table, and one element of bench.json."""

    name: str
    placement: str
    median: float
    min: float
    max: float
    unit: str
    against: str | None  #: what the reference is
    reference: float | None  #: its median, in the same unit
    ratio: float | None  #: how many times as good as the reference: 0.5 is half as fast, or twice as large
    target: str | None
    met: bool | None  #: None where there is no target


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    directory: Path  #: for mountpoints
    repetitions: int
    quick: bool
    only: str | None

    def wants(self, name: str) -> bool:
        """Return whether a group of rows is to be measured."""
        return self.only is None or self.only in name

    def count(self, number: int) -> int:
        """Return how many operations to do instead of `number`."""
        return max(1, number // 8) if self.quick else number


def measure(subjects: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, Sample]:
    """Call each subject in turn, `repetitions` times after a first time that does not count."""
    values: dict[str, list[float]] = {name: [] for name in subjects}
    lots = random.Random(_SEED)
    for repetition in range(repetitions + 1):
        for name in lots.sample(list(subjects), len(subjects)):
            value = subjects[name]()
            if repetition:
                values[name].append(value)
    return {name: Sample(samples) for name, samples in values.items()}


def compare(
    name: str,
    placement: str,
    sample: Sample,
    unit: str,
    against: str,
    reference: Sample,
    *,
    more_is_better: bool = False,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """Compare a sample with its reference. The target is a ratio of `at_least`, or no value above `at_most`."""
    ours, theirs = sample.median, reference.median
    ratio = ours / theirs if more_is_better else theirs / ours
    target, met = None, None
    if at_least is not None:
        target, met = f"ratio >= {at_least:g}", ratio >= at_least
    elif at_most is not None:
        target, met = f"max <= {at_most:g} {unit}", max(sample.values) <= at_most
    return Row(
        *(name, placement, ours, min(sample.values), max(sample.values), unit, against, theirs, ratio, target, met)
    )


def alone(name: str, placement: str, sample: Sample, unit: str) -> Row:
    """Return the row of a sample that has no reference."""
    values = sample.values
    return Row(name, placement, sample.median, min(values), max(values), unit, None, None, None, None, None)


# -- processes and mounts -------------------------------------------------------------------------------------------


def placements() -> dict[str, tuple[int, int]]:
    """Return where client and daemon can run, a CPU for each."""
    cpus = sorted(os.sched_getaffinity(0))
    both = {"same CPU": (cpus[0], cpus[0])}
    return both if len(cpus) == 1 else {**both, "different CPUs": (cpus[0], cpus[1])}


@functools.cache
def client() -> str:
    """Compile client.c and return the path. Raises BenchError."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise BenchError("there is no C compiler (cc), and in Python the client would be measured, not the filesystem")
    path = Path(tempfile.mkdtemp(prefix="memfs-bench-client-")) / "client"
    subprocess.run([compiler, "-O2", "-Wall", "-o", str(path), str(_HERE / "client.c")], check=True)
    return str(path)


def remove_client() -> None:
    """Remove what `client` has compiled."""
    if client.cache_info().currsize:
        shutil.rmtree(Path(client()).parent)


def work(what: str, directory: Path, count: int, cpu: int) -> float:
    """Run a workload in a client that is pinned to a CPU, and return its nanoseconds."""
    result = subprocess.run(
        [client(), what, str(directory), str(count)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
    )
    if result.returncode:
        raise BenchError(f"{what}: {result.stderr.strip()}")
    return float(result.stdout)


def pin(process: subprocess.Popen[str], cpu: int) -> None:
    """Have all threads of a process run on one CPU."""
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {cpu})


@contextlib.contextmanager
def helper(module: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a module of bench in a process of its own, which says that it is ready and ends with its standard input.

    Raises BenchError.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_HERE.parent,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            raise BenchError(f"{module} did not get ready")
        yield process
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@dataclass(frozen=True)
class Mounted:
    """A filesystem to measure, and the process that serves it, if one does."""

    path: Path
    process: subprocess.Popen[str] | None = None

    def pin(self, cpu: int) -> None:
        """Have all threads of the daemon run on one CPU."""
        if self.process is not None:
            pin(self.process, cpu)

    @property
    def memory(self) -> float:
        """Resident memory of the daemon in MiB, without the content of files."""
        assert self.process is not None
        fields = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            if ":" in line
        )
        return (int(fields["RssAnon"].split()[0]) + int(fields["RssFile"].split()[0])) / 1024


@contextlib.contextmanager
def tmpfs(run: Run, options: str) -> Iterator[Mounted]:
    """Mount a tmpfs. Raises BenchError where that cannot be."""
    with _mountpoint(run) as path:
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise BenchError(f"cannot mount a tmpfs to measure beside: {result.stderr.strip()}")
        yield Mounted(path)


@contextlib.contextmanager
def memfs(run: Run, options: str) -> Iterator[Mounted]:
    """Mount a memfs, in a process of its own."""
    with _mountpoint(run) as path:
        command = ["memfs", "mount", str(path), "-f", "-o", options, "--socket", f"{path}.sock"]
        with _served(command, path) as mounted:
            yield mounted


@contextlib.contextmanager
def plain(run: Run, *arguments: str) -> Iterator[Mounted]:
    """Mount the ordinary pyfuse3 filesystem of plain.py."""
    with _mountpoint(run) as path, _served(["bench.plain", str(path), *arguments], path) as mounted:
        yield mounted


@contextlib.contextmanager
def _mountpoint(run: Run) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir=run.directory))
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=False, capture_output=True)
        if os.path.ismount(path):
            subprocess.run(["umount", "--lazy", str(path)], check=False, capture_output=True)
        path.rmdir()


@contextlib.contextmanager
def _served(command: Sequence[str], path: Path) -> Iterator[Mounted]:
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=_HERE.parent
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        if not process.stdout.readline():
            raise BenchError(f"{command[0]}: {process.stderr.read().strip()}")
        yield Mounted(path, process)
    finally:
        if subprocess.run(["umount", str(path)], check=False, capture_output=True).returncode:
            process.terminate()  # it has not mounted yet, or somebody still uses the mount
        try:
            process.wait(_MOUNT_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()


def now() -> float:
    """Return the seconds of a clock that only goes forward."""
    return time.perf_counter()
