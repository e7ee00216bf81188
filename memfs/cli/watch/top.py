"""`memfs top`: what memfs's do, on all of a terminal; one snapshot where there is none."""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import suppress

from rich.console import Console
from rich.live import Live

from memfs.cli.command import Commands
from memfs.cli.watch.keys import pressed, unbuffered
from memfs.cli.watch.sample import Watcher
from memfs.cli.watch.screen import Screen


def add_to(commands: Commands) -> None:
    """Add the command to those of `memfs`."""
    parser = commands.add_parser("top", help="show what memfs's do", description=_run.__doc__)
    parser.add_argument("path", metavar="PATH", nargs="*", help="mountpoints (default: all memfs's that are mounted)")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_seconds, default=1.0, help="between two looks, from 0.1 on (default 1)"
    )
    parser.set_defaults(run=_run)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text}: not a number of seconds from 0.1 to 3600")
    return seconds


def _run(arguments: argparse.Namespace) -> None:
    """Show mounts, owners and their files, conversions a second, and which notifications are pending for how long.

    Root and who mounted a memfs see all of its owners, others their own. Without a terminal it prints one snapshot.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    watcher, screen = Watcher(arguments.path), Screen()
    if not console.is_terminal or not sys.stdin.isatty():
        console.print(screen.render(watcher.look(), (), height=None, clock=""))
        return
    with suppress(EOFError), unbuffered(), Live(console=console, screen=True, auto_refresh=False) as live:
        _show(live, console, watcher, screen, arguments.interval)


def _show(live: Live, console: Console, watcher: Watcher, screen: Screen, interval: float) -> None:
    before = samples = watcher.look()
    due = time.monotonic() + interval
    while not screen.has_ended:
        view = screen.render(samples, before, height=console.size.height, clock=time.strftime("%H:%M:%S"))
        live.update(view, refresh=True)
        for key in pressed(due - time.monotonic()):
            screen.press(key)
        if time.monotonic() >= due:
            if not screen.paused:
                before, samples = samples, watcher.look()
            due = time.monotonic() + interval
