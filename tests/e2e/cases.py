"""What a case of test_completeness.py is, and what cases do it with."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .conftest import run
from .process import USERS, Process
from .tools import skip_without, tools_in

PAGE = 4096
SIZE = 16 << 20  # of both filesystems, in bytes

Case = Callable[[Path], Any]
CASES: dict[str, Case] = {}

libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
libc.opendir.argtypes = [ctypes.c_char_p]
libc.readdir.argtypes = libc.telldir.argtypes = libc.closedir.argtypes = [ctypes.c_void_p]
libc.telldir.restype = ctypes.c_long
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


@contextlib.contextmanager
def users(directory: Path) -> Iterator[dict[str, Process]]:
    """root, alice and bob at work in a directory."""
    processes = {name: Process(*ids) for name, ids in USERS.items()}
    try:
        for process in processes.values():
            assert process("begin", str(directory)) == ("returned", None)
        yield processes
    finally:
        for process in processes.values():
            process.end()


def attempt(call: Callable[..., Any], *arguments: object) -> Any:
    """Return what a call returns, or the name of its errno."""
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def child(script: str, directory: Path) -> tuple[int, str]:
    """A Python program's end (negative: the signal) and words."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=directory, capture_output=True, text=True, check=False, timeout=60
    )
    return result.returncode, result.stdout + result.stderr


def shell(script: str, directory: Path) -> tuple[str, str, int]:
    """Return what a shell script prints and its exit code. Skips where a program that it calls is missing."""
    skip_without(*tools_in(script))
    environment = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    result = run("bash", "-c", script, cwd=directory, env=environment)
    return result.stdout, result.stderr.replace(str(directory), "."), result.returncode
