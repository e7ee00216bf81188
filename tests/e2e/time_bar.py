"""How much of the time of a soak is over, on a terminal; nothing elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def time_bar(seconds: float) -> Iterator[Callable[[str], None]]:
    """Show a bar within a with statement; yields a function to call with what is being done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task, started = progress.add_task("", total=seconds), time.monotonic()
        yield lambda what: progress.update(task, description=what, completed=time.monotonic() - started)
