"""`memfs doctor` says what a mount says, and what is missing where something is."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from memfs.contract.sys.mountinfo import MEMFS, mountpoints_of_type

from .conftest import Memfs, memfs_command, run, stat_json
from .tools import skip_without_mount_namespace


def findings(text: str) -> dict[str, str]:
    """Return by its name whether something is there."""
    return {line[5:].split("  ")[0].strip(): line[:3].strip() for line in text.splitlines()}


def test_what_it_finds_is_what_a_mount_says(memfs: Memfs) -> None:
    result = run(*memfs_command("doctor"))
    assert (result.returncode, result.stderr) == (0, "")
    found, said = findings(result.stdout), stat_json(memfs.path)
    assert (found["/dev/fuse"], found["mount"]) == ("yes", "yes")
    assert found["passthrough"] == ("yes" if said["passthrough"] else "no")
    assert found["private pages stay"] == ("no" if said["guest_swappable"] else "yes")
    assert not [path for path in mountpoints_of_type(MEMFS) if "memfs-doctor-" in path]
    assert not list(Path(tempfile.gettempdir()).glob("memfs-doctor-*/mnt"))


def test_without_dev_fuse_it_says_what_to_do(can_mount: None) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    skip_without_mount_namespace()
    script = 'mount --bind /dev/null /dev/fuse && shift && exec "$@"'
    result = run("unshare", "--mount", "sh", "-c", script, "sh", "", *memfs_command("doctor"))
    assert result.returncode == 1
    assert findings(result.stdout)["mount"] == "NO"
