"""kvmsim in its own process over a mounted memfs, while the shell converts memory under it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmsim.ending import WRONG_BYTE
from kvmsim.timeline import events_of

from .conftest import Memfs, MountMemfs, interruptible, memfs_command, run
from .tools import needs

KVMSIM = [sys.executable, "-m", "kvmsim"]
RUN = [*KVMSIM, "run", "--shared", "shared", "--private", "private", "--mem", "4M"]


@pytest.fixture(params=["auto", "off"])
def guest(mount_memfs: MountMemfs, request: pytest.FixtureRequest) -> Memfs:
    """A memfs, with and without passthrough, on which the files of a guest of 4 MiB lie."""
    memfs = mount_memfs(f"size=64m,passthrough={request.param}")
    memfs.run("touch", "shared")
    assert memfs.run(*memfs_command("create", "--seals", "guest", "private")).returncode == 0
    return memfs


def number(output: str, what: str) -> int:
    """The number before some words in kvmsim's report."""
    match = re.search(rf"([\d,]+) {re.escape(what)}", output)
    assert match, f"no {what!r} in:\n{output}"
    return int(match[1].replace(",", ""))


def test_trace_runs_and_converts_what_it_touches(guest: Memfs) -> None:
    result = guest.run(*RUN)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every byte was as stored" in result.stdout
    converted = number(result.stdout, "to private")
    assert converted == number(result.stdout, "MAP_PRIVATE") == number(result.stdout, "private, 60 shared, in")
    # What is private is paid for once: nothing is left of it in the shared file.
    blocks = guest.run("stat", "-c", "%b", "private", "shared").stdout.split()
    assert [int(count) // 8 for count in blocks] == [converted, 60]


def test_second_run_finds_its_memory_as_it_was(guest: Memfs) -> None:
    assert guest.run(*RUN).returncode == 0
    again = guest.run(*RUN)
    assert again.returncode == 0, again.stdout + again.stderr
    assert number(again.stdout, "to private") == 0


def test_guest_memory_is_not_in_core_dumps(guest: Memfs) -> None:
    with running(guest, "--duration", "60") as vm:
        mappings = Path(f"/proc/{vm.pid}/smaps").read_text()
        vm.send_signal(signal.SIGINT)
        vm.wait(20)
    files = re.findall(r"^[0-9a-f]+-[0-9a-f]+ rw-s .* /[-0-9]+\n(?:\w+: .*\n)*?VmFlags: (.*)$", mappings, re.MULTILINE)
    assert len(files) == 2, "shared and private memory"
    assert all("dd" in flags.split() for flags in files)
    hidden = re.findall(
        r"^[0-9a-f]+-[0-9a-f]+ rw-p 00000000 00:00 0 *\nSize: +(\d+) kB\n(?:\w+: .*\n)*?VmFlags: .*\bdd\b.*$",
        mappings,
        re.MULTILINE,
    )
    used = number(run(*KVMSIM, "info", "sort").stdout, "KiB")
    assert sum(map(int, hidden)) >= 2 * used, "the trace engine's copy of each"


def test_prefaulted_memory_does_not_fault(guest: Memfs) -> None:
    assert guest.run(*RUN).returncode == 0
    result = guest.run(*RUN, "--prefault")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1,024 pages mapped" in result.stdout
    assert number(result.stdout, "private, 0 shared, 0 retried") == 0
    assert number(result.stdout, "to private") == 0
    # All of shared memory is paid for now; what is private already is not paid for twice.
    blocks = guest.run("stat", "-c", "%b", "private", "shared").stdout.split()
    assert sum(int(count) // 8 for count in blocks) == 1024


def test_prefault_without_room_says_so(guest: Memfs) -> None:
    guest.run("fallocate", "-l", "62M", "filler")
    result = guest.run(*RUN, "--prefault")
    assert result.returncode == 1
    assert result.stderr.startswith(f"kvmsim: {guest.path}/shared: No space left on device; raise size= ")


def test_private_ranges_decide_who_is_private(guest: Memfs) -> None:
    result = guest.run(*RUN, "--private-ranges", "0-64K,128K-192K", "--no-map-on-fallocate")
    assert result.returncode == 0, result.stdout + result.stderr
    assert number(result.stdout, "to private") == 32


@pytest.mark.parametrize("vm_type", ["snp", "tdx-48", "tdx-52"])
def test_several_vcpus_and_slots(guest: Memfs, vm_type: str) -> None:
    """Each runs the trace on memory of its own, and all convert, within slots that end anywhere."""
    one = guest.run(*RUN)
    assert one.returncode == 0, one.stdout + one.stderr
    assert guest.run("fallocate", "-p", "-l", "4M", "private").returncode == 0
    options = ["--vcpus", "3", "--slots", "5", "--vm-type", vm_type]
    result = guest.run(*RUN, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every byte was as stored" in result.stdout
    assert number(result.stdout, "passes") == 3
    for what in ("to private", "MAP_PRIVATE"):
        assert number(result.stdout, what) == 3 * number(one.stdout, what)
    too_many = guest.run(*RUN, "--vcpus", "9999")
    assert (too_many.returncode, "--vcpus" in too_many.stderr) == (2, True)


def test_vcpu_that_finds_a_wrong_byte_stops_the_others(guest: Memfs) -> None:
    with running(guest, "--duration", "60", "--vcpus", "3") as process:
        script = "for i in $(seq 200); do head -c 245760 /dev/urandom | dd of=shared bs=1K seek=720 conv=notrunc; done"
        guest.run("sh", "-c", script)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == WRONG_BYTE
    assert "integrity      FAILED: shared memory at gpa" in output


@contextmanager
def running(memfs: Memfs, *options: str) -> Iterator[subprocess.Popen[str]]:
    """kvmsim in the background; over when the block is."""
    process = subprocess.Popen(
        [*RUN, "-v", *options],
        cwd=memfs.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=interruptible,
    )
    try:
        deadline = time.monotonic() + 20
        while memfs.run("stat", "-c", "%b", "private").stdout == "0\n":
            assert time.monotonic() < deadline, "the guest does not start"
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_conversions_by_the_shell_while_it_runs(guest: Memfs) -> None:
    with running(guest, "--duration", "4") as process:
        for _ in range(20):
            assert guest.run("fallocate", "-p", "-o", "64K", "-l", "256K", "private").returncode == 0
            assert guest.run("fallocate", "-o", "800K", "-l", "64K", "private").returncode == 0
            assert guest.run("fallocate", "-p", "-o", "900K", "-l", "32K", "shared").returncode == 0
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "every byte was as stored" in output
    assert number(output, "MAP_SHARED") > 0
    assert number(output, "invalidate begin") == number(output, "end,")
    assert re.search(r"InvalidateBegin private pages \[16, 80\)", output)


def test_verbose_prints_what_others_do_as_the_readme_shows_it(guest: Memfs) -> None:
    with running(guest, "--duration", "3") as process:
        assert guest.run("fallocate", "--offset", "3M", "--length", "64K", "private").returncode == 0
        assert guest.run("fallocate", "--punch-hole", "--offset", "3M", "--length", "64K", "private").returncode == 0
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    seen = [line.split(maxsplit=1)[1].split() for line in output.splitlines() if " pages [" in line]
    pages = ["pages", "[768,", "784)"]
    assert seen == [[name, "private", *pages] for name in ("Fallocate", "InvalidateBegin", "InvalidateEnd")]
    assert number(output, "to private") > 10
    again = guest.run(*RUN, "-vv", "--private-ranges", "0-4K")
    assert again.returncode == 0
    name = "InvalidateEnd" if "no passthrough" in guest.notes else "ConvertBegin"
    assert f"{name:<15} private pages [1, 2)" in again.stdout, "its own conversions, too"


def test_byte_changed_behind_its_back_is_found(guest: Memfs) -> None:
    with running(guest, "--duration", "30") as process:
        script = "for i in $(seq 200); do head -c 245760 /dev/urandom | dd of=shared bs=1K seek=720 conv=notrunc; done"
        guest.run("sh", "-c", script)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == WRONG_BYTE
    assert "integrity      FAILED: shared memory at gpa" in output


def test_killed_kvmsim_leaves_nothing(guest: Memfs) -> None:
    with running(guest, "--duration", "60") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert guest.run("fallocate", "-p", "-l", "1M", "private").returncode == 0
    assert guest.run(*RUN).returncode == 0


@pytest.mark.parametrize("name", ["private", "shared"])
def test_files_that_are_truncated_end_in_a_sentence_and_not_in_a_signal(guest: Memfs, name: str) -> None:
    """fallocate -n allocates past the end of a file, where no memory can be mapped."""
    with running(guest, "--duration", "20") as process:
        script = f"for i in $(seq 20); do truncate -s 0 {name} && fallocate -n -l 1M {name}; done"
        assert guest.run("sh", "-c", script).returncode == 0
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, (process.returncode, output)
    assert output.splitlines()[-1].startswith(f"kvmsim: the run ended: {guest.path}/{name}: ")
    assert "past the end of the file" in output.splitlines()[-1]
    assert "integrity      every byte was as stored" in output


def test_memfs_that_ends_stops_the_guest_with_a_clear_error(guest: Memfs) -> None:
    with running(guest, "--duration", "60") as process:
        guest.process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("kvmsim: the run ended: memfs has")
    assert "integrity      every byte was as stored" in output
    guest.see_end()


def test_mount_that_is_full_ends_the_run_and_is_no_wrong_byte(guest: Memfs) -> None:
    guest.run("fallocate", "-l", f"{(64 << 20) - (64 << 12)}", "filler")
    result = guest.run(*RUN)
    assert result.returncode == 1
    assert "integrity      every byte was as stored" in result.stdout
    assert result.stderr.startswith(f"kvmsim: the run ended: {guest.path}/")
    assert "No space left on device; raise size= " in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_run_that_is_interrupted_prints_its_results(guest: Memfs, number: int, code: int) -> None:
    with running(guest, "--duration", "60") as process:
        time.sleep(1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert re.search(r"accesses +[1-9]", output)
    assert output.splitlines()[-1] == "integrity      every byte was as stored"


REFUSED = {
    "no file": (["--shared", "missing", "--private", "private", "--mem", "4M"], "No such file"),
    "not a memfs": (["--shared", "/etc/passwd", "--private", "private", "--mem", "4M"], "does not lie on a memfs"),
    "one file for both": (["--shared", "private", "--private", "private", "--mem", "4M"], "one file"),
    "private is not sealed": (["--shared", "shared", "--private", "other", "--mem", "4M"], "not guest-sealed"),
    "shared is sealed": (["--shared", "private", "--private", "other", "--mem", "4M"], "guest-sealed"),
    "too little memory": (["--shared", "shared", "--private", "private", "--mem", "64K"], "too small"),
    "not a size": (["--shared", "shared", "--private", "private", "--mem", "lots"], "--mem lots"),
    "no trace": (
        ["--shared", "shared", "--private", "private", "--mem", "4M", "--trace", "missing"],
        "missing: No such file or directory, and no shipped trace (sort)",
    ),
    "not a trace": (
        ["--shared", "shared", "--private", "private", "--mem", "4M", "--trace", "/etc/passwd"],
        "not a trace",
    ),
    "no advice to unpickle it": (
        ["--shared", "shared", "--private", "private", "--mem", "4M", "--trace", "/etc/passwd"],
        "not a trace; `kvmsim convert` makes one",
    ),
    "how to seal it": (["--shared", "shared", "--private", "other", "--mem", "4M"], "memfs create --seals guest"),
    "window": (
        ["--shared", "shared", "--private", "private", "--mem", "4M", "--fault-around", "1g"],
        "--fault-around 1g: not one of",
    ),
    "no window": (
        ["--shared", "shared", "--private", "private", "--mem", "4M", "--fault-around", "12k"],
        "12k: not one",
    ),
    "no socket": (
        ["--shared", "shared", "--private", "private", "--mem", "4M", "--socket", "missing"],
        "missing: No such file",
    ),
    "nobody listens": (
        ["--shared", "shared", "--private", "private", "--mem", "4M", "--socket", "other"],
        "other: Connection refused",
    ),
    "no end of a range": (
        ["--shared", "shared", "--private", "private", "--mem", "4M", "--private-ranges", "5"],
        "--private-ranges 5: not START-END",
    ),
    "not a range": (
        ["--shared", "shared", "--private", "private", "--mem", "4M", "--private-ranges", "5-3"],
        "--private-ranges",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_said_in_a_sentence(guest: Memfs, name: str) -> None:
    options, words = REFUSED[name]
    guest.run("touch", "other")
    result = guest.run(*KVMSIM, "run", *options)
    assert result.returncode == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("duration", ["soon", "nan", "inf", "-1"])
def test_what_is_no_duration_is_wrong_usage(duration: str) -> None:
    result = run(*RUN, "--duration", duration)
    assert result.returncode == 2
    assert "not a number of seconds" in result.stderr


def test_files_of_two_mounts(mount_memfs: MountMemfs) -> None:
    one, other = mount_memfs("size=16m"), mount_memfs("size=16m")
    one.run("touch", "shared")
    other.run(*memfs_command("create", "--seals", "guest", "private"))
    result = one.run(*KVMSIM, "run", "--shared", "shared", "--private", other.path / "private", "--mem", "4M")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "lie on two mounts" in result.stderr


def test_picture_in_ascii(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=16m")
    memfs.run("touch", "shared")
    memfs.run(*memfs_command("create", "--seals", "guest", "private"))
    result = memfs.run(*RUN, "--picture", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stderr) == (0, "")
    assert "# private - shared . absent" in result.stdout


def test_picture_and_timeline_in_files(mount_memfs: MountMemfs, tmp_path: Path) -> None:
    memfs = mount_memfs("size=16m")
    memfs.run("touch", "shared")
    memfs.run(*memfs_command("create", "--seals", "guest", "private"))
    picture, page = tmp_path / "map.svg", tmp_path / "<b>.html"
    assert memfs.run(*RUN, "--picture", picture, "--timeline", page).returncode == 0
    assert picture.read_text().count('fill="#e69f00"') > 1  # the legend is one
    assert picture.read_text().count('fill="#56b4e9"') > 1
    events = events_of(page.read_text())
    assert events
    assert all(seconds > 0 and to_private and by_guest for _, seconds, _, _, to_private, by_guest in events)
    assert sum(pages for _, _, _, pages, _, _ in events) == int(memfs.run("stat", "-c", "%b", "private").stdout) // 8
    for path in (tmp_path / "missing" / "a.svg", tmp_path / "a.gif"):
        refused = memfs.run(*RUN, "--picture", path)
        assert refused.returncode in (1, 2)
        assert str(path) in refused.stderr
        assert not refused.stdout  # the guest has not run


def test_converted_trace_has_the_name_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "lackey").write_text(" L 1000,8\n S 2000,8\n")
    assert run(*KVMSIM, "convert", tmp_path / "lackey", tmp_path / "trace").returncode == 0
    assert "accesses  2" in run(*KVMSIM, "info", tmp_path / "trace").stdout


def test_what_has_no_accesses_is_named() -> None:
    result = run(*KVMSIM, "convert", "/dev/null", "/nonexistent")
    assert result.stderr.startswith("kvmsim: /dev/null: no memory accesses")


@needs("valgrind")
def test_trace_made_from_lackey(tmp_path: Path) -> None:
    lackey, trace = tmp_path / "lackey", tmp_path / "true.npz"
    assert run("valgrind", "--tool=lackey", "--trace-mem=yes", f"--log-file={lackey}", "true").returncode == 0
    made = run(*KVMSIM, "convert", lackey, trace, "--command", "true")
    assert made.returncode == 0, made.stderr
    info = run(*KVMSIM, "info", trace).stdout
    assert "command   true" in info
    assert number(info, "of them stores") > 1000
