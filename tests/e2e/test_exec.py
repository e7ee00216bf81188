"""`kvmsim exec` and `kvmsim selftest`: unmodified static programs in sealed memory, on each engine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from .conftest import Memfs, MountMemfs, interruptible, memfs_command, run, state_of
from .native import AREA, choice_or_skip

BUSYBOX = Path("/bin/busybox")
SELFTEST = files("kvmsim").joinpath("guests/selftest.elf").read_bytes()


def is_static(path: Path) -> bool:
    return path.exists() and b"/ld-linux" not in path.read_bytes()


needs_busybox = pytest.mark.skipif(
    not is_static(BUSYBOX), reason="no static /bin/busybox (Debian package busybox-static)"
)


class Kvmsim:
    """The command on two files of a memfs, on one engine."""

    def __init__(self, memfs: Memfs, engine: str) -> None:
        self.memfs, self.engine = memfs, engine
        memfs.run("touch", "shared")
        memfs.run(*memfs_command("create", "--seals", "guest", "private"))

    def command(self, name: str, *arguments: str | Path) -> list[str]:
        memory = ("--shared", "shared", "--private", "private", "--engine", self.engine)
        return [sys.executable, "-m", "kvmsim", name, *memory, *map(str, arguments)]

    def exec(
        self, *arguments: str | Path, mem: str = "64m", stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.memfs.run(*self.command("exec", "--mem", mem, *arguments), input=stdin)

    @contextlib.contextmanager
    def running(self, name: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
        """One in the background, which is killed at the end if it still runs."""
        command = self.command(name, *arguments)
        with subprocess.Popen(
            command,
            cwd=self.memfs.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=interruptible,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def nobody_owns_it(self) -> bool:
        """Whether both files are free; waits a little for that."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if not state_of(self.memfs.path)["owners"]:
                return True
            time.sleep(0.05)
        return False


@pytest.fixture(params=["kvm", "unicorn"])
def kvmsim(request: pytest.FixtureRequest, mount_memfs: MountMemfs) -> Kvmsim:
    choice_or_skip(request.param)
    return Kvmsim(mount_memfs("size=128m"), request.param)


@pytest.fixture
def on_kvm(mount_memfs: MountMemfs) -> Kvmsim:
    choice_or_skip("kvm")
    return Kvmsim(mount_memfs("size=128m,notify_timeout=1"), "kvm")


# -- what works ------------------------------------------------------------------------------------------------------


