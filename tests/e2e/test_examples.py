"""The programs in examples/ do what they say, on a mounted memfs."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Memfs, interruptible, memfs_command, run, stat_json
from .service import Service, service

__all__ = ["service"]

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_vmm(memfs: Memfs) -> None:
    result = run(sys.executable, EXAMPLES / "vmm.py", memfs.path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "'hello, host'" in result.stdout
    assert "1 to private, 1 to shared" in result.stdout


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc)")
def test_vmm_in_c(memfs: Memfs, service: Service, tmp_path: Path) -> None:
    program = tmp_path / "vmm"
    compiled = run("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, EXAMPLES / "vmm.c")
    assert compiled.returncode == 0, compiled.stderr
    result = run(program, service.path, memfs.path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "the guest wants 4096 bytes at gpa 0x3000 private",
        "the guest wants 4096 bytes at gpa 0x3000 shared",
        "the guest loads from a device at gpa 0x100000",
        "the guest wants 4096 bytes at gpa 0x3000 private",
        "the guest halts",
        "it loaded 0x5ec2e7, then 0, 0x2a and 0",
        "what is private, its VMM cannot read: Operation not permitted",
    ]
    for arguments, why in (
        (("/nowhere", memfs.path), "/nowhere: No such file or directory\n"),
        ((service.path, tmp_path), "Operation not supported\n"),
    ):
        result = run(program, *arguments)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("vmm: ")
        assert result.stderr.endswith(why)


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


@pytest.fixture(scope="module")
def owner_in_c(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    program = tmp_path_factory.mktemp("owner") / "owner"
    built = run(compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, EXAMPLES / "owner.c")
    assert (built.returncode, built.stderr) == (0, "")
    return program


def test_owner_in_c(memfs: Memfs, owner_in_c: Path) -> None:
    assert len((EXAMPLES / "owner.c").read_text().splitlines()) <= 150
    shared, private = memfs.path / "shared", memfs.path / "private"
    memfs.run("truncate", "--size", "64K", shared)
    run(*memfs_command("create", "--seals", "guest", "--size", "64k", private))
    with subprocess.Popen([owner_in_c, private], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stderr is not None
        assert owner.stdout.readline() == f"owner of inode {private.stat().st_ino}, 65536 bytes\n"
        memfs.run("fallocate", "--length", "64K", private)
        memfs.run("fallocate", "--punch-hole", "--offset", "4K", "--length", "8K", private)
        told = ["allocated 0-15", "invalidate 1-2", "freed 1-2"]
        if stat_json(memfs.path)["passthrough"]:
            command = memfs_command("convert", "--to", "shared", shared, private, "0:4k", "16k:8k")
            assert run(*command).returncode == 0
            told += ["convert 0-0 4-5", "converted 0-0 4-5"]
        memfs.process.terminate()
        assert [line.rstrip("\n") for line in owner.stdout] == told
        assert owner.stderr.read() == "owner: cut off: memfs has ended\n"
    assert owner.returncode == 1
    memfs.see_end()


def test_owner_in_c_without_memfs_says_why(tmp_path: Path, owner_in_c: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, words in (([], "usage: "), (["absent"], "absent: "), (["file"], "does not lie on a memfs")):
        result = run(owner_in_c, *arguments, cwd=tmp_path)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert words in result.stderr


def test_vmm_without_memfs_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    result = run(sys.executable, EXAMPLES / "vmm.py", tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "does not lie on a memfs" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_owner_without_memfs_says_why(tmp_path: Path) -> None:
    result = run(sys.executable, EXAMPLES / "owner.py", tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
