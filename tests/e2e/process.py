"""Starting an actor.py as somebody and having it do things, and mounting a memfs and a tmpfs for it to do them on."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from .conftest import run, start_memfs

#: uid, gid and further groups of those who act
USERS = {"root": (0, 0), "alice": (12001, 12001, 13000), "bob": (12002, 12002)}
_HEADER = struct.Struct("=I")


class Process:
    """An actor.py, started as somebody."""

    def __init__(self, uid: int, *groups: int) -> None:
        self._command = [sys.executable, "-I", str(Path(__file__).with_name("actor.py")), *map(str, (uid, *groups))]
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")

    def revive(self) -> None:
        """Start it again if it has died: what killed it is looked for by doing it again."""
        if self._process.poll() is not None:
            self.end()
            self._start()

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
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


@contextlib.contextmanager
def mounted_alike(options: str, mode: str, expected: Sequence[str] = ()) -> Iterator[tuple[Path, Path]]:
    """A memfs, with one option of its own, and a tmpfs. Both where all users get to, unlike pytest's.

    `expected` are parts of lines that may be in its log.
    """
    if os.geteuid() != 0:
        pytest.skip("mounts a tmpfs and acts as several users, so it needs root")
    with tempfile.TemporaryDirectory(prefix="memfs-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        beside = directory / "tmpfs"
        beside.mkdir()
        mounted = run("mount", "-t", "tmpfs", "-o", options, "tmpfs", beside)
        if mounted.returncode:
            pytest.skip(f"cannot mount a tmpfs to compare with: {mounted.stderr.strip()}")
        try:
            memfs = start_memfs(directory, f"{options},allow_other,suid,dev,{mode}")
            memfs.expected.extend(expected)
            try:
                yield memfs.path, beside
                memfs.stop()
            finally:
                memfs.kill()
        finally:
            run("umount", "--lazy", beside)
