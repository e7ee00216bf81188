"""`memfs map`: which pages of a file there are, as a picture in the terminal, or as PNG or SVG."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from memfs.cli.arguments import size
from memfs.cli.command import CommandError, Commands
from memfs.cli.replacing import replace
from memfs.cli.timed_call import TimedCall
from memfs.cli.watch.memory import PAUSE, GuestMemory
from memfs.contract.picture import Picture, check_format
from memfs.contract.terminal import printable
from memfs.contract.units import ByteOffset, PageRange

_INTERVAL = 0.5  # seconds


def add_to(commands: Commands) -> None:
    """Add the command to those of `memfs`."""
    parser = commands.add_parser("map", help="show which pages of a file there are", description=_run.__doc__)
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="a file, or the ordinary and the guest-sealed file of one guest"
    )
    parser.add_argument("--offset", metavar="SIZE", type=size, default=0, help="where to begin (default 0)")
    parser.add_argument("--length", metavar="SIZE", type=size, help="how much to show (default: to the end)")
    parser.add_argument("--follow", action="store_true", help="go on to show it as it changes, until a signal")
    parser.add_argument("--output", metavar="FILE", type=_output, help="write a picture, .png or .svg, instead")
    parser.set_defaults(run=_run)


def _output(text: str) -> str:
    try:
        return check_format(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _run(arguments: argparse.Namespace) -> None:
    """Show which pages of guest memory are private, shared or absent, which are locked, and which make up huge pages.

    It takes permission to read and write the files. Pages of an ordinary file that were allocated and never written
    count as absent.
    """
    if len(arguments.files) > 2:
        raise CommandError("map: one file, or two of one guest")
    if arguments.length == 0:
        raise CommandError("map: --length is 0")
    window = None
    if arguments.offset or arguments.length is not None:
        window = PageRange.covering(ByteOffset(arguments.offset), arguments.length or (1 << 62) - arguments.offset)
    memory = GuestMemory(arguments.files, window)
    title = " and ".join(arguments.files)
    if not arguments.follow:
        picture = TimedCall(title, memory.look_at_all).call().picture()
        if arguments.output is not None:
            replace(arguments.output, picture.file(title, arguments.output))
        else:
            console = _console()
            console.print(_text(picture, console), soft_wrap=True)
    elif arguments.output is not None:
        for picture in _changes(memory, title):
            replace(arguments.output, picture.file(title, arguments.output))
    else:
        _follow(memory, title)


def _changes(memory: GuestMemory, title: str) -> Iterator[Picture]:
    """Generate pictures, each as soon as it is another one than before."""
    look = TimedCall(title, memory.look)
    shown: bytes | None = None
    while True:
        known, is_all = look.call()
        picture = known.picture()
        now = picture.cells.tobytes() + picture.summary.encode()
        if now != shown:
            yield picture
        shown = now
        time.sleep(_INTERVAL if is_all else PAUSE)


def _follow(memory: GuestMemory, title: str) -> None:
    console = _console()
    if not console.is_terminal:
        for picture in _changes(memory, title):
            console.print(_text(picture, console), soft_wrap=True)
            sys.stdout.flush()
        return
    with Live(console=console, auto_refresh=False) as live:
        for picture in _changes(memory, title):
            live.update(Text(printable(title) + "\n").append_text(_text(picture, console)), refresh=True)


def _console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)


def _text(picture: Picture, console: Console) -> Text:
    lines = picture.lines(ascii_only=console.options.ascii_only)
    return Text("\n").join(Text.assemble(*line) for line in lines)
