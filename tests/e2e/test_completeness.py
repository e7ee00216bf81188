"""What a tmpfs can do that a state machine of single calls cannot show: locks, notification, mappings, ACLs, limits.

A case is a function that does something in an empty directory and returns what came out. It runs on memfs, with
passthrough and without, and on a tmpfs mounted beside it with the same options; the test is that nothing differs. What
must differ, and why, is in `DIFFERENT`; a difference that goes away fails there, so that the list stays true.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import cases_of_files, cases_of_names  # noqa: F401 - they add their cases
from .cases import CASES, SIZE
from .process import mounted_alike

OPTIONS = f"size={SIZE},nr_inodes=5000,mode=755"
MODES = ("passthrough=auto", "passthrough=off")

#: case, or (case, mode): why it cannot be as on a tmpfs
DIFFERENT: dict[str | tuple[str, str], str] = {
    "bmap": "the kernel's FUSE has FIBMAP and answers 0; tmpfs has not",
    "chown_to_nobody": "the kernel sends what it sends for a write, so setuid is dropped; tmpfs refuses with EPERM",
    "pipe_times": "the kernel tells no FUSE server that something went through a pipe",
    "epoll": "the kernel's FUSE can poll, so that epoll takes a regular file; tmpfs refuses it with EPERM",
    ("sigbus_when_full", "passthrough=off"): "the page cache takes what is written to a mapping and has no limit",
    ("page_tail_is_zero", "passthrough=off"): "FUSE zeroes what a mapping wrote past the end, tmpfs keeps it",
}


@pytest.fixture(scope="module", params=MODES)
def pair(request: pytest.FixtureRequest, can_mount: None) -> Iterator[tuple[str, Path, Path]]:
    """The mode, a memfs mounted in it, and a tmpfs mounted alike."""
    with mounted_alike(OPTIONS, request.param) as (ours, theirs):
        yield request.param, ours, theirs


@pytest.mark.parametrize("name", sorted(CASES))
def test_as_on_tmpfs(pair: tuple[str, Path, Path], name: str, request: pytest.FixtureRequest) -> None:
    mode, ours, theirs = pair
    reason = DIFFERENT.get(name) or DIFFERENT.get((name, mode))
    if reason:
        request.node.add_marker(pytest.mark.xfail(strict=True, reason=reason))
    answers = []
    for root in (ours, theirs):
        directory = root / name.replace(" ", "-")
        directory.mkdir()
        directory.chmod(0o777)
        try:
            answers.append(CASES[name](directory))
        finally:
            subprocess.run(["rm", "-rf", "--", directory], check=False)
    assert answers[0] == answers[1]
