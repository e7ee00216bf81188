"""Whatever others named, no escape sequence in it reaches the terminal of who runs a command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvmsim.engines.trace_file import RECORD, Trace

from .conftest import Memfs, memfs_command

KVMSIM = [sys.executable, "-m", "kvmsim"]
NAMES = [b"\x1b]0;x\x07", b"\x9b31m", "\u009b31m".encode(), "\u202eexe".encode(), b"a\nb", b"\r\x08"]


def shown(*command: str | bytes | Path, cwd: Path) -> tuple[int, bytes]:
    """Return the exit code of a command and all that it printed; nothing in it may be for a terminal to obey."""
    result = subprocess.run([os.fsencode(part) for part in command], cwd=cwd, capture_output=True, check=False)
    said = result.stdout + result.stderr
    text = said.decode()  # so it is UTF-8
    assert all(character.isprintable() or character == "\n" for character in text), said
    return result.returncode, said


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files(memfs: Memfs, name: bytes, tmp_path: Path) -> None:
    """They come from directories of others by way of a shell: `memfs seals *`."""
    for place in (memfs.path, tmp_path):
        for command in ("seals", "stat", "allocate", "populate", "create"):
            code, said = shown(*memfs_command(command), b"missing/" + name, cwd=place)
            assert code == 1
            assert said.count(b"\n") == 1
        code, _ = shown(*memfs_command("seals"), b"file", name, cwd=place)
        assert code == 2
        code, said = shown(*KVMSIM, "run", "--shared", b"missing/" + name, "--private", name, "--mem", "4M", cwd=place)
        assert (code, said.count(b"\n")) == (1, 1)
        code, said = shown(*KVMSIM, "info", b"missing/" + name, cwd=place)
        assert (code, said.count(b"\n")) == (1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_trace_says(name: bytes, tmp_path: Path) -> None:
    records = np.zeros(1, RECORD)
    records["size"] = 1
    Trace(records, os.fsdecode(name).encode("utf-8", "replace").decode()).save(tmp_path / "trace.npz")
    code, said = shown(*KVMSIM, "info", "trace.npz", cwd=tmp_path)
    assert (code, said.count(b"\n")) == (0, 3)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_mount_is_called(tmp_path: Path, name: bytes) -> None:
    code, said = shown(*memfs_command("mount"), b"missing/" + name, cwd=tmp_path)
    assert (code, said.count(b"\n")) == (1, 1)
