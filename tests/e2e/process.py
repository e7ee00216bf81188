"""Starting an actor.py as somebody, and having it do things."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

#: uid, gid and further groups of those who act
USERS = {"root": (0, 0), "alice": (12001, 12001, 13000), "bob": (12002, 12002)}
_HEADER = struct.Struct("=I")


class Process:
    """An actor.py, started as somebody."""

    def __init__(self, uid: int, *groups: int) -> None:
        command = [sys.executable, "-I", str(Path(__file__).with_name("actor.py")), *map(str, (uid, *groups))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")

    def __call__(self, name: str, *arguments: object) -> tuple[str, Any]:
        """Have an operation done. ("returned", what) or ("failed", errno's name)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = pickle.dumps((name, arguments))
        self._process.stdin.write(_HEADER.pack(len(request)) + request)
        self._process.stdin.flush()
        size = self._process.stdout.read(_HEADER.size)
        assert size, f"the process that did {name}{arguments} died with {self._process.wait()}"
        answer: tuple[str, Any] = pickle.loads(self._process.stdout.read(_HEADER.unpack(size)[0]))
        return answer

    def end(self) -> None:
        """It ends when nobody asks any more."""
        self._process.communicate()
