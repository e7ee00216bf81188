"""A memory cgroup whose limit is below size= is said at mount, by stat, and by remount."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.contract.sys.mountinfo import mounts_of_type

from .conftest import STOP_TIMEOUT, MountMemfs, memfs_command, run, stat_json

LIMIT = 256 << 20
JOINS = ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"']
#: Of both versions: the file with the limit
NAMES = {"cgroup": "memory.limit_in_bytes", "cgroup2": "memory.max"}


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Path]:
    """A cgroup below one with a limit of 256 MiB. What is mounted within it must be unmounted first."""
    tops = [
        (Path(mount.mountpoint), name)
        for kind, name in NAMES.items()
        for mount in mounts_of_type(kind)
        if list(Path(mount.mountpoint).glob(f"*/{name}"))
    ]
    if not tops:
        pytest.skip("no cgroups with the memory controller")
    top, name = tops[0]
    parent = top / f"memfs-test-{os.getpid()}"
    child = parent / "child"
    try:
        parent.mkdir()
        if name == "memory.max":
            (parent / "cgroup.subtree_control").write_text("+memory")
        child.mkdir()
        (parent / name).write_text(str(LIMIT))
    except OSError as error:
        pytest.skip(f"no cgroup of our own: {error}")
    try:
        yield child
    finally:
        deadline = time.monotonic() + STOP_TIMEOUT
        while (child / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.02)  # a process that was killed leaves it a moment later
        for each in (child, parent):
            each.rmdir()


@pytest.mark.parametrize("way", ["passthrough=auto", "backing=memfd"])
def test_limit_below_the_size_is_said(limited: Path, mount_memfs: MountMemfs, way: str) -> None:
    memfs = mount_memfs(f"size=300m,{way}", within=[*JOINS, str(limited)])
    assert f"the memory cgroup of memfs allows {LIMIT} bytes, and files may take {300 << 20}" in memfs.notes
    assert stat_json(memfs.path)["memory_limit"] == LIMIT
    lines = run(*memfs_command("stat", memfs.path)).stdout.splitlines()
    assert ["memory", "limit", str(LIMIT)] in [line.split() for line in lines]


def test_limit_above_the_size_is_no_word_worth(limited: Path, mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m", within=[*JOINS, str(limited)])
    assert "cgroup" not in memfs.notes
    enough = run(*memfs_command("remount", memfs.path, "-o", "size=128m"))
    assert (enough.returncode, enough.stderr) == (0, "")
    too_much = run(*memfs_command("remount", memfs.path, "-o", "size=1g"))
    assert too_much.returncode == 0
    assert f"allows {LIMIT} bytes, and files may take {1 << 30}" in too_much.stderr


def test_limit_is_the_one_that_is_there_now(limited: Path, mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m", within=[*JOINS, str(limited)])
    name = next(name for name in NAMES.values() if (limited / name).exists())
    (limited / name).write_text(str(200 << 20))
    assert stat_json(memfs.path)["memory_limit"] == 200 << 20
