"""`memfs list`, `umount`, `remount` and `mount --mkdir` on real mounts."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from .conftest import MountMemfs, memfs_command, run, stat_json
from .lying_filesystem import lying
from .tools import as_user, skip_unless_others_run_memfs


def listed(*arguments: str) -> list[list[str]]:
    result = run(*memfs_command("list", *arguments))
    assert (result.returncode, result.stderr) == (0, "")
    return [line.split() for line in result.stdout.splitlines()]


def test_list_shows_each_memfs(mount_memfs: MountMemfs) -> None:
    small, large = mount_memfs("size=8m"), mount_memfs("size=3g,allow_other")
    (large.path / "file").write_bytes(bytes(1 << 20))
    heading, *rows = listed()
    assert heading == ["MOUNTPOINT", "PID", "VERSION", "SIZE", "USED", "OWNERS", "HUGE", "SOCKET"]
    shown = {row[0]: row[1:] for row in rows}
    for memfs, size, used in ((small, "8.0M", "0"), (large, "3.0G", "1.0M")):
        version = run(*memfs_command("--version")).stdout.split()[1]
        expected = [str(memfs.process.pid), version, size, used, "0", "never", str(memfs.socket)]
        assert shown[str(memfs.path)] == expected


def test_list_as_json_is_the_state_of_each(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=8m")
    states = json.loads(run(*memfs_command("list", "--json")).stdout)
    [ours] = [each for each in states if each["mountpoint"] == str(memfs.path)]
    assert ours == stat_json(memfs.path)


def test_list_waits_for_nobody_who_does_not_answer(mount_memfs: MountMemfs) -> None:
    stopped, memfs = mount_memfs("size=8m"), mount_memfs("size=8m")
    stopped.process.send_signal(signal.SIGSTOP)
    try:
        shown = {row[0]: " ".join(row[1:]) for row in listed()}
    finally:
        stopped.process.send_signal(signal.SIGCONT)
    assert shown[str(stopped.path)] == "- - - - - - does not answer (is it stopped?)"
    assert str(memfs.socket) in shown[str(memfs.path)]


@pytest.mark.parametrize(
    "state",
    [
        "[" * 30000,
        '{"size": 1e999, "mountpoint": 5}',
        '{"conversions": [], "notifications": 5, "registry": [7]}',
    ],
    ids=["deep", "numbers", "kinds"],
)
def test_mount_that_is_no_memfs_hides_no_other(mount_memfs: MountMemfs, tmp_path: Path, state: str) -> None:
    memfs = mount_memfs("size=8m")
    with lying(tmp_path, state):
        shown = {row[0]: " ".join(row[1:]) for row in listed()}
        assert str(memfs.socket) in shown[str(memfs.path)]
        assert "what it says of its state" in shown[str(tmp_path)]
        result = run(*memfs_command("metrics", memfs.path, tmp_path))
        assert (result.returncode, result.stderr) == (0, "")
        assert f'memfs_up{{mountpoint="{tmp_path}"}} 0.0' in result.stdout
        assert f'memfs_up{{mountpoint="{memfs.path}"}} 1.0' in result.stdout
        assert run(*memfs_command("stat", tmp_path)).stderr.startswith(f"memfs: {tmp_path}: what it says of its state")


@pytest.mark.parametrize(
    "state",
    [
        "{}",
        '{"conversions": null, "notifications": null, "registry": null, "guest_page_size": null}',
        '{"notifications": {"Fallocate": {"count": 0, "pages": 0, "seconds": 0, "longest": 0, "buckets": {}}}}',
        '{"registry": [{"owner": 1, "name": "", "acknowledged": 0, "pending": [], "files": [{"file": 1, "ino": 1, '
        '"size": 0, "pages": 9223372036854775808, "guest": true, "locked": 0}]}]}',
    ],
    ids=["nothing", "nulls", "zeros", "much"],
)
def test_mount_that_says_little_is_shown(tmp_path: Path, state: str) -> None:
    with lying(tmp_path, state):
        for command in ("stat", "metrics", "top"):
            result = run(*memfs_command(command, tmp_path))
            assert (result.returncode, result.stderr) == (0, ""), command


def test_stat_shows_the_options_that_are_in_force(mount_memfs: MountMemfs) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root changes flags of a mount")
    memfs = mount_memfs("size=8m,nosuid,mode=755")

    def options() -> str:
        return str(stat_json(memfs.path)["options"])

    assert options() == "size=8m,nosuid,mode=755"
    assert run(*memfs_command("remount", memfs.path, "-o", "size=16m,suid,noexec,ro")).returncode == 0
    assert sorted(options().split(",")) == sorted(["mode=755", "size=16M", "suid", "noexec", "ro"])
    assert run(*memfs_command("remount", memfs.path, "-o", "size=8m,nosuid,exec,rw")).returncode == 0
    assert options() == "size=8m,nosuid,mode=755"


def test_umount_unmounts(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=8m")
    with (memfs.path / "file").open("wb"):
        refused = run(*memfs_command("umount", memfs.path))
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert f"(pid {os.getpid()})" in refused.stderr
        assert memfs.run("ls").stdout == "file\n"
    assert run(*memfs_command("umount", memfs.path)).returncode == 0
    memfs.see_end()


def test_lazy_umount_unmounts_what_is_in_use(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=8m")
    with (memfs.path / "file").open("wb"):
        assert run(*memfs_command("umount", "--lazy", memfs.path)).returncode == 0
        assert not os.path.ismount(memfs.path)
    memfs.see_end()


def test_umount_names_a_mount_on_it(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=8m")
    nested = memfs.path / "with space"
    nested.mkdir()
    if (refused := run("mount", "-t", "tmpfs", "none", nested)).returncode:
        pytest.skip(f"cannot mount a tmpfs: {refused.stderr.strip()}")
    try:
        refused = run(*memfs_command("umount", memfs.path))
        assert refused.stderr == f"memfs: {memfs.path} is in use by the mount on {nested}; end that, or say --lazy\n"
    finally:
        run("umount", nested)


def test_umount_from_within_is_not_in_its_own_way(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=8m")
    held = run("sh", "-c", f"{' '.join(memfs_command('umount', '.'))}; exit $?", cwd=memfs.path)
    assert (held.returncode, held.stderr.count("(pid ")) == (1, 1), held.stderr
    assert "in use by sh (pid " in held.stderr
    assert run(*memfs_command("umount", "."), cwd=memfs.path).returncode == 0
    memfs.see_end()


def test_umount_by_another_user_says_who_may(mount_memfs: MountMemfs) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    drop = as_user(65534)
    skip_unless_others_run_memfs(*drop)
    memfs = mount_memfs("size=8m,allow_other")
    refused = run(*drop, sys.executable, "-m", "memfs", "umount", memfs.path)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "another user has mounted it" in refused.stderr or "is not installed" in refused.stderr


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "no memfs is mounted there; see `memfs list`"),
        ("missing", "No such file or directory"),
        ("file", "no memfs is mounted there; see `memfs list`"),
        (".", "no memfs is mounted there; see `memfs list`"),
    ],
)
def test_umount_of_what_is_no_memfs_is_refused(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").touch()
    result = run(*memfs_command("umount", name), cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"memfs: {name or 'MOUNTPOINT'}: {why}\n"


def test_second_mount_on_a_mountpoint_says_what_to_do(mount_memfs: MountMemfs, tmp_path: Path) -> None:
    memfs = mount_memfs("size=8m")
    result = run(*memfs_command("mount", memfs.path, "--socket", tmp_path / "other"))
    assert result.returncode == 1
    said = "a memfs is mounted there already; unmount it, or remount it to change it"
    assert result.stderr == f"memfs: {memfs.path}: {said}\n"
    assert not (tmp_path / "other").exists()


def test_mkdir_makes_the_mountpoint(can_mount: None, tmp_path: Path) -> None:
    mountpoint = tmp_path / "a" / "b"
    command = memfs_command("mount", mountpoint, "--mkdir", "--socket", tmp_path / "socket", "-o")
    refused = run(*command, "size=1m,backing=memfd,huge=always")
    assert refused.returncode == 1
    assert not (tmp_path / "a").exists()
    assert run(*command, "size=1m").returncode == 0
    assert os.path.ismount(mountpoint)
    assert mountpoint.parent.stat().st_mode & 0o7777 == 0o755
    assert run(*memfs_command("umount", mountpoint)).returncode == 0


def test_remount_changes_flags_of_the_mount(mount_memfs: MountMemfs) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    memfs = mount_memfs("size=8m,noatime,noexec")

    def shown() -> str:
        return run("findmnt", "--noheadings", "--output", "VFS-OPTIONS,SIZE", memfs.path).stdout.strip()

    for options, expected in (
        ("ro,size=4m", "ro,nosuid,nodev,noexec,noatime   4M"),
        ("rw,size=2m,relatime", "rw,nosuid,nodev,noexec,relatime   2M"),
        ("exec,strictatime,nosymfollow", "rw,nosuid,nodev,nosymfollow   2M"),
        ("nodiratime", "rw,nosuid,nodev,nodiratime,nosymfollow   2M"),
    ):
        assert run(*memfs_command("remount", memfs.path, "-o", options)).stderr == ""
        assert shown().split() == expected.split()
    (memfs.path / "directory").mkdir()
    refused = run(*memfs_command("remount", memfs.path / "directory", "-o", "ro"))
    assert (refused.returncode, "name its mountpoint" in refused.stderr) == (1, True)
