"""How both processes end, and what is left for those that go on: killed, stopped, told to stop while they work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from memfs.contract.protocol.messages import Fenced, Registered
from memfs.contract.sys.mountinfo import device_of_mountpoint
from tests.helpers import until

from .conftest import Memfs, MountMemfs, memfs_command, run
from .owner import connected, shell
from .test_kvmsim import RUN, guest, running  # noqa: F401  (a fixture)
from .test_unprivileged import Home, home  # noqa: F401  (a fixture)
from .tools import FAKETIME, needs

SIZE = 4 << 20

# -- an owner that is killed -------------------------------------------------------------------------------------------

#: An owner in a process of its own, which stops where the test wants it and says so
OWNER = f"""
import os, sys, trio
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from memfs.contract.protocol.messages import GetPfn, InvalidateBegin, InvalidateEnd
from memfs.contract.units import PageIndex, PageRange
from tests.e2e.owner import Owner, connected

where, socket, path = sys.argv[1:]
ALL = PageRange(PageIndex(0), PageIndex({SIZE >> 12}))

class Stops(Owner):
    async def hear(self, message):
        stop = {{"begin": InvalidateBegin, "between": InvalidateEnd}}.get(where)
        if stop is not None and isinstance(message, stop):
            os.write(1, where.encode() + b"\\n")
            await trio.sleep_forever()
        await super().hear(message)

async def main():
    import tests.e2e.owner
    tests.e2e.owner.Owner = Stops
    async with connected(socket) as owner:
        registered, fds = await owner.registered(Path(path))
        if where in ("locked", "fault"):
            await owner.ask(GetPfn(registered.file, ALL, True))
        os.write(1, b"ready\\n")
        while where == "fault":
            await owner.client.request(GetPfn(registered.file, ALL, True))
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.parametrize("where", ["idle", "fault", "locked", "begin", "between"])
async def test_owner_is_killed(memfs: Memfs, where: str) -> None:
    """What it had ends at once, the punch it was asked about completes, and the next VM can register."""
    memfs.expected.append("its process is gone")
    path = memfs.path / "private"
    await shell(*memfs_command("create", "--seals", "guest", "--size", str(SIZE), path), cwd=memfs.path)
    await shell("fallocate", "-l", str(SIZE), path, cwd=memfs.path)
    command = [sys.executable, "-c", OWNER, where, str(memfs.socket), str(path)]
    owner = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    try:
        assert await owner.stdout.receive_some() == b"ready\n"
        punched = trio.Event()

        async def punch() -> None:
            assert (await shell("fallocate", "-p", "-l", "1M", path, cwd=memfs.path)).returncode == 0
            punched.set()

        with trio.fail_after(3):  # less than the timeout for an owner that does not answer
            async with trio.open_nursery() as nursery:
                if where != "idle":
                    nursery.start_soon(punch)
                if where in ("begin", "between"):
                    assert await owner.stdout.receive_some() == f"{where}\n".encode()
                else:
                    await trio.sleep(0.3)
                assert not punched.is_set()
                owner.send_signal(signal.SIGKILL)
            async with connected(memfs.socket) as other:
                while not isinstance(await other.register(path), Registered):  # noqa: ASYNC110
                    await trio.sleep(0.01)  # it is not dead yet
                used = 0 if where == "idle" else 1 << 20
                blocks = await shell("stat", "-c", "%b", path, cwd=memfs.path)
                assert int(blocks.stdout) * 512 == SIZE - used
    finally:
        owner.kill()
        await owner.wait()
        await owner.stdout.aclose()


