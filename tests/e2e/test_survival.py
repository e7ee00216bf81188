"""The mount survives its daemon: killed at any moment, it goes on, with every result as on tmpfs."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from memfs.contract.conversion import convert, key_of
from memfs.contract.faults import Kind, Point
from memfs.contract.protocol.messages import AllowPreserve, Done, Registered
from tests.helpers import pages, until

from .conftest import Memfs, MountMemfs, memfs_command, run, stat_json, state_of
from .injection import Injection
from .owner import connected
from .process import mounted_alike
from .test_differential import INODES, MINUTES, SEED, SIZE, Differential, Side, run_machine
from .test_whose_mount import CREATE_WITHOUT_END, nothing_left_on
from .time_bar import time_bar

EXPECTED = ["killed by SIGKILL: going on"]


def worker_of(memfs: Memfs) -> int:
    """Which process serves a memfs; asked for without a command, for those take long where much is going on."""
    worker = state_of(memfs.path)["pid"]
    assert isinstance(worker, int)
    return worker


def kill(memfs: Memfs) -> int:
    """Kill the process that serves a memfs, and return which one follows it."""
    worker = worker_of(memfs)
    os.kill(worker, signal.SIGKILL)
    memfs.expected = EXPECTED
    successor = worker_of(memfs)
    assert successor != worker
    return successor


class Dying(Differential):
    """Every other step begins with the daemon about to die, before it commits something or after it."""

    inject: Injection
    random = random.Random(0)

    def do(self, user: str, name: str, *arguments: object, same_atime: bool = True) -> bool:
        point = self.random.choice([Point.BEFORE_COMMIT, Point.AFTER_COMMIT, None, None])
        if point is not None:
            self.inject.arm(point)
        return super().do(user, name, *arguments, same_atime=same_atime)


@pytest.mark.timeout(600)
def test_every_step_is_tmpfs_s_when_the_daemon_dies_in_it(in_memfs: Injection, can_mount: None) -> None:
    """With passthrough: without, holes may count as data after a death (DIFFERENCES.md)."""
    Dying.passes_through = True
    Dying.inject = in_memfs
    with mounted_alike(f"size={SIZE},nr_inodes={INODES},mode=755", "survive=on", EXPECTED) as (ours, theirs):
        pair = Side(ours), Side(theirs)
        try:
            run_machine(pair, examples=8, steps=40, number=0, machine=Dying)
        finally:
            in_memfs.disarm()
            for side in pair:
                side.close()


@pytest.mark.skipif(not MINUTES, reason="long: run by `make soak`")
@pytest.mark.timeout(0)
def test_soak(in_memfs: Injection, can_mount: None) -> None:
    Dying.passes_through = True
    Dying.inject = in_memfs
    first = SEED or random.SystemRandom().randrange(1 << 32)
    end = time.monotonic() + MINUTES * 60
    resident: list[int] = []
    mounted = mounted_alike(f"size={SIZE},nr_inodes={INODES},mode=755", "survive=on", EXPECTED)
    with mounted as (ours, theirs), time_bar(MINUTES * 60) as show:
        pair = Side(ours), Side(theirs)
        try:
            for number in range(first, first + (1 << 32)):
                print(f"SEED={number}", flush=True)
                show(f"seed {number}")
                Dying.random = random.Random(number)
                run_machine(pair, examples=4, steps=100, number=number, machine=Dying)
                resident.append(resident_of_all(ours))
                if time.monotonic() > end:
                    break
            in_memfs.disarm()
            restarts = state_of(ours)["restarts"]
            print(f"{restarts} deaths; resident after each round: {resident} KiB")
            assert max(resident[len(resident) // 2 :]) < 1.2 * max(resident[: len(resident) // 2 + 1]) + 4096
        finally:
            in_memfs.disarm()
            for side in pair:
                side.close()


def resident_of_all(mounted: Path) -> int:
    """How much memory of their own the worker of a memfs and its keeper have, in KiB."""
    worker = state_of(mounted)["pid"]
    keeper = int(Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1])
    statuses = [Path(f"/proc/{pid}/status").read_text() for pid in (worker, keeper)]
    return sum(int(status.split("RssAnon:")[1].split()[0]) for status in statuses)


def test_open_files_go_on(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m,survive=on")
    with (memfs.path / "file").open("w+b", buffering=0) as file, (memfs.path / "gone").open("w+b", buffering=0) as gone:
        file.write(b"before")
        gone.write(b"unlinked")
        (memfs.path / "gone").unlink()
        kill(memfs)
        file.write(b" and after")
        assert (memfs.path / "file").read_bytes() == b"before and after"
        gone.seek(0)
        assert gone.read() == b"unlinked"
        assert os.fstat(gone.fileno()).st_nlink == 0
    state = stat_json(memfs.path)
    assert (state["generation"], state["restarts"], state["survives"]) == (2, 1, True)
    assert isinstance(state["last_outage"], float)


@pytest.mark.parametrize(("mode", "deaths"), [("auto", 20), ("off", 5)])
def test_programs_notice_nothing_of_many_deaths(
    mount_memfs: MountMemfs, in_memfs: Injection, tmp_path: Path, mode: str, deaths: int
) -> None:
    """Of files that are written and checked, and of a repository that is made, cloned and verified."""
    memfs = mount_memfs(f"size=64m,survive=on,passthrough={mode}")
    script = tmp_path / "works.sh"
    script.write_text(WORKS)
    log = tmp_path / "out"
    with log.open("w") as out:
        working = subprocess.Popen(["sh", "-e", script, memfs.path], stdout=out, stderr=out)
    for _ in range(deaths):
        kill(memfs)
        time.sleep(0.2)  # not to wait for something, but so that deaths come at any moment of the work
    (memfs.path / "enough").touch()
    assert working.wait(100) == 0, log.read_text()
    assert stat_json(memfs.path)["restarts"] == deaths


#: Works until it is told that it is enough
WORKS = """
cd "$1"
export HOME="$1" GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a
export GIT_COMMITTER_EMAIL=a@b
round=0
while [ ! -e enough ] || [ $round = 0 ]; do
    round=$((round + 1))
    mkdir work
    for i in 1 2 3 4 5 6 7 8; do head -c $((i * 5000)) /dev/urandom > work/$i; cp work/$i work/$i.copy; done
    for i in 1 2 3 4 5 6 7 8; do cmp work/$i work/$i.copy; mv work/$i.copy work/$i; ln work/$i work/$i.link; done
    setfattr -n user.a -v $round work/1
    [ "$(getfattr --only-values -n user.a work/1.link)" = $round ]
    truncate -s 1000 work/8; [ $(stat -c %s work/8.link) = 1000 ]
    if command -v git > /dev/null; then
        git init -q repository; cp work/? repository
        (cd repository; git add .; git commit -qm one)
        git clone -q repository clone
        (cd clone; git fsck --strict; git status --porcelain)
        rm -rf repository clone
    fi
    rm -r work
