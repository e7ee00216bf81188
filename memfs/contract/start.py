"""Where the commands start: before anything is imported that takes time.

Until a command can answer Ctrl-C itself, SIGINT does what it does to programs by default, which is to end them; Python
would print where the import was interrupted. Where SIGINT is ignored, it stays so.
"""

from __future__ import annotations

import importlib
import signal


def memfs() -> None:
    """Run the command `memfs`."""
    start("memfs.cli.main")


def kvmsim() -> None:
    """Run the command `kvmsim`."""
    start("kvmsim.cli")


def mount_helper() -> None:
    """Run the program `mount.fuse.memfs`."""
    start("memfs.cli.mount_helper")


def start(module: str) -> None:
    """Import a module and call its `main`."""
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = importlib.import_module(module).main
    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