# -- a kvmsim that is stopped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_stopped_kvmsim_is_fenced_and_says_so_when_it_goes_on(mount_memfs: MountMemfs, passthrough: str) -> None:
    memfs = mount_memfs(f"size=64m,notify_timeout=1,passthrough={passthrough}")
    memfs.expected.append("is fenced: no answer within 1 s")
    memfs.run("touch", "shared")
    assert memfs.run(*memfs_command("create", "--seals", "guest", "private")).returncode == 0
    with running(memfs, "--duration", "60") as process:
        process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        assert memfs.run("fallocate", "-p", "-l", "1M", "private").returncode == 0
        assert 0.9 < time.monotonic() - started < 5
        assert memfs.run("fallocate", "-p", "-l", "1M", "private").returncode == 0  # and nobody waits a second time
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 1, output
    assert output.splitlines()[-1] == (
        "kvmsim: the run ended: memfs has cut us off: no answer within 1 s: its process is stopped"
    ), output
    assert memfs.run("stat", "-c", "%b", "private").returncode == 0
    result = memfs.run(
        *[sys.executable, "-m", "kvmsim", "run", "--shared", "shared", "--private", "private"], "--mem", "4M"
    )
    assert result.returncode == 0, result.stdout + result.stderr


# -- memfs is told to stop ---------------------------------------------------------------------------------------------

