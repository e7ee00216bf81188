"""Many VMs on one memfs, converting, killed, stopped and meddled with at random, against a model of who sees what.

Every VM is a process (soak_vm.py) with a file of shared and one of private memory. In each round most of them are given
something to do, all at once: the guest reads, writes and converts; a shell punches or allocates its private memory
behind its back; the process is killed in the middle of something, or stopped until memfs fences it, and another takes
its place. Meanwhile shells work on ordinary files, a kvmsim runs a trace, and strangers try to get in. In one of the
ways to mount, the daemon is killed as well, and nobody may notice.

The model is what each page of each VM has: a value in private memory, or none, and one in shared memory. It says what
the guest reads, what an outsider reads of shared memory, how many pages each file has, and, for a VM that was killed
in the middle, which of the states in between its pages may be in. An outsider reads nothing of private memory, ever.

After each round the filesystem's own count of used pages is what its files have. In the end nothing is left: no
owners, handles, inodes, pages, descriptors; the daemon's memory has not grown; and all its invariants hold (--check).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from .conftest import Memfs, MountMemfs, memfs_command, state_of
from .owner import shell
from .test_leaks import resident
from .time_bar import time_bar

MINUTES = float(os.environ.get("MEMFS_SOAK_MINUTES", "0"))
SEED = int(os.environ.get("MEMFS_SOAK_SEED", "0")) or (random.SystemRandom().getrandbits(32) if MINUTES else 0)
SECONDS = MINUTES * 60 / 3 if MINUTES else 6.0  # for each way to mount
VMS = 12 if MINUTES else 4
PAGE = 4096
NOTIFY_TIMEOUT = 1.0  # seconds
GROWTH = 6 << 20  # bytes that the daemon's memory may grow by once it has warmed up: an allocator's slack
TORN = -1  # of a page's two words only the first has been stored to
WAYS = {
    "passthrough": "passthrough=auto",
    "through the daemon": "passthrough=off",
    "on memfds": "backing=memfd",
    "with deaths": f"survive=on,notify_timeout={5 * NOTIFY_TIMEOUT:g}",
}


class Page(NamedTuple):
    """What a page of guest memory has: in private memory a value, or None where it is absent, and in shared memory."""

    private: int | None = None
    shared: int = 0


def steps(command: dict[str, Any], page: Page) -> list[Page]:
    """The states that one page goes through when a command is done on it, from the one it is in to the last."""
    to_private = command["side"] == "private"
    states = [page]
    if to_private and (page.private is None or command["do"] == "convert"):  # discarded, then allocated
        states += [Page(page.private, 0), Page(page.private or 0, 0)]
    elif not to_private and page.private is not None:
        states += [Page(page.private, 0), Page(None, 0)]  # it arrives zeroed
    if command["do"] == "store":
        states += [states[-1]._replace(**{command["side"]: value}) for value in (TORN, command["value"])]
    return states


class Gone(Exception):
    """The VM has ended because memfs has gone, as far as it could see: why."""


class Machine:
    """A VM, and the model of its memory."""

    def __init__(self, soak: Soak, number: int) -> None:
        self.soak, self.number = soak, number
        self.random = random.Random(f"{SEED} {number}")  # so that what one is given does not depend on the others
        self.size = self.random.choice([16, 64, 600, 1024])
        self.pages = [Page()] * self.size
        directory = soak.memfs.path / "vms"
        self.shared, self.private = directory / f"{number}.shared", directory / f"{number}.private"
        self.process: trio.Process | None = None
        self._said = b""

    async def create(self) -> None:
        """Its files, empty."""
        for path, extra in ((self.shared, []), (self.private, ["--seals", "guest"])):
            made = await shell(*memfs_command("create", *extra, path), cwd=Path("/"))
            assert made.returncode == 0, made.stderr

    async def start(self) -> None:
        command = [sys.executable, "-m", "tests.e2e.soak_vm", str(self.soak.memfs.socket), str(self.shared)]
        command += [str(self.private), str(self.size * PAGE)]
        self._said = b""
        self.process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert await self._answer() == "ready"

    async def ask(self, command: dict[str, Any]) -> Any:
        """Have a command done. Raises Gone."""
        await self.tell(command)
        return await self._answer()

    async def tell(self, command: dict[str, Any]) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps(command).encode() + b"\n")

    async def _answer(self) -> Any:
        assert self.process is not None
        assert self.process.stdout is not None
        with trio.fail_after(60):
            while b"\n" not in self._said:
                some = await self.process.stdout.receive_some()
                assert some, f"VM {self.number} has died: {await self.process.wait()}"
                self._said += some
        line, _, self._said = self._said.partition(b"\n")
        answer = json.loads(line)
        if "gone" in answer:
            raise Gone(answer["gone"])
        return answer["answer"]

    async def end(self, *, kill: bool = False) -> int:
        """End the process, as it should or the hard way. Returns its exit code."""
        assert self.process is not None
        process, self.process = self.process, None
        if kill:
            process.kill()
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.aclose()
        with trio.fail_after(60):
            code = await process.wait()
        await process.stdout.aclose()
        return code

    # -- what is done to it -----------------------------------------------------------------------------------------

    def command(self) -> dict[str, Any]:
        """Something for the guest to do."""
        draw = self.random
        start = draw.randrange(self.size)
        pages = list(range(start, min(self.size, start + draw.choice([1, 2, 8, 100]))))
        return {
            "do": draw.choice(["store", "load", "convert", "convert"]),
            "side": draw.choice(["private", "shared"]),
            "pages": pages,
            "value": draw.getrandbits(60) << 3 | 1,
        }

    async def run(self) -> None:
        """The guest does something, and sees what it should."""
        for _ in range(self.random.randint(1, 6)):
            command = self.command()
            answer = await self.ask(command)
            expected = [self._done(command, page) for page in command["pages"]]
            if command["do"] == "load":
                assert answer == expected, f"VM {self.number} {command}"
            elif command["do"] == "convert":
                assert answer == [0], f"VM {self.number} {command}"

    def _done(self, command: dict[str, Any], index: int) -> int | None:
        self.pages[index] = steps(command, self.pages[index])[-1]
        return self.pages[index].private if command["side"] == "private" else self.pages[index].shared

    async def replace_slot(self) -> None:
        await self.ask({"do": "replace"})

    async def meddle(self) -> None:
        """Somebody takes its private memory away, or gives it some."""
        start, end = self._range()
        punch = self.random.random() < 0.5
        assert await self._fallocate(start, end, punch=punch) == 0
        for index in range(start, end):
            self._meddled(index, punch=punch)

    def _meddled(self, index: int, *, punch: bool) -> None:
        page = self.pages[index]
        self.pages[index] = page._replace(private=None if punch else page.private or 0)

    def _range(self) -> tuple[int, int]:
        start = self.random.randrange(self.size)
        return start, min(self.size, start + self.random.choice([1, 3, 64, 1024]))

    async def _fallocate(self, start: int, end: int, *, punch: bool) -> int:
        options = ["--punch-hole"] if punch else []
        options += ["--offset", str(start * PAGE), "--length", str((end - start) * PAGE)]
        return (await shell("fallocate", *options, self.private, cwd=Path("/"))).returncode

    async def kill(self) -> None:
        """It dies in the middle of something; another one takes over what it had."""
        command = self.command()
        await self.tell(command)
        await trio.sleep(self.random.choice([0, 0.001, 0.005, 0.02]))
        await self.end(kill=True)
        may_be = {index: steps(command, self.pages[index]) for index in command["pages"]}
        await self.start()
        await self._find_out(may_be)

    async def kill_while_told(self) -> None:
        """It dies while somebody takes its memory away."""
        start, end = self._range()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._punch, start, end)
            await trio.sleep(self.random.choice([0, 0.001, 0.002, 0.01]))
            await self.end(kill=True)
        for index in range(start, end):
            self._meddled(index, punch=True)
        await self.start()

    async def _punch(self, start: int, end: int) -> None:
        assert await self._fallocate(start, end, punch=True) == 0

    async def stop(self) -> None:
        """It stops for so long that memfs does not wait for it any more; then it must say so and end."""
        assert self.process is not None
        start, end = self._range()
        self.process.send_signal(signal.SIGSTOP)
        await self._punch(start, end)
        for index in range(start, end):
            self._meddled(index, punch=True)
        self.process.send_signal(signal.SIGCONT)
        with trio.fail_after(10):
            with pytest.raises(Gone, match=r"cut us off|no such owner"):
                await self._answer()
        assert await self.end() == 1
        await self.start()

    async def _find_out(self, may_be: dict[int, list[Page]]) -> None:
        """Which of the states that they may be in are pages in?"""
        present = set(await trio.to_thread.run_sync(allocated, self.private, self.size))
        shared = await trio.to_thread.run_sync(shared_values, self.shared, self.size)
        for index, states in may_be.items():
            private = (
                (await self.ask({"do": "load", "side": "private", "pages": [index]}))[0] if index in present else None
            )
            found = Page(private, shared[index])
            assert found in states, f"VM {self.number} page {index}: {found}, not one of {states}"
            if TORN in found:
                side = "private" if private is not None else "shared"
                again = {"do": "store", "side": side, "pages": [index], "value": self.random.getrandbits(60) << 3 | 1}
                await self.ask(again)
                found = steps(again, found)[-1]
            self.pages[index] = found

    async def renew(self) -> None:
        """It ends as it should, and a new one with new files takes its place; the old files lived as long as it did."""
        for path in (self.shared, self.private):
            await trio.to_thread.run_sync(path.unlink)
        if self.random.random() < 0.5:
            await self.run()
        assert await self.end() == 0
        self.size = self.random.choice([16, 64, 600, 1024])
        self.pages = [Page()] * self.size
        await self.create()
        await self.start()

    # -- looking at it ----------------------------------------------------------------------------------------------

    async def check(self) -> int:
        """See that it is well. Returns how many pages its files have."""
        blocks: list[int] = (await self.ask({"do": "check"}))["blocks"]
        private = sum(page.private is not None for page in self.pages)
        assert blocks[1] == private * 8, f"VM {self.number} has {blocks[1] // 8} private pages, not {private}"
        return sum(blocks) // 8

    async def look_at_everything(self) -> None:
        """All of its memory, as the guest sees it and as an outsider does."""
        expected = [index for index, page in enumerate(self.pages) if page.private is not None]
        assert await trio.to_thread.run_sync(allocated, self.private, self.size) == expected
        answer = await self.ask({"do": "load", "side": "private", "pages": expected})
        assert answer == [self.pages[index].private for index in expected]
        shared = await trio.to_thread.run_sync(shared_values, self.shared, self.size)
        assert shared == [page.shared for page in self.pages]
        assert await trio.to_thread.run_sync(try_to_read, self.private) == errno.EPERM
        others = [index for index, page in enumerate(self.pages) if page.private is None]
        answer = await self.ask({"do": "load", "side": "shared", "pages": others})
        assert answer == [self.pages[index].shared for index in others]


def allocated(path: Path, size: int) -> list[int]:
    """Which pages of a guest-sealed file are allocated; that much an outsider may know."""
    found: list[int] = []
    at = 0
    fd = os.open(path, os.O_RDONLY)
    try:
        while at < size * PAGE:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
            found += range(start // PAGE, at // PAGE)
    except OSError as error:
        if error.errno != errno.ENXIO:  # no more data
            raise
    finally:
        os.close(fd)
    return found


def shared_values(path: Path, size: int) -> list[int]:
    """What a guest has stored in each page of shared memory."""
    data = path.read_bytes().ljust(size * PAGE, b"\0")
    values = []
    for page in range(size):
        words = {int.from_bytes(data[at : at + 8], "little") for at in (page * PAGE, (page + 1) * PAGE - 8)}
        values.append(words.pop() if len(words) == 1 else TORN)
    return values


def try_to_read(path: Path) -> int:
    """The errno of reading a file; 0 if it could be read."""
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno or -1
    return 0


def descriptors_of(pid: int) -> Counter[str]:
    """What a process has open."""
    found: Counter[str] = Counter()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[re.sub(r"[0-9]+", "N", os.readlink(each))] += 1
    return found


# -- who else is there -----------------------------------------------------------------------------------------------

SHELL = r"""
set -e
mkdir -p "work$1" && cd "work$1"
dd if=/dev/urandom of=a bs=64K count=8 status=none
cp a b && cmp a b
ln b c && mv c d && cmp a d
fallocate -p -o 64K -l 128K b && fallocate -l 600K b
truncate -s 100K d && [ "$(stat -c %s b)" = 102400 ]
mkdir -p x/y && touch x/y/z && ls -R >/dev/null && tar cf - . | tar tf - >/dev/null
if fallocate -l 1G big 2>/dev/null; then exit 9; fi
[ "$(stat -c %b big)" = 0 ]
rm -r a b d big x
cd .. && rmdir "work$1"
"""


def garbage(path: Path, draw: random.Random) -> None:
    """Strangers who connect and say nothing, or nonsense."""
    for _ in range(10):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(str(path))
            if draw.random() < 0.7:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the daemon has been killed
                    stranger.send(draw.randbytes(draw.choice([1, 8, 16, 40, 4000])))


@dataclass
class Soak:
    """The whole of it."""

    memfs: Memfs
    random: random.Random
    deadline: float
    dies: bool  #: whether the daemon is killed now and then
    machines: list[Machine] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)  #: for names
    done: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)  #: of the daemon, in bytes, at each long look

    async def run(self) -> None:
        await trio.to_thread.run_sync((self.memfs.path / "vms").mkdir)
        self.machines = [Machine(self, number) for number in range(VMS)]
        try:
            await together([machine.create for machine in self.machines])
            await together([machine.start for machine in self.machines])
            rounds = 0
            with time_bar(self.deadline - time.monotonic()) as show:
                while time.monotonic() < self.deadline or not rounds:
                    show(f"round {rounds + 1}")
                    await self.round()
                    rounds += 1
                    if rounds % 10 == 1 or time.monotonic() >= self.deadline:
                        await self.long_look()
            self.done["rounds"] = rounds
            await together([machine.end for machine in self.machines])
        finally:
            for machine in self.machines:
                if machine.process is not None:
                    machine.process.kill()

    async def round(self) -> None:
        """Something happens to most VMs, and beside them."""
        doing: list[Callable[[], Awaitable[object]]] = []
        for machine in self.machines:
            kinds = [machine.run, machine.meddle, machine.kill, machine.kill_while_told, machine.replace_slot]
            kinds += [machine.renew, machine.stop, self.nothing]
            doing += self.random.choices(kinds, [60, 12, 4, 3, 3, 3, 1, 10])
        others = [self.shells, self.kvmsim, self.strangers, self.remount, self.state, self.nothing]
        doing += self.random.choices(others, [4, 2, 2, 2, 2, 6], k=2)
        if self.dies:
            doing += [self.death] * self.random.choice([0, 0, 1, 2])
        self.done.update(each.__name__ for each in doing)
        await together(doing)
        with trio.fail_after(30):  # what was closed is released a moment later
            while True:
                used = sum([await machine.check() for machine in self.machines])
                stat = await trio.to_thread.run_sync(os.statvfs, self.memfs.path)
                if stat.f_blocks - stat.f_bfree == used:
                    break
                await trio.sleep(0.01)

    async def nothing(self) -> None:
        """Quiet."""

    async def shells(self) -> None:
        """Ordinary work on ordinary files; what asks for more than there is gets nothing."""
        result = await shell("sh", "-c", SHELL, "sh", str(next(self.numbers)), cwd=self.memfs.path)
        assert result.returncode == 0, result.stderr.decode()

    async def kvmsim(self) -> None:
        """A guest that checks every byte, for a moment."""
        number = next(self.numbers)
        names = [f"{number}.{side}" for side in ("shared", "private")]
        await shell("touch", names[0], cwd=self.memfs.path)
        await shell(*memfs_command("create", "--seals", "guest", names[1]), cwd=self.memfs.path)
        options = ["--shared", names[0], "--private", names[1], "--mem", "4M", "--duration", "0.3"]
        result = await shell(sys.executable, "-m", "kvmsim", "run", *options, cwd=self.memfs.path)
        assert result.returncode == 0, result.stdout + result.stderr
        await shell("rm", *names, cwd=self.memfs.path)

    async def strangers(self) -> None:
        await trio.to_thread.run_sync(garbage, self.memfs.socket, self.random)

    async def remount(self) -> None:
        size = self.random.choice(["190m", "200m", "210m"])
        await shell(*memfs_command("remount", self.memfs.path, "-o", f"size={size}"), cwd=Path("/"))

    async def death(self) -> None:
        """The daemon is killed in the middle of all that; another one follows."""
        await trio.sleep(self.random.choice([0, 0.01, 0.05, 0.2]))
        with contextlib.suppress(ProcessLookupError):  # another death was first
            os.kill(await self.pid(), signal.SIGKILL)

    async def pid(self) -> int:
        """Which process serves the mount."""
        pid: int = (await trio.to_thread.run_sync(state_of, self.memfs.path))["pid"]
        return pid

    async def state(self) -> None:
        """Somebody asks how it is."""
        self.memfs.process.send_signal(signal.SIGUSR1)
        assert json.loads((await shell(*memfs_command("stat", "--json", self.memfs.path), cwd=Path("/"))).stdout)

    async def long_look(self) -> None:
        await together([machine.look_at_everything for machine in self.machines])
        with trio.fail_after(20):  # an owner that ended while nobody served is waited for
            while (state := await self.describe())["owners"] > len(self.machines):  # noqa: ASYNC110 - nothing says so
                await trio.sleep(0.05)
        assert state["owners"] == len(self.machines), state
        assert state["registered_files"] == 2 * len(self.machines), state
        assert state["pending"] == 0, state
        self.memory.append(resident(await self.pid()))

    async def describe(self) -> dict[str, Any]:
        result = await shell(*memfs_command("stat", "--json", self.memfs.path), cwd=Path("/"))
        state: dict[str, Any] = json.loads(result.stdout)
        return state

    async def nothing_is_left(self, descriptors: Counter[str]) -> None:
        """All have ended, and their files are removed."""
        await trio.to_thread.run_sync(shutil.rmtree, self.memfs.path / "vms")
        nothing = {"owners": 0, "registered_files": 0, "open_handles": 0, "connections": 0, "used": 0, "inodes_used": 1}
        with trio.move_on_after(20):
            while True:
                state = await self.describe()
                left = {name: state[name] for name in nothing}
                now = descriptors_of(await self.pid())
                if left == nothing and now <= descriptors:
                    return
                await trio.sleep(0.05)
        raise AssertionError(f"left over: {left}, of descriptors {sorted(now - descriptors)}")

    def grown(self) -> int:
        """By how many bytes the daemon's memory has grown since a quarter of the time had passed."""
        warm = self.memory[len(self.memory) // 4 :]
        return min(warm[len(warm) // 2 :]) - min(warm[: len(warm) // 2 + 1])


async def together(doing: Iterable[Callable[[], Awaitable[object]]]) -> None:
    async with trio.open_nursery() as nursery:
        for each in doing:
            nursery.start_soon(each)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("way", WAYS)
async def test_many_vms(
    mount_memfs: MountMemfs,
    way: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    dies = "survive" in WAYS[way]
    if dies:  # as often as it likes
        monkeypatch.setenv("MEMFS_INJECT", str(tmp_path / "nothing"))
    memfs = mount_memfs(f"size=200m,notify_timeout={NOTIFY_TIMEOUT:g},{WAYS[way]}")
    memfs.expected += [
        "logger=memfs.state",
        "is fenced",
        "broke the protocol",
        "is disconnected",
        "log lines like this",
        *(["killed by SIGKILL: going on"] if dies else []),
    ]
    soak = Soak(memfs, random.Random(SEED), time.monotonic() + SECONDS, dies)
    if dies:
        await soak.death()
    await soak.shells()  # some things are opened when they are first needed, and kept
    descriptors = descriptors_of(await soak.pid())
    with capsys.disabled():
        print(f"\n{VMS} VMs, {way}, for {SECONDS:.0f} s; seed {SEED}", flush=True)
        try:
            await soak.run()
        finally:
            print(
                f"  {dict(soak.done)}; the daemon's memory in MiB: {[each >> 20 for each in soak.memory][::10]}",
                flush=True,
            )
    await soak.nothing_is_left(descriptors)
    assert soak.grown() < GROWTH
