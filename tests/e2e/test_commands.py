"""What the command `memfs` says when it is used wrongly: one sentence, with the file in it and what to do."""

from __future__ import annotations

import pty
import subprocess
from pathlib import Path

import pytest

from .conftest import Memfs, memfs_command, run

#: what is said about files: empty, of 8 KiB, guest-sealed, and sealed against further seals
SAID = {
    "no seal": (("seal", "empty", "gest"), "unknown seal 'gest'; known are"),
    "guest seal of a file with content": (("seal", "content", "guest"), "content: it is not empty; the guest seal is"),
    "seal of a sealed one": (("seal", "closed", "write"), "closed: it is sealed against further seals"),
    "guest-sealed and half a page": (("create", "new", "--seals", "guest", "--size", "1"), "new: the size of a guest-"),
    "no space to create": (("create", "new", "--size", "1g", "--allocate"), "new: No space left"),
    "no space to allocate": (("allocate", "content", "--length", "1g"), "content: No space left"),
    "nothing of an empty one": (("allocate", "empty"), "empty: nothing to allocate: the file is empty; say how much"),
    "nothing past the end": (
        ("allocate", "content", "--offset", "9k"),
        "content: nothing to allocate: it ends",
    ),
    "nothing": (("allocate", "content", "--length", "0"), "content: nothing to allocate: --length is 0"),
    "populate with nothing": (("populate", "guest", "empty"), "empty: there is nothing in it to populate memory with"),
    "populate what is not sealed": (("populate", "content", "content"), "content: not guest-sealed"),
    "populate past the end": (("populate", "guest", "content"), "guest: past the end"),
    "populate with private memory": (("populate", "guest", "private"), "private: Operation not permitted"),
    "no mountpoint": (("mount", ""), "MOUNTPOINT is empty"),
    "no name": (("create", ""), "no name"),
    "no name in a directory": (("create", "new/"), "no name"),
    "seals of a directory": (("seals", "."), "user.memfs.default_seals"),
    "seal of a directory": (("seal", ".", "guest"), "user.memfs.default_seals"),
    "less than in use": (("remount", ".", "-o", "size=4k"), "size=4k is less than what is in use"),
    "log into nowhere": (("mount", ".", "--log-file", "/nonexistent/log"), "/nonexistent/log: No such file"),
}


@pytest.fixture
def files(memfs: Memfs) -> Memfs:
    """A memfs with one file of each kind."""
    (memfs.path / "empty").touch()
    (memfs.path / "content").write_bytes(bytes(8192))
    for name, seals in (("guest", "guest"), ("private", "guest"), ("closed", "seal")):
        assert memfs.run(*memfs_command("create", "--seals", seals, name)).returncode == 0
    return memfs


@pytest.mark.parametrize("name", SAID)
def test_what_is_wrong_is_said_in_a_sentence(files: Memfs, name: str) -> None:
    arguments, words = SAID[name]
    result = files.run(*memfs_command(*arguments))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("memfs: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert not (files.path / "new").exists()


def test_an_open_file_is_said_to_be_open(files: Memfs) -> None:
    with open(files.path / "empty", "rb"):
        result = files.run(*memfs_command("seal", "empty", "guest"))
    assert result.stderr.startswith("memfs: empty: it is open or mapped somewhere")


def test_no_image_is_expected_from_a_terminal(files: Memfs) -> None:
    terminal, tty = pty.openpty()
    with open(terminal, "rb"), open(tty, "rb") as stdin:
        result = files.run(*memfs_command("populate", "guest"), stdin=stdin)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "SOURCE" in result.stderr


def test_nobody_who_reads_on_is_no_error(files: Memfs) -> None:
    with subprocess.Popen(
        memfs_command("stat", files.path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_missing_mountpoint_is_said(tmp_path: Path) -> None:
    result = run(*memfs_command("stat", tmp_path / "missing"))
    assert (result.returncode, result.stderr) == (1, f"memfs: {tmp_path / 'missing'}: No such file or directory\n")