done
"""


def test_a_guest_s_pages_are_what_its_map_shows(mount_memfs: MountMemfs, in_memfs: Injection) -> None:
    memfs = mount_memfs("size=64m,survive=on")
    path = memfs.path / "guest"
    assert run(*memfs_command("create", path, "--seals", "guest", "--size", "1m")).returncode == 0
    memfs.expected = EXPECTED
    pages = set[int]()
    for number, point in enumerate(
        [Point.BEFORE_ALLOCATE, Point.AFTER_ALLOCATE, Point.BEFORE_ACCOUNT, Point.AFTER_ACCOUNT] * 2
    ):
        in_memfs.arm(point)
        offset = number * 8
        assert run("fallocate", "-o", f"{offset * 4}K", "-l", "32K", path).returncode == 0
        pages |= set(range(offset, offset + 8))
        assert path.stat().st_blocks == 8 * len(pages)
    for number, point in enumerate(
        [Point.BEFORE_FREE, Point.AFTER_FREE, Point.BEFORE_ACCOUNT, Point.AFTER_ACCOUNT] * 2
    ):
        in_memfs.arm(point)
        offset = number * 8 + 2
        assert run("fallocate", "-p", "-o", f"{offset * 4}K", "-l", "16K", path).returncode == 0
        pages -= set(range(offset, offset + 4))
        assert path.stat().st_blocks == 8 * len(pages)
    seek = f"import os; f = os.open({str(path)!r}, os.O_RDONLY); print(os.lseek(f, 0, os.SEEK_HOLE))"
    assert int(run(sys.executable, "-c", seek).stdout) == 2 * 4096
    assert stat_json(memfs.path)["restarts"] == 16
    assert stat_json(memfs.path)["used"] == 4096 * len(pages)


def test_what_was_populated_before_a_death_is_not_measured_as_if_nothing_had_been(
    mount_memfs: MountMemfs, tmp_path: Path
) -> None:
    """The hash is gone, and whatever was being copied: the measurement says that there was a death (measurement.py)."""
    memfs = mount_memfs("size=64m,survive=on")
    content = tmp_path / "content"
    content.write_bytes(b"x" * 4096)
    said = []
    for name, dies in (("one", False), ("two", True), ("three", True)):
        path = memfs.path / name
        assert run(*memfs_command("create", path, "--seals", "guest", "--size", "1m")).returncode == 0
        assert run(*memfs_command("populate", path, content)).returncode == 0
        if dies:
            kill(memfs)
        said.append(run(*memfs_command("populate", path, content, "--offset", "4k")).stdout)
    pages_of = [number.to_bytes(8, "little") + content.read_bytes() for number in (0, 1)]
    restarted = struct.pack("<3Q", 2**64 - 3, 0, 0) + hashlib.sha384(pages_of[0]).digest()
    measured = [hashlib.sha384(first + pages_of[1]).hexdigest() for first in (pages_of[0], restarted)]
    assert said == [f"{measured[number]}\n" for number in (0, 1, 1)]


def test_after_too_many_deaths_in_a_row_it_ends(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m,survive=on")
    for _ in range(5):
        kill(memfs)
    os.kill(worker_of(memfs), signal.SIGKILL)
    assert memfs.process.wait(20) == 1
    assert not os.path.ismount(memfs.path)
    assert not memfs.socket.exists()
    assert "unmounting" in memfs.log.read_text()


def test_one_that_a_bug_ends_is_followed_and_says_what_it_was(mount_memfs: MountMemfs, in_memfs: Injection) -> None:
    memfs = mount_memfs("size=64m,survive=on")
    (memfs.path / "file").write_text("content")
    memfs.expected = ["a bug in memfs ends", "ended by a bug, with exit code 1: going on"]
    in_memfs.arm(Point.BEFORE_COMMIT, Kind.FAIL)  # nothing is there for that
    (memfs.path / "file").chmod(0o600)
    assert (memfs.path / "file").read_text() == "content"
    assert stat_json(memfs.path)["restarts"] == 1
    assert "injected: before-commit" in memfs.log.read_text()


def test_a_log_that_was_moved_away_is_left_alone_by_those_to_come(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m,survive=on")
    kill(memfs)
    moved = memfs.log.with_suffix(".1")
    memfs.log.rename(moved)
    before = moved.read_text()
    for restarts in (2, 3):
        kill(memfs)
        assert f"restarts={restarts}" in memfs.log.read_text()
    assert moved.read_text() == before


def test_a_signal_that_comes_while_nobody_serves_is_not_lost(mount_memfs: MountMemfs) -> None:
    """At any moment between the death of a worker and that its successor can be told."""
    for number in range(12):
        memfs = mount_memfs("size=64m,survive=on")
        worker = stat_json(memfs.path)["pid"]
        assert isinstance(worker, int)
        memfs.expected = EXPECTED
        os.kill(worker, signal.SIGKILL)
        moment = time.perf_counter() + number * 0.0005
        while time.perf_counter() < moment:
            pass
        memfs.process.terminate()
        memfs.see_end()


def test_when_the_keeper_is_gone_the_worker_goes_on(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m,survive=on")
    (memfs.path / "file").write_text("content")
    socket_of_keeper = Path(str(stat_json(memfs.path)["keeper_socket"]))
    assert socket_of_keeper.exists()
    memfs.process.kill()
    memfs.process.wait()
    until(lambda: not stat_json(memfs.path)["survives"], 20)
    assert (memfs.path / "file").read_text() == "content"
    assert "the keeper is gone" in memfs.log.read_text()
    assert not socket_of_keeper.exists()
    assert stat_json(memfs.path)["keeper_socket"] is None
    assert run("umount", memfs.path).returncode == 0


def test_a_request_that_kills_each_daemon_is_given_up(mount_memfs: MountMemfs, in_memfs: Injection) -> None:
    """It has been tried three times then, and others are not concerned."""
    memfs = mount_memfs("size=64m,survive=on")
    memfs.expected = [*EXPECTED, "has killed memfs 2 times: EIO"]
    path = memfs.path / "guest"
    assert run(*memfs_command("create", path, "--seals", "guest", "--size", "1m")).returncode == 0
    allocating = subprocess.Popen(["fallocate", "-l", "4K", path], stderr=subprocess.PIPE, text=True)
    while allocating.poll() is None:
        in_memfs.arm(Point.BEFORE_ALLOCATE)
        time.sleep(0.001)
    in_memfs.disarm()
    assert "Input/output error" in allocating.communicate()[1]
    assert stat_json(memfs.path)["restarts"] == 3
    assert path.stat().st_blocks == 0
    assert run("fallocate", "-l", "4K", path).returncode == 0


def test_where_the_keeper_is_killed_as_well_the_next_mount_takes_the_place(can_mount: None, tmp_path: Path) -> None:
    """And meanwhile nobody sees the directory that it is on."""
    mountpoint, stop = tmp_path / "mnt", tmp_path / "stop"
    mountpoint.mkdir()
    before = mountpoint.stat().st_mtime_ns
    command = memfs_command("mount", mountpoint, "-o", "size=64m,survive=on")
    with nothing_left_on(mountpoint):
        assert run(*command).returncode == 0
        creating = [sys.executable, "-c", CREATE_WITHOUT_END, str(mountpoint), str(stop)]
        with subprocess.Popen(creating, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            for _ in range(2):
                worker = state_of(mountpoint)["pid"]
                keeper = int(Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1])
                os.kill(keeper, signal.SIGKILL)
                os.kill(worker, signal.SIGKILL)
                result = run(*command)
                assert result.returncode == 0, result.stderr
            stop.touch()
            assert int(writer.stdout.read()) > 0
        assert writer.returncode == 0
    assert mountpoint.stat().st_mtime_ns == before


def test_where_it_cannot_be_had_it_is_refused_or_said(mount_memfs: MountMemfs) -> None:
    with pytest.raises(AssertionError, match="survive=on: files live on memfds"):
        mount_memfs("size=64m,survive=on,backing=memfd")
    memfs = mount_memfs("size=64m,survive=auto,backing=memfd")
    state = stat_json(memfs.path)
    assert (state["survives"], state["restarts"]) == (False, 0)
    assert "memfds" in str(state["no_survival_because"])


def test_a_signal_that_ends_it_ends_it(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m,survive=on")
    kill(memfs)
    memfs.process.terminate()
    memfs.see_end()


def test_a_conversion_that_is_cut_short_leaves_no_page_on_both_sides(
    mount_memfs: MountMemfs, in_memfs: Injection
) -> None:
    memfs = mount_memfs("size=64m,survive=on")
    shared, private = memfs.path / "shared", memfs.path / "private"
    assert run(*memfs_command("create", private, "--seals", "guest", "--size", "1m")).returncode == 0
    shared.write_bytes(b"x" * (1 << 20))
    memfs.expected = EXPECTED
    fds = [os.open(path, os.O_RDWR) for path in (shared, private)]
    key = key_of(fds[0])
    points = [
        Point.AFTER_ALLOCATE,
        Point.BEFORE_FREE,
        Point.AFTER_FREE,
        Point.BEFORE_ACCOUNT,
        Point.BEFORE_COMMIT,
        Point.AFTER_COMMIT,
    ]
    deaths = 0
    for to_private in (True, False) * 2:
        for number, point in enumerate(points):
            in_memfs.arm(point)
            ranges = [pages(40 * number, 40 * number + 10), pages(40 * number + 20, 40 * number + 21)]
            convert(fds[1], key, ranges, to_private=to_private)
            deaths += not in_memfs.armed
        blocks = [os.fstat(fd).st_blocks // 8 for fd in fds]
        count = 11 * len(points)
        assert blocks == ([256 - count, count] if to_private else [256, 0])
        assert stat_json(memfs.path)["used"] == 1 << 20
    assert deaths == 4 * len(points)
    assert stat_json(memfs.path)["restarts"] == deaths
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("to_private", [True, False], ids=["to private", "to shared"])
async def test_a_conversion_that_was_allowed_is_done_by_the_next_daemon(
    mount_memfs: MountMemfs, in_memfs: Injection, to_private: bool
) -> None:
    """The owner's permission outlives the daemon."""
    memfs = mount_memfs("size=64m,survive=on")
    memfs.expected = EXPECTED
    paths = (memfs.path / "shared", memfs.path / "private")

    def make() -> tuple[int, int]:
        paths[0].write_bytes(b"x" * (1 << 20))
        assert run(*memfs_command("create", paths[1], "--seals", "guest", "--size", "1m")).returncode == 0
        shared, private = (os.open(path, os.O_RDWR) for path in paths)
        return shared, private

    fds = await trio.to_thread.run_sync(make)
    key = await trio.to_thread.run_sync(key_of, fds[0])

    def convert_it(to_private: bool) -> None:
        convert(fds[1], key, [pages(0, 4)], to_private=to_private, preserve=True)

    def die_in_it(point: Point) -> None:
        in_memfs.arm(point)
        convert_it(to_private)
        assert not in_memfs.armed, "it did not die"

    for point in (Point.BEFORE_FREE, Point.AFTER_FREE):
        async with connected(memfs.socket) as owner:
            registered = await owner.register(paths[1])
            assert isinstance(registered, Registered)
            await owner.client.launch(registered.file)
            assert await owner.ask(AllowPreserve(registered.file)) == Done()
            await trio.to_thread.run_sync(convert_it, not to_private)
            await trio.to_thread.run_sync(die_in_it, point)
        blocks = await trio.to_thread.run_sync(lambda: [os.fstat(fd).st_blocks // 8 for fd in fds])
        assert blocks == ([252, 4] if to_private else [256, 0])
        if not to_private:
            assert await trio.to_thread.run_sync(os.pread, fds[0], 4 << 12, 0) == b"x" * (4 << 12)
    for fd in fds:
        await trio.to_thread.run_sync(os.close, fd)
