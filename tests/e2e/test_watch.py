"""What a memfs says of itself to those who watch it, and what each of them may see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from memfs.contract.protocol.messages import Registered
from memfs.contract.units import PageIndex, PageRange

from .conftest import Memfs, MountMemfs, memfs_command, run
from .owner import connected, shell
from .terminal import Terminal
from .test_terminal import KVMSIM
from .tools import as_user, open_to_all, skip_unless_others_run_memfs, skip_without

ALICE = 12001


@pytest.fixture
def shared_mount(mount_memfs: MountMemfs) -> Memfs:
    """A memfs that other users may use."""
    if os.geteuid() != 0:
        pytest.skip("acts as several users, so it needs root")
    memfs = mount_memfs("size=64m,allow_other")
    open_to_all(memfs.path)
    return memfs


async def state(memfs: Memfs, *command: str) -> dict[str, Any]:
    """Return the state of a mount as who runs a command is told."""
    result = await shell(*command, cwd=memfs.path)
    assert result.returncode == 0, result.stderr
    said: dict[str, Any] = json.loads(result.stdout)
    return said


async def test_owners_of_others_are_seen_by_root_only(shared_mount: Memfs) -> None:
    skip_without("setpriv", "getfattr")
    ask = ["getfattr", "--only-values", "-n", "user.memfs.stat", "."]
    (shared_mount.path / "of-root").touch(0o600)
    async with connected(shared_mount.socket) as owner:
        assert isinstance(await owner.register(shared_mount.path / "of-root"), Registered)
        owner.acknowledge = trio.Event()  # so a notification is pending
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(shell, "fallocate", "-l", "8K", "of-root", cwd=shared_mount.path))
            await owner.arrived.wait()
            pending = await state(shared_mount, *ask)
            owner.acknowledge.set()
        seen, unseen = await state(shared_mount, *ask), await state(shared_mount, *as_user(ALICE), *ask)
    assert [(each["uid"], len(each["files"])) for each in seen["registry"]] == [(0, 1)]
    assert [each["notification"] for each in pending["registry"][0]["pending"]] == ["Fallocate"]
    assert (unseen["owners"], unseen["registry"]) == (1, [])
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads((Path(__file__).parents[2] / "docs" / "stat.schema.json").read_text())
    for said in (pending, seen, unseen):
        jsonschema.validate(said, schema)


async def test_locked_pages_are_seen_by_who_may_read_the_file(shared_mount: Memfs) -> None:
    skip_without("setpriv", "getfattr")
    ask = ["getfattr", "--only-values", "-n", "user.memfs.locks", "private"]
    created = await shell(
        *memfs_command("create", "--seals", "guest", "--size", "1M", "private"), cwd=shared_mount.path
    )
    assert created.returncode == 0
    assert await state(shared_mount, *ask) == {"owner": None, "locked": 0, "runs": []}
    async with connected(shared_mount.socket) as owner:
        registered = await owner.register(shared_mount.path / "private")
        assert isinstance(registered, Registered)
        for start, end in ((3, 5), (8, 9)):
            pages = PageRange(PageIndex(start), PageIndex(end))
            await owner.client.get_pfn(registered.file, pages, alloc=True, lock=True)
        said = await state(shared_mount, *ask)
        assert (said["locked"], said["runs"]) == (3, [[3, 5], [8, 9]])
        refused = await shell(*as_user(ALICE), *ask, cwd=shared_mount.path)
    assert refused.returncode != 0
    assert b"Permission denied" in refused.stderr


# -- memfs map --------------------------------------------------------------------------------------------------------


@pytest.fixture
def guest(mount_memfs: MountMemfs) -> Memfs:
    """A memfs with the two files of a guest of 4 MiB, of which 2 MiB are private and 64 KiB shared."""
    memfs = mount_memfs("size=64m")
    for command in (
        memfs_command("create", "--size", "4M", "shared"),
        memfs_command("create", "--seals", "guest", "--size", "4M", "private"),
        ["fallocate", "--length", "2M", "private"],
    ):
        assert memfs.run(*command).returncode == 0
    with (memfs.path / "shared").open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"x" * (64 << 10))
    return memfs


def test_map_shows_both_sides(guest: Memfs) -> None:
    result = guest.run(*memfs_command("map", "shared", "private"))
    assert (result.returncode, result.stderr) == (0, "")
    *rows, legend, summary = result.stdout.splitlines()
    assert len(rows) == 16
    assert [row.split()[1] for row in rows[:8]] == ["█" * 64] * 8
    assert [row.split()[1] for row in (rows[8], rows[12])] == ["·" * 64, "░" * 16 + "·" * 48]
    assert legend.strip() == "█ private huge ░ shared · absent"
    assert summary.strip().startswith("2.0M private, 64.0K shared, 1.9M absent, 2.0M huge, 0 locked")
    zoomed = guest.run(*memfs_command("map", "--offset", "2044k", "--length", "8k", "private")).stdout
    assert zoomed.splitlines()[0].split() == ["2044K", "█·"]


async def test_map_shows_locked_pages(guest: Memfs) -> None:
    async with connected(guest.socket) as owner:
        registered = await owner.register(guest.path / "private")
        assert isinstance(registered, Registered)
        await owner.client.get_pfn(registered.file, PageRange(PageIndex(2), PageIndex(4)), alloc=False, lock=True)
        shown = await shell(*memfs_command("map", "--length", "32k", "private"), cwd=guest.path)
    assert shown.stdout.decode().splitlines()[0].split() == ["0", "██◆◆████"]


def test_map_writes_pictures(guest: Memfs, tmp_path: Path) -> None:
    assert guest.run(*memfs_command("map", "private", "--output", tmp_path / "map.svg")).returncode == 0
    assert ElementTree.parse(tmp_path / "map.svg").getroot().tag.endswith("svg")
    pytest.importorskip("PIL", reason="Pillow is not installed")
    assert guest.run(*memfs_command("map", "private", "--output", tmp_path / "map.png")).returncode == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["map.png", "map.svg"]


def test_map_follows_what_changes(guest: Memfs) -> None:
    command = memfs_command("map", "--follow", "shared", "private")
    with subprocess.Popen(command, cwd=guest.path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:

            def until(words: str) -> None:
                assert any(words in line for line in process.stdout or ())

            until("2.0M private, 64.0K shared")
            assert guest.run("fallocate", "--offset", "3M", "--length", "32K", "private").returncode == 0
            until("2.0M private, 32.0K shared")
            assert guest.run("umount", guest.path).returncode != 0  # it is where the command works
        finally:
            process.send_signal(signal.SIGTERM)


def test_following_keeps_nobody_from_sealing_or_unmounting(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=16m")
    file = memfs.path / "file"
    file.write_bytes(b"x")
    with subprocess.Popen(memfs_command("map", "--follow", file), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline()
            os.truncate(file, 0)
            assert run(*memfs_command("seal", file, "guest")).returncode == 0
            memfs.stop()
            process.wait(20)
        finally:
            process.kill()


REFUSED = [
    (["empty"], "empty: the file is empty"),
    (["private", "private"], "both files are guest-sealed"),
    (["shared", "private", "empty"], "one file, or two"),
    (["--offset", "1g", "private"], "it ends before that"),
    (["."], ".: not a regular file"),
    (["fifo"], "fifo: not a regular file"),
    (["/dev/null"], "/dev/null: does not lie on a memfs"),
    (["link"], "link: a symbolic link"),
    (["--output", "/nonexistent/a.svg", "private"], "/nonexistent/a.svg: No such file or directory"),
]


def test_what_map_cannot_show_is_said(guest: Memfs) -> None:
    guest.run("sh", "-c", "touch empty; mkfifo fifo; ln -s private link")
    for arguments, words in REFUSED:
        result = guest.run(*memfs_command("map", *arguments))
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert words in result.stderr


def test_map_is_for_those_who_may_use_the_file(shared_mount: Memfs) -> None:
    skip_without("setpriv")
    skip_unless_others_run_memfs(*as_user(ALICE))
    (shared_mount.path / "of-root").write_bytes(b"x")
    os.chmod(shared_mount.path / "of-root", 0o644)
    result = shared_mount.run(*as_user(ALICE), *memfs_command("map", "of-root"))
    assert (result.returncode, "Permission denied" in result.stderr) == (1, True), result.stderr


# -- memfs top --------------------------------------------------------------------------------------------------------

EVIL = "\x1b]0;x\x07<b>"


async def test_top_on_a_terminal(guest: Memfs) -> None:
    (guest.path / EVIL).write_bytes(b"x")

    def watch() -> bytes:
        with Terminal(memfs_command("top", "--interval", "0.2", str(guest.path))) as terminal:
            terminal.wait_for("test")  # the owner's name
            terminal.press("\t")
            terminal.wait_for("<b>")
            terminal.press("q")
            assert terminal.end() == 0
            return terminal.shown

    async with connected(guest.socket) as owner:
        assert isinstance(await owner.register(guest.path / EVIL), Registered)
        shown = await trio.to_thread.run_sync(watch)
    assert b"\x1b]0;" not in shown
    assert b"\\u001b]0;x\\u0007<b>" in shown


def test_top_without_a_terminal_is_one_snapshot_and_waits_for_nobody_long(
    guest: Memfs, mount_memfs: MountMemfs
) -> None:
    stopped = mount_memfs("size=8m")
    stopped.process.send_signal(signal.SIGSTOP)
    try:
        result = run(*memfs_command("top", guest.path, stopped.path), timeout=15)
    finally:
        stopped.process.send_signal(signal.SIGCONT)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{stopped.path}: does not answer" in result.stdout.replace("\n", "")
    assert "64.0M" in result.stdout
    assert "2.0M" in result.stdout
    assert "\x1b" not in result.stdout


# -- progress ---------------------------------------------------------------------------------------------------------


def test_what_may_take_long_has_a_bar_on_a_terminal_and_nowhere_else(guest: Memfs) -> None:
    shared, private, fresh = (str(guest.path / name) for name in ("shared", "private", "fresh"))
    assert guest.run(*memfs_command("create", "--seals", "guest", "--size", "4M", fresh)).returncode == 0
    for command in (
        memfs_command("allocate", shared),
        memfs_command("convert", "--to", "private", shared, private, "2m:1m"),
        memfs_command("populate", fresh, "/bin/sh"),
        [*KVMSIM, "run", "--shared", shared, "--private", private, "--mem", "4m", "--prefault"],
    ):
        with Terminal(command) as terminal:
            code = terminal.end()
            if code and b"not supported" in terminal.shown:  # to convert without passthrough
                continue
            assert (code, "━".encode() in terminal.shown) == (0, True), terminal.shown[-2000:]
        result = run(*command)
        assert (result.returncode, "━" in result.stdout + result.stderr) == (0, False)