@needs_busybox
def test_shell_in_sealed_memory_says_what_it_says_outside(kvmsim: Kvmsim, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("pear\napple\n" * 1000)
    script = "cd /; echo $((6*7)) hello; test -e nothing || echo no; sha256sum words"  # only the last is not forked
    result = kvmsim.exec("--root", tmp_path, BUSYBOX, "sh", "-c", script)
    digest = hashlib.sha256((tmp_path / "words").read_bytes()).hexdigest()
    assert (result.stdout, result.returncode) == (f"42 hello\nno\n{digest}  words\n", 0)
    assert kvmsim.exec("--root", tmp_path, BUSYBOX, "sh", "-c", "exit 7").returncode == 7
    assert kvmsim.exec("--root", tmp_path, BUSYBOX, "ls", "-l", "/").stdout.split()[-1] == "words"
    assert result.stderr == f"kvmsim: engine {kvmsim.engine}: as asked for\n"
    assert kvmsim.memfs.run("cat", "private").stderr == "cat: private: Operation not permitted\n"


@needs_busybox
def test_programs_read_standard_input_and_compute(kvmsim: Kvmsim) -> None:
    assert kvmsim.exec(BUSYBOX, "sort", stdin="b\nc\na\n").stdout == "a\nb\nc\n"
    program = "BEGIN { for (i = 0; i < 20000; i++) a[i % 1000] += i; print a[7] }"
    inside = kvmsim.exec(BUSYBOX, "awk", program)
    assert (inside.stdout, inside.returncode) == (run(BUSYBOX, "awk", program).stdout, 0)


@needs_busybox
def test_memory_of_one_program_is_not_there_for_the_next(kvmsim: Kvmsim) -> None:
    for _ in range(2):
        assert kvmsim.exec(BUSYBOX, "echo", "x" * 1000).returncode == 0
    result = run(*kvmsim.command("selftest"), cwd=kvmsim.memfs.path)
    assert (result.stdout, result.returncode) == ("hello from native code\n", 0)
    assert result.stderr.endswith("kvmsim: all checks passed\n")


def test_punch_is_seen_by_the_guest_that_runs(kvmsim: Kvmsim) -> None:
    with kvmsim.running("selftest", "watch") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watching pages 2048 to 3071 of my private memory\n"
        punch = ("fallocate", "--punch-hole", "--offset", str(AREA + 2 * 4096), "--length", "16K", "private")
        assert kvmsim.memfs.run(*punch).returncode == 0
        assert process.stdout.readline() == "the host took pages 2050..2053; they came back empty\n"
        assert process.wait(30) == 0


def test_chaos_finds_every_word(on_kvm: Kvmsim) -> None:
    result = run(*on_kvm.command("selftest", "chaos"), cwd=on_kvm.memfs.path)
    assert result.returncode == 0, result.stderr
    assert "every word was as stored" in result.stderr


# -- what is refused -------------------------------------------------------------------------------------------------


@needs_busybox
def test_only_files_below_the_root_are_there_and_only_to_read(on_kvm: Kvmsim, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_text("inside\n")
    (tmp_path / "secret").write_text("outside\n")
    (root / "link").symlink_to("../secret")
    (root / "absolute").symlink_to(tmp_path / "secret")
    os.mkfifo(root / "fifo")
    for name in ("link", "../secret", "absolute", "/proc/self/root/etc/passwd", "fifo", str(tmp_path / "secret")):
        result = on_kvm.exec("--root", root, BUSYBOX, "cat", name)
        assert (result.stdout, result.returncode) == ("", 1), name
    assert on_kvm.exec("--root", root, BUSYBOX, "cat", "file").stdout == "inside\n"
    assert on_kvm.exec(BUSYBOX, "cat", "/etc/passwd").stdout == ""
    result = on_kvm.exec("--root", root, BUSYBOX, "sh", "-c", "echo x > file")
    assert "Read-only file system" in result.stderr
    assert (root / "file").read_text() == "inside\n"


@needs_busybox
def test_call_that_there_is_not_is_said_once_at_the_end(on_kvm: Kvmsim) -> None:
    result = on_kvm.exec(BUSYBOX, "sh", "-c", "(exit 3); (exit 3); echo on")
    assert "can't fork: Function not implemented" in result.stderr
    assert result.stderr.endswith("kvmsim: system calls that there are not in here: clone (1)\n"), result.stderr


def test_program_that_cannot_be_one_is_refused_with_the_reason(on_kvm: Kvmsim, tmp_path: Path) -> None:
    program = tmp_path / "program"
    for content, mem, why in (
        (b"#!/bin/sh\n", "64m", f"{program}: it is not an ELF file"),
        (SELFTEST[:2000], "64m", f"{program}: it is truncated"),
        (Path(sys.executable).resolve().read_bytes(), "64m", "it is dynamically linked"),
        (SELFTEST, "4m", "--mem: guest memory is too small: the program needs 9 MiB"),
        (SELFTEST, "x", "--mem x: "),
    ):
        program.write_bytes(content)
        result = on_kvm.exec(program, mem=mem)
        assert why in result.stderr
        assert result.stderr.count("\n") == 1
        assert (result.stdout, result.returncode) == ("", 1)
    assert on_kvm.memfs.run("stat", "--format", "%s %b", "private").stdout == "0 0\n", "it changed guest memory"
    assert "No such file" in on_kvm.exec(tmp_path / "absent").stderr


def test_program_that_faults_is_said_to_have_died_and_nothing_stays(kvmsim: Kvmsim, tmp_path: Path) -> None:
    entry = int.from_bytes(SELFTEST[24:32], "little") - 0x40_0000
    program = tmp_path / "program"
    for code, why in (
        (b"\x0f\x0b", "invalid opcode, rip 0x"),
        (b"\x48\xc7\xc0\0\0\0\0\xff\xe0", "page fault at address 0x0"),
    ):
        program.write_bytes(SELFTEST[:entry] + code + SELFTEST[entry + len(code) :])
        result = kvmsim.exec(program)
        assert f"the program died: {why}" in result.stderr
        assert result.returncode == 1
    assert kvmsim.nobody_owns_it()


# -- how it ends -----------------------------------------------------------------------------------------------------


@needs_busybox
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_while_its_guest_spins_it_leaves_nothing(on_kvm: Kvmsim, number: signal.Signals) -> None:
    with on_kvm.running("exec", "--mem", "64m", BUSYBOX, "sh", "-c", "echo go; while :; do :; done") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        process.send_signal(number)
        code = process.wait(20)
        assert code == (130 if number is signal.SIGINT else -number)
    assert on_kvm.nobody_owns_it()
    assert on_kvm.memfs.run("fallocate", "--punch-hole", "--offset", "0", "--length", "64M", "private").returncode == 0


@needs_busybox
def test_fenced_while_its_guest_spins_it_ends_with_the_reason(on_kvm: Kvmsim) -> None:
    on_kvm.memfs.expected.append("fenced")
    on_kvm.memfs.expected.append("private")
    with on_kvm.running("exec", "--mem", "64m", BUSYBOX, "sh", "-c", "echo go; while :; do :; done") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "go\n"
        process.send_signal(signal.SIGSTOP)
        punch = ("fallocate", "--punch-hole", "--offset", "4M", "--length", "4M", "private")
        assert on_kvm.memfs.run(*punch).returncode == 0
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 1
        assert "memfs" in process.stderr.read().splitlines()[-1]


# -- a whole kernel --------------------------------------------------------------------------------------------------


def test_kernel_is_not_booted_where_it_would_not_run_or_is_none(on_kvm: Kvmsim, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(SELFTEST)
    memory = ("--shared", "shared", "--private", "private", "--mem", "64m", "--kernel", str(tmp_path / "kernel"))
    result = on_kvm.memfs.run(sys.executable, "-m", "kvmsim", "boot", *memory)
    is_pvm = Path("/sys/module/kvm_pvm").exists()
    assert ("this machine's KVM is PVM" if is_pvm else "the kernel is no bzImage") in result.stderr
    assert (result.stderr.count("\n"), result.returncode) == (1, 1)
    assert on_kvm.memfs.run("stat", "--format", "%s %b", "private").stdout == "0 0\n", "it changed guest memory"
