"""What a memfs inherits from whoever mounts it is not kept until it is unmounted, and does not change what it is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import memfs_command, run
from .tools import mount_namespace, skip_without_mount_namespace


@contextmanager
def mounted_by(directory: Path, script: str, *options: str) -> Iterator[tuple[Path, subprocess.CompletedProcess[str]]]:
    """Have a shell script mount a memfs, with `"$@"` for the command."""
    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    (directory / "run").mkdir(mode=0o755, exist_ok=True)
    command = memfs_command("mount", mountpoint, "--socket", directory / "run" / "socket", "-o", "size=4m", *options)
    try:
        yield mountpoint, run("sh", "-c", script, "sh", *command, cwd=directory)
    finally:
        run("umount", "--lazy", mountpoint)


def daemon_of(mountpoint: Path) -> int:
    """Return the process that serves a mount."""
    return int(run("pgrep", "-f", f"memfs mount {mountpoint}").stdout.split()[0])


def test_lock_of_who_mounts_ends_with_the_command(can_mount: None, tmp_path: Path) -> None:
    with mounted_by(tmp_path, 'flock lock "$@" && flock --nonblock lock echo free') as (_, result):
        assert result.stdout == "free\n", result.stderr


def test_pipe_of_who_mounts_ends_with_the_command(can_mount: None, tmp_path: Path) -> None:
    """Otherwise `cat` would wait until the memfs is unmounted."""
    with mounted_by(tmp_path, '{ "$@" 3>&1 5>&1 9>&1; echo "$?"; } | cat') as (mountpoint, result):
        assert result.stdout == "0\n", result.stderr
        (mountpoint / "file").write_text("content")


@pytest.mark.parametrize("foreground", [False, True])
def test_nothing_of_who_mounts_is_open_in_the_daemon(can_mount: None, tmp_path: Path, foreground: bool) -> None:
    (tmp_path / "theirs").mkdir()
    script = 'cd theirs && exec 3<. 7>file 9>file && "$@"'
    if foreground:
        script = script.replace(
            '"$@"', '{ "$@" -f & } >../out 2>../err && until grep -s mounted ../out; do sleep 0.1; done'
        )
    with mounted_by(tmp_path, script) as (mountpoint, result):
        assert result.returncode == 0, result.stderr
        process = Path(f"/proc/{daemon_of(mountpoint)}")
        held = {os.readlink(process / "fd" / fd) for fd in os.listdir(process / "fd")} | {os.readlink(process / "cwd")}
        assert not [path for path in held if path.startswith(str(tmp_path / "theirs"))]


def test_umask_of_who_mounts_is_theirs(can_mount: None, tmp_path: Path) -> None:
    with mounted_by(tmp_path, 'umask 777; "$@"') as (mountpoint, result):
        assert result.returncode == 0, result.stderr
        (mountpoint / "file").write_text("content")
        assert (mountpoint / "file").stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_run_directory_is_for_all_whatever_the_umask(can_mount: None, tmp_path: Path) -> None:
    """In a mount namespace with an empty /run, so that the directory is made, and is nobody else's."""
    if os.geteuid():
        pytest.skip("needs root")
    skip_without_mount_namespace()
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    script = """mount -t tmpfs tmpfs /run; umask 777; "$@" && stat --format %a /run/memfs; umount "$0" """
    command = memfs_command("mount", mountpoint, "-o", "size=4m")
    result = run(*mount_namespace(tmp_path), "sh", "-c", script, mountpoint, *command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "755"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_limit_of_file_sizes_that_can_be_raised_is_raised(can_mount: None, tmp_path: Path) -> None:
    with mounted_by(tmp_path, 'ulimit -S -f 16; "$@"') as (mountpoint, result):
        assert result.returncode == 0, result.stderr
        (mountpoint / "file").write_bytes(bytes(1 << 20))
        assert run("fallocate", "-l", "2M", mountpoint / "file").returncode == 0


def test_limit_of_file_sizes_that_stays_is_refused(can_mount: None, tmp_path: Path) -> None:
    with mounted_by(tmp_path, 'ulimit -f 16; "$@"') as (mountpoint, result):
        if result.returncode == 0:  # a root that may raise it
            assert run("fallocate", "-l", "2M", mountpoint / "file").returncode == 0
        else:
            assert "ulimit -f" in result.stderr
            assert result.stderr.count("\n") == 1
            assert not os.path.ismount(mountpoint)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("foreground", [False, True])
def test_without_standard_descriptors(can_mount: None, tmp_path: Path, closed: str, foreground: bool) -> None:
    script = f'"$@" {closed}'
    if foreground:
        script = f'{{ "$@" -f & }} >out 2>err {closed}; until mountpoint -q mnt; do sleep 0.1; done'
    with mounted_by(tmp_path, script) as (mountpoint, result):
        assert result.returncode == 0, result.stderr
        assert os.path.ismount(mountpoint)
        (mountpoint / "file").write_text("content")
        assert (mountpoint / "file").read_text() == "content"


def test_signals_that_who_mounts_has_blocked(can_mount: None, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); "
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    with mounted_by(tmp_path, f"exec python3 -c '{script}' \"$@\"") as (mountpoint, result):
        assert result.returncode == 0, result.stderr
        status = Path(f"/proc/{daemon_of(mountpoint)}/status").read_text()
        assert int(status.split("SigBlk:")[1].split()[0], 16) == 0
