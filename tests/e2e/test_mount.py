"""How a memfs begins and ends: in the background or not, by umount or signal, and what it says when it cannot."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers import raises, until

from .conftest import Memfs, MountMemfs, memfs_command, run, stat_json
from .tools import mount_namespace, skip_without, skip_without_mount_namespace


@contextmanager
def daemon(directory: Path, *options: str) -> Iterator[tuple[Path, subprocess.CompletedProcess[str]]]:
    """A memfs mounted the ordinary way, in the background."""
    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    try:
        yield mountpoint, run(*memfs_command("mount", mountpoint, *options))
    finally:
        run("umount", "--lazy", mountpoint)


def test_mount_answers_when_the_command_returns(can_mount: None, tmp_path: Path) -> None:
    with daemon(tmp_path, "-o", "size=1m") as (mountpoint, result):
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        (mountpoint / "file").write_bytes(b"x")
        path = Path(os.getxattr(mountpoint / "file", "user.memfs.socket").decode())
        assert path.is_socket()
        assert path.stat().st_mode & 0o777 == 0o600
        subprocess.run(["umount", mountpoint], check=True)
        until(lambda: not path.exists())


def test_mount_shows_no_path_for_a_source(memfs: Memfs, tmp_path: Path) -> None:
    """mount(8) takes a source for a path where there is one of that name, such as memfs in a clone of this project."""
    (tmp_path / "memfs").mkdir()
    assert f"none on {memfs.path} type fuse.memfs " in run("mount", cwd=tmp_path).stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_unmounts(memfs: Memfs, number: signal.Signals) -> None:
    (memfs.path / "file").write_bytes(b"x" * 100000)
    memfs.process.send_signal(number)
    memfs.see_end()


def test_sigint_unmounts_also_where_it_is_started_in_the_background_of_a_script(
    mount_memfs: MountMemfs,
) -> None:
    """A shell starts such a program with SIGINT ignored. A daemon that was sent one is meant all the same."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        memfs = mount_memfs()
    finally:
        signal.signal(signal.SIGINT, before)
    memfs.process.send_signal(signal.SIGINT)
    memfs.see_end()


def test_signal_ends_it_also_when_the_mount_is_in_use(memfs: Memfs) -> None:
    fd = os.open(memfs.path / "file", os.O_CREAT | os.O_RDWR)
    try:
        os.write(fd, b"x")
        memfs.process.send_signal(signal.SIGTERM)
        memfs.see_end()
        with raises(errno.ENOTCONN):
            os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    finally:
        with suppress(OSError):  # the same again: close(2) asks memfs to flush
            os.close(fd)


def test_umount_of_a_busy_mount_is_refused(memfs: Memfs) -> None:
    with (memfs.path / "file").open("wb"):
        assert run("umount", memfs.path).returncode != 0
        assert memfs.run("ls").stdout == "file\n"


