"""What it costs an unmodified Linux program to run in sealed memory (`kvmsim exec`), beside itself on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.harness import BenchError, Row, Run, compare, measure, memfs
from kvmsim.engines.native import EngineUnavailable, choose

_SIZE: Final = 16 << 20  # bytes that are sorted
_MEMORY: Final = "64m"
_SOURCE: Final = Path(__file__).parent / "sort.c"


def rows(run: Run) -> Iterator[Row]:
    """Sort 16 MiB in private memory."""
    if not run.wants("exec"):
        return
    try:
        choose("kvm")
    except EngineUnavailable as error:
        raise BenchError(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="memfs-bench-sort-") as directory, memfs(run, "size=128m") as mounted:
        program = _compile(Path(directory))
        shared, private = mounted.path / "shared", mounted.path / "private"
        shared.touch()
        os.close(os.open(private, os.O_CREAT | os.O_RDWR, 0o600))
        os.setxattr(private, "user.memfs.seals", b"guest")
        kvmsim: list[str | Path] = [
            sys.executable,
            "-m",
            "kvmsim",
            "exec",
            "--shared",
            shared,
            "--private",
            private,
            "--mem",
            _MEMORY,
        ]
        size = str(run.count(_SIZE))

        def seconds(*before: str | Path) -> float:
            result = subprocess.run([*before, program, size], capture_output=True, text=True, check=False)
            if result.returncode:
                raise BenchError(f"sort: {result.stderr.strip()}")
            return float(result.stdout) * 1e3

        found = measure({"inside": lambda: seconds(*kvmsim, "--engine", "kvm"), "outside": seconds}, run.repetitions)
    name = f"exec: heap sort of {run.count(_SIZE) >> 20} MiB in private memory"
    yield compare(
        name, "in process", found["inside"], "ms", "the same program natively", found["outside"], at_least=1 / 1.5
    )


def _compile(directory: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        raise BenchError("there is no C compiler (cc) for the program that is run")
    program = directory / "sort"
    subprocess.run([compiler, "-O2", "-Wall", "-static", "-o", program, _SOURCE], check=True)
    return program
