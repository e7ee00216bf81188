"""Measure, print one table, and write bench/out/bench.json.

    python -m bench [--only NAME] [--quick]

NAME is a module of this package with a function `rows(run)` that yields Rows, or part of the name of some rows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import bench
from bench.harness import BenchError, Row, Run, placements, remove_client

OUT = Path(__file__).parent / "out"


def _modules() -> dict[str, Callable[[Run], Iterator[Row]]]:
    """Return the functions that yield rows, by the names of their modules."""
    programs = ("__main__", "plot")  # and plot needs what measuring does not
    names = [module.name for module in pkgutil.iter_modules(bench.__path__) if module.name not in programs]
    modules = {name: importlib.import_module(f"bench.{name}") for name in names}
    return {name: module.rows for name, module in modules.items() if hasattr(module, "rows")}


def _conditions() -> list[str]:
    """Return under which conditions the numbers came about, as lines."""
    cpus = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
    where = "; ".join(
        f"{name}: client on {client}, daemon on {daemon}" for name, (client, daemon) in placements().items()
    )
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return [
        f"Linux {platform.release()}, {model}, Python {platform.python_version()}, CPUs {cpus}",
        f"Placements: {where}",
        "The client of filesystem rows is C (bench/client.c), so that no Python is in a loop that is measured.",
        "Rows in process measure kvmsim itself.",
        "Medians of interleaved repetitions; a ratio above 1 is better than the reference of the same run.",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _print(rows: list[Row], conditions: list[str]) -> None:
    table = Table(title="make bench", caption="\n".join(conditions), caption_justify="left")
    for heading in ("what", "placement"):
        table.add_column(heading)
    for heading in ("median", "min", "max"):
        table.add_column(heading, justify="right")
    table.add_column("unit")
    for heading in ("reference", "ratio"):
        table.add_column(heading, justify="right")
    for heading in ("against", "target", "met"):
        table.add_column(heading)
    for row in rows:
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.met]
        table.add_row(
            *(row.name, row.placement, _number(row.median), _number(row.min), _number(row.max), row.unit),
            *(_number(row.reference), _number(row.ratio), row.against or "", row.target or "", met),
        )
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def _clean_up_on_signals() -> None:
    """Have SIGINT, SIGTERM and SIGHUP unwind the stack as an exception does, so that nothing stays mounted.

    Only the first one does: those that follow must not interrupt the cleaning up. A signal that is ignored, as by
    nohup(1) or in the background of a script, stays ignored.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    process = os.getpid()

    def end(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != process:  # a child that has not yet, or never, executed a program: the stack is its parent's
            os._exit(128 + number)
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure memfs beside its references.")
    parser.add_argument("--only", metavar="NAME", help="a module of bench, or part of the name of some rows")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter repetitions: to see that it works")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("bench: mounts a tmpfs to measure beside, so it needs root")
    _clean_up_on_signals()
    modules = _modules()
    only = options.only
    if only in modules:
        modules, only = {only: modules[only]}, None
    rows: list[Row] = []
    console = Console(stderr=True, highlight=False)
    # Without a thread that would draw it while something is measured.
    progress = Progress(console=console, disable=not console.is_terminal, transient=True, auto_refresh=False)
    measuring = progress.add_task("", total=len(modules))
    with progress, tempfile.TemporaryDirectory(prefix="memfs-bench-") as directory:
        run = Run(Path(directory), repetitions=3 if options.quick else 7, quick=options.quick, only=only)
        failed = []
        try:
            for name, module in modules.items():
                progress.update(measuring, description=name, refresh=True)
                try:
                    for row in module(run):
                        progress.print(f"{row.name}, {row.placement}: {_number(row.median)} {row.unit}")
                        rows.append(row)
                except BenchError as error:  # what has been measured is worth having
                    failed.append(str(error))
                progress.advance(measuring)
        finally:
            remove_client()
    if not rows and not failed:
        sys.exit(f"bench: nothing is called {options.only}; modules are {', '.join(_modules())}")
    conditions = _conditions()
    _print(rows, conditions)
    OUT.mkdir(exist_ok=True)
    (OUT / "bench.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if failed:
        sys.exit("\n".join(f"bench: {error}" for error in failed))


if __name__ == "__main__":
    main()