REFUSED = {
    "unknown option": ("-o", "size=1m,nonsense=3"),
    "unknown flag": ("-o", "nonsense"),
    "no value": ("-o", "size"),
    "a value for a flag": ("-o", "allow_other=1"),
    "not a size": ("-o", "size=big"),
    "not a mode": ("-o", "mode=999"),
    "no such user": ("-o", "uid=nosuchuser"),
    "no such choice": ("-o", "huge=maybe"),
    "together": ("-o", "backing=memfd,passthrough=on"),
    "for tmpfs only": ("-o", "backing=memfd,huge=always"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_option_is_named_and_nothing_is_mounted(can_mount: None, tmp_path: Path, name: str) -> None:
    socket_path = tmp_path / "socket"
    with daemon(tmp_path, *REFUSED[name], "--socket", str(socket_path)) as (mountpoint, result):
        assert result.returncode == 1
        assert result.stderr.count("\n") == 1
        assert any(word.split("=")[0] in result.stderr for word in REFUSED[name][1].split(",")[-1:])
        assert not os.path.ismount(mountpoint)
        assert not socket_path.exists()


def test_mountpoint_that_is_none(can_mount: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    missing = "No such file or directory; create it, or have it created with --mkdir"
    for name, why in (("missing", missing), ("file", "not a directory to mount on")):
        path = tmp_path / name
        result = run(*memfs_command("mount", path, "--socket", tmp_path / "socket"))
        assert (result.returncode, result.stderr) == (1, f"memfs: {path}: {why}\n")
        assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize("arguments", [["-o", "socket={}/x"], ["--socket", "{}/x"], ["--log-file", "{}/x"]])
def test_directory_that_is_named_is_not_created(can_mount: None, tmp_path: Path, arguments: list[str]) -> None:
    missing = tmp_path / "missing" / "too"
    (tmp_path / "mnt").mkdir()
    result = run(*memfs_command("mount", tmp_path / "mnt", *(each.format(missing) for each in arguments)))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert str(missing) in result.stderr
    assert "no directory" in result.stderr or "No such file or directory" in result.stderr
    assert not missing.parent.exists()
    assert not os.path.ismount(tmp_path / "mnt")


@pytest.mark.parametrize("path", ["/", "/proc", "/dev", "link"])
def test_nothing_is_mounted_on_what_programs_need(can_mount: None, tmp_path: Path, path: str) -> None:
    """In a mount namespace: if it were mounted, the machine could not be used any more."""
    skip_without_mount_namespace()
    (tmp_path / "link").symlink_to("/proc")
    mountpoint = tmp_path / path  # which is `path` itself, if that is absolute
    command = memfs_command("mount", mountpoint, "--socket", tmp_path / "socket")
    result = run(*mount_namespace(tmp_path), *command)
    why = "programs need that directory, memfs as well; mount on one of its own"
    assert (result.returncode, result.stderr) == (1, f"memfs: {mountpoint.resolve()}: {why}\n")
    assert not (tmp_path / "socket").exists()


def test_mount_on_one_that_does_not_answer_is_refused(memfs: Memfs, tmp_path: Path) -> None:
    (memfs.path / "file").write_text("content")
    memfs.process.send_signal(signal.SIGSTOP)
    try:
        command = memfs_command("mount", memfs.path, "--socket", tmp_path / "other")
        result = run(*command, timeout=20)
    finally:
        memfs.process.send_signal(signal.SIGCONT)
    assert result.returncode == 1
    assert result.stderr == (
        f"memfs: {memfs.path}: what is mounted there does not answer (is it stopped?); unmount it first\n"
    )
    assert not (tmp_path / "other").exists()
    assert (memfs.path / "file").read_text() == "content"


def test_what_is_no_socket_is_not_replaced_by_one(can_mount: None, tmp_path: Path) -> None:
    important = tmp_path / "important"
    important.write_text("not a socket")
    with daemon(tmp_path, "--socket", str(important)) as (mountpoint, result):
        assert result.returncode == 1
        assert "not a socket" in result.stderr
        assert not os.path.ismount(mountpoint)
    assert important.read_text() == "not a socket"


def test_socket_that_is_another_s_by_then_stays(memfs: Memfs) -> None:
    memfs.socket.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(memfs.socket))
        memfs.process.send_signal(signal.SIGTERM)
        assert memfs.process.wait(10) == 0
        assert memfs.socket.is_socket()
    memfs.socket.unlink()


def test_what_is_logged_in_the_background_is_beside_the_socket(can_mount: None, tmp_path: Path) -> None:
    with daemon(tmp_path, "-o", "size=1m") as (mountpoint, result):
        assert result.returncode == 0
        path = Path(os.getxattr(mountpoint, "user.memfs.socket").decode())
        log = path.with_suffix(".log")
        assert not log.exists(), "there was nothing to log"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(path))
            client.send(b"nonsense")
            until(log.exists)
        until(lambda: "broke the protocol" in log.read_text())
        subprocess.run(["umount", mountpoint], check=True)
        log.unlink()


#: The command, whose daemon comes to an end on SIGUSR1, or when it has mounted
BREAKS = """
import sys
from memfs import daemon
from memfs.cli.main import main

async def breaks(*_):
    raise {error}

daemon._Memfs.{method} = breaks
main(["mount", *sys.argv[1:]])
"""


@pytest.mark.parametrize("error", ["OSError(5, 'Input/output error')", "ZeroDivisionError('oops')"])
def test_why_a_daemon_ended_later_is_logged(can_mount: None, tmp_path: Path, error: str) -> None:
    mountpoint, log = tmp_path / "mnt", tmp_path / "log"
    mountpoint.mkdir()
    program = BREAKS.format(method="_log_state", error=error)
    try:
        result = run(sys.executable, "-c", program, mountpoint, "-o", "size=1m", "--log-file", log)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        os.kill(stat_json(mountpoint)["pid"], signal.SIGUSR1)
        until(lambda: log.exists() and "memfs has ended: " in log.read_text())
        until(lambda: not os.path.ismount(mountpoint))
        [line] = [line for line in log.read_text().splitlines() if "memfs has ended" in line]
        is_a_bug = "ZeroDivisionError" in error
        assert ("a bug in memfs: oops" in line, "Traceback" in line) == (is_a_bug, is_a_bug)
        assert ("Input/output error" in line) == (not is_a_bug)
    finally:
        run("umount", "--lazy", mountpoint)


def test_a_bug_while_mounting_is_said(can_mount: None, tmp_path: Path) -> None:
    program = BREAKS.format(method="run", error="ZeroDivisionError('oops')")
    result = run(sys.executable, "-c", program, tmp_path, "-o", "size=1m")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "memfs: a bug in memfs: oops; --foreground shows more\n"
    assert not os.path.ismount(tmp_path)


def test_socket_in_use_is_refused_and_a_stale_one_replaced(memfs: Memfs, tmp_path: Path) -> None:
    with daemon(tmp_path, "--socket", str(memfs.socket)) as (mountpoint, result):
        assert result.returncode == 1
        assert "another memfs listens there" in result.stderr
        assert not os.path.ismount(mountpoint)
    assert memfs.socket.exists()
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(stale))
    (tmp_path / "mnt").rmdir()
    with daemon(tmp_path, "--socket", str(stale)) as (mountpoint, result):
        assert result.returncode == 0
        subprocess.run(["umount", mountpoint], check=True)
        until(lambda: not stale.exists())