LOAD = r"""
cd "$0"
while :; do
    fallocate -l 8M "load$1" && fallocate -p -o 64K -l 4M "load$1" && dd if=/dev/zero of="data$1" bs=64K count=64 &&
        cat "data$1" && truncate -s 0 "data$1" && rm "load$1" || exit 3
done >/dev/null 2>&1
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_told_to_stop_under_load(mount_memfs: MountMemfs, passthrough: str, number: signal.Signals) -> None:
    memfs = mount_memfs(f"size=64m,passthrough={passthrough}")
    memfs.run("touch", "shared")
    assert memfs.run(*memfs_command("create", "--seals", "guest", "private")).returncode == 0
    loads = [subprocess.Popen(["sh", "-c", LOAD, memfs.path, str(worker)]) for worker in range(4)]
    with running(memfs, "--duration", "60") as vm:
        time.sleep(0.5)
        assert all(load.poll() is None for load in loads)
        started = time.monotonic()
        memfs.process.send_signal(number)
        memfs.see_end()
        assert time.monotonic() - started < 5
        for load in loads:
            assert load.wait(10) == 3  # it got an error, and no process hangs
        output, _ = vm.communicate(timeout=10)
        assert vm.returncode == 1
        assert output.splitlines()[-1].startswith("kvmsim: the run ended: memfs")


async def test_told_to_stop_while_something_waits_for_an_owner(mount_memfs: MountMemfs) -> None:
    """However long it might have waited."""
    memfs = mount_memfs("size=64m,notify_timeout=600")
    await shell("fallocate", "-l", "1M", "file", cwd=memfs.path)
    async with connected(memfs.socket) as owner:
        await owner.register(memfs.path / "file")
        owner.acknowledge = trio.Event()  # never
        owner.arrived = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: shell("fallocate", "-p", "-l", "64K", "file", cwd=memfs.path))
            with trio.fail_after(10):
                await owner.arrived.wait()
            started = time.monotonic()
            memfs.process.send_signal(signal.SIGTERM)
            await trio.to_thread.run_sync(memfs.see_end)
            assert time.monotonic() - started < 5
        with trio.fail_after(5):
            await owner.gone.wait()
        farewell = owner.heard[-1]
        assert isinstance(farewell, Fenced)
        assert farewell.text == "memfs has ended"


async def test_unmounted_owners_are_told(memfs: Memfs) -> None:
    async with connected(memfs.socket) as owner:
        await trio.to_thread.run_sync(memfs.stop)
        with trio.fail_after(5):
            await owner.gone.wait()
        assert [type(message) for message in owner.heard] == [Fenced]


# -- the clock jumps ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(FAKETIME is None, reason="not installed: libfaketime, which sets the clock of one process only")
async def test_clock_jumps_while_an_owner_is_waited_for(
    mount_memfs: MountMemfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is fenced because it is next year, and nobody is waited for because it is last year."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(FAKETIME))
        patch.setenv("FAKETIME_TIMESTAMP_FILE", str(clock))
        patch.setenv("FAKETIME_NO_CACHE", "1")
        patch.setenv("DONT_FAKE_MONOTONIC", "1")
        memfs = mount_memfs("size=64m,notify_timeout=2")
    memfs.expected.append("is fenced: no answer within 2 s")
    await shell("fallocate", "-l", "1M", "file", cwd=memfs.path)
    async with connected(memfs.socket) as owner:
        await owner.register(memfs.path / "file")
        owner.acknowledge = trio.Event()
        owner.arrived = trio.Event()
        punch = lambda: shell("fallocate", "-p", "-l", "64K", "file", cwd=memfs.path)  # noqa: E731
        async with trio.open_nursery() as nursery:
            nursery.start_soon(punch)
            with trio.fail_after(10):
                await owner.arrived.wait()
            clock.write_text("+400d")
            directory = memfs.path / "next year"
            await trio.to_thread.run_sync(directory.mkdir)
            assert directory.stat().st_ctime > time.time() + 300 * 86400  # it does see the new time
            await trio.sleep(0.5)
            assert not owner.gone.is_set()
            owner.acknowledge.set()
        owner.acknowledge = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(punch)
            await trio.sleep(0.5)
            clock.write_text("-400d")
            with trio.fail_after(5):
                await owner.gone.wait()


# -- memfs is killed ---------------------------------------------------------------------------------------------------


def test_killed_memfs_stops_the_guest_and_can_be_mounted_again(guest: Memfs) -> None:  # noqa: F811
    with running(guest, "--duration", "60") as vm, (guest.path / "shared").open("rb"):  # somebody who does not let go
        guest.process.kill()
        guest.process.wait()
        output, _ = vm.communicate(timeout=10)
        assert vm.returncode == 1
        assert output.splitlines()[-1].startswith("kvmsim: the run ended: memfs"), output
        with pytest.raises(OSError, match="not connected"):
            os.statvfs(guest.path)
        assert guest.socket.exists()
        command = memfs_command("mount", guest.path, "--socket", guest.socket, "-o", "size=1m")
        again = run(*command)
        assert again.returncode == 0, again.stderr
    try:
        assert guest.run("sh", "-c", "echo hello > file && cat file").stdout == "hello\n"
        assert guest.run("ls").stdout == "file\n"
        mounts = Path("/proc/self/mountinfo").read_text().count(f" {guest.path} ")
        assert mounts == 1, "the dead one is still there"
    finally:
        assert run("umount", guest.path).returncode == 0
    until(lambda: not guest.socket.exists())


def test_dead_mount_of_something_else_is_left_alone(tmp_path: Path, can_mount: None) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts a filesystem, so it needs root")
    fuse = os.open("/dev/fuse", os.O_RDWR)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    data = f"fd={fuse},rootmode=40000,user_id=0,group_id=0"
    script = (
        "import sys; from memfs.contract.sys.libc import mount; mount('other', sys.argv[1], 'fuse', 0, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, mountpoint, data], pass_fds=[fuse], check=True)
    os.close(fuse)
    device = device_of_mountpoint(str(mountpoint))
    assert device is not None
    try:
        refused = run(*memfs_command("mount", mountpoint, "-o", "size=1m"))
        assert refused.returncode == 1
        assert "dead and not a memfs" in refused.stderr
        assert device_of_mountpoint(str(mountpoint)) == device
    finally:
        run("umount", "--lazy", mountpoint)


@needs("pgrep")
def test_killed_memfs_of_a_user_can_be_mounted_again(home: Home) -> None:  # noqa: F811
    pid = int(run("sh", "-c", "pgrep -u 65534 -f 'memfs mount mnt'").stdout.split()[0])
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while "not connected" not in home.run("ls", "mnt").stderr:
        assert time.monotonic() < deadline
    again = home.run(sys.executable, "-P", "-m", "memfs", "mount", "mnt", "-o", "size=1m")
    assert again.returncode == 0, again.stderr
    assert home.run("sh", "-c", "echo hello > mnt/file && cat mnt/file").stdout == "hello\n"
