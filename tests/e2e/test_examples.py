"""The programs in examples/ do what they say, on a mounted memfs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from .conftest import Memfs, interruptible, memfs_command, run

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_vmm(memfs: Memfs) -> None:
    result = run(sys.executable, EXAMPLES / "vmm.py", memfs.path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "'hello, host'" in result.stdout
    assert "1 to private, 1 to shared" in result.stdout


def test_owner(memfs: Memfs) -> None:
    path = memfs.path / "private"
    path.touch()
    command = [sys.executable, "-u", str(EXAMPLES / "owner.py"), str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    ) as owner:
        assert owner.stdout is not None
        assert owner.stderr is not None
        assert owner.stdout.readline() == f"owner of inode {path.stat().st_ino}, 0 bytes\n"
        memfs.run("fallocate", "--length", "64K", path)
        memfs.run("fallocate", "--punch-hole", "--length", "8K", path)
        unmounted = run(*memfs_command("umount", memfs.path))
        assert (unmounted.returncode, f"(pid {owner.pid})" in unmounted.stderr) == (1, True)
        owner.send_signal(signal.SIGINT)
        assert [line.split()[0] for line in owner.stdout] == ["Fallocate", "InvalidateBegin", "InvalidateEnd"]
        assert owner.stderr.read() == ""
    assert owner.returncode == 130


def test_vmm_without_memfs_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    result = run(sys.executable, EXAMPLES / "vmm.py", tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "does not lie on a memfs" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_owner_without_memfs_says_why(tmp_path: Path) -> None:
    result = run(sys.executable, EXAMPLES / "owner.py", tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