def test_options_take_effect(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=3m,nr_inodes=5,mode=751,uid=12,gid=34,noatime,noexec")
    assert memfs.run("stat", "-c", "%a %u %g", ".").stdout == "751 12 34\n"
    assert memfs.run("df", "--output=size", ".").stdout.split()[-1] == "3072"
    assert memfs.run("df", "--output=itotal,iused", ".").stdout.split()[-2:] == ["5", "1"]
    full = memfs.run("touch", "1", "2", "3", "4", "5")
    assert "No space left on device" in full.stderr
    assert memfs.run("ls").stdout.split() == ["1", "2", "3", "4"]
    options = run("findmnt", "-no", "OPTIONS", memfs.path).stdout
    assert {"nosuid", "nodev", "noexec", "noatime"} <= set(options.strip().split(","))


def test_read_only_mount(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=3m,ro")
    assert "Read-only file system" in memfs.run("touch", "file").stderr


def test_remount_changes_limits_but_not_below_usage(memfs: Memfs) -> None:
    memfs.run("fallocate", "-l", "30M", "file")
    assert run(*memfs_command("remount", memfs.path, "-o", "size=100m,nr_inodes=10")).returncode == 0
    assert memfs.run("df", "--output=size,itotal", ".").stdout.split()[-2:] == [str(100 << 10), "10"]
    below = "is less than what is in use"
    for options, word in (("size=20m", below), ("nr_inodes=1", below), ("mode=7", "mode")):
        result = run(*memfs_command("remount", memfs.path, "-o", options))
        assert result.returncode == 1
        assert word in result.stderr
        assert memfs.run("df", "--output=size,itotal", ".").stdout.split()[-2:] == [str(100 << 10), "10"]


def test_stat_says_whether_content_passes_through(mount_memfs: MountMemfs) -> None:
    off = run(*memfs_command("stat", mount_memfs("passthrough=off").path)).stdout
    assert "no passthrough because  switched off" in off
    memfd = run(*memfs_command("stat", mount_memfs("backing=memfd").path)).stdout
    assert "no passthrough because  files live on memfds" in memfd
    auto = mount_memfs()
    said = run(*memfs_command("stat", auto.path)).stdout
    assert "passthrough" in said
    if os.geteuid() == 0 and tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 9):
        assert ["passthrough", "yes"] in [line.split() for line in said.splitlines()]


def test_without_dev_fuse_it_says_so(can_mount: None, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("hiding /dev/fuse takes root")
    skip_without_mount_namespace()
    script = 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$@"'
    command = [*mount_namespace(tmp_path), "sh", "-c", script, "sh", *memfs_command("mount", tmp_path)]
    result = run(*command)
    assert (result.returncode, result.stderr) == (
        1,
        "memfs: there is no /dev/fuse: load the fuse module (modprobe fuse)\n",
    )


def test_without_permission_it_says_so(can_mount: None, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving up rights takes root")
    skip_without("setpriv")
    skip_without_mount_namespace()
    script = 'mount -t tmpfs none /usr/local/bin; PATH=/nonexistent exec "$0" "$@"'
    command = memfs_command("mount", tmp_path, "--socket", tmp_path / "socket")
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    result = run(*mount_namespace(tmp_path), *drop, "sh", "-c", script, *command)
    assert result.returncode == 1
    assert "no permission to mount: run as root, or install fusermount3" in result.stderr
    assert not (tmp_path / "socket").exists()


def test_socket_s_path_is_told_as_it_was_checked(mount_memfs: MountMemfs, tmp_path: Path) -> None:
    """A link may lead elsewhere by the time that somebody sends descriptors there."""
    safe, link = tmp_path / "safe", tmp_path / "link"
    (safe / "sub").mkdir(parents=True)
    link.symlink_to(safe)
    memfs = mount_memfs("size=1m", "--socket", str(link / "sub" / "socket"))
    link.unlink()
    link.symlink_to("/nowhere")
    told = os.getxattr(memfs.path, "user.memfs.socket").decode()
    assert told == str(safe / "sub" / "socket")
    assert Path(told).is_socket()
    assert stat_json(memfs.path)["socket"] == told


def test_directories_are_made_in_safe_places_only(tmp_path: Path) -> None:
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    os.chown(strangers, 65534, 65534)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    result = run(*memfs_command("mount", mountpoint, "--socket", strangers / "new" / "socket"))
    assert result.returncode == 1
    assert "belongs to another user" in result.stderr
    assert list(strangers.iterdir()) == []


def test_remount_among_the_options_of_mount_changes_what_is_mounted(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=8m")
    assert run(*memfs_command("mount", memfs.path, "-o", "rw,nofail,remount,size=0x400000")).returncode == 0
    assert memfs.run("df", "--output=size", ".").stdout.split()[-1] == "4096"
    refused = run(*memfs_command("mount", memfs.path, "-o", "remount,mode=700"))
    assert (refused.returncode, "mode" in refused.stderr) == (1, True)
    read_only = mount_memfs("size=8m,ro")
    refused = run(*memfs_command("mount", read_only.path, "-o", "remount,size=4m"))
    assert refused.returncode == 1
    assert "mounted read-only" in refused.stderr
