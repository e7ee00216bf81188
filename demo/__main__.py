"""Show the whole path in less than a minute: mount, seal, register, fault, convert, and what both sides say about it.

In a second act a vCPU runs native code in sealed memory, on the real KVM or an emulator.

Everything is real: a memfs in its own process, kvmsim in another with a guest that repeats a traced program's memory
accesses, and conversions by the shell's fallocate while the guest runs. Nothing is left behind, whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kvmsim.engines.native import EngineUnavailable, choose

SECONDS = 7  # the guest runs so long
MEMFS = [sys.executable, "-m", "memfs"]
BUSYBOX = Path("/bin/busybox")
KVMSIM = [sys.executable, "-m", "kvmsim"]


class DemoError(Exception):
    """Why the demo cannot go on."""


def show(command: list[str], *, background: bool = False) -> None:
    """Print a command as one would type it."""
    words = {sys.executable: "python"}
    text = shlex.join(words.get(word, word) for word in command).replace("python -m ", "") + " &" * background
    print(f"\n\033[1m$ {text}\033[0m" if sys.stdout.isatty() else f"\n$ {text}", flush=True)


def run(command: list[str], cwd: Path, *, may_fail: bool = False) -> None:
    """Show a command, run it, and show what it says."""
    show(command)
    result = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if result.stdout:
        print(result.stdout.rstrip(), flush=True)
    if result.returncode and not may_fail:
        raise DemoError(f"{shlex.join(command)} ended with exit code {result.returncode}")


def say(text: str) -> None:
    """Explain what comes next."""
    print(f"\n# {text}", flush=True)


@contextlib.contextmanager
def mounted(directory: Path) -> Iterator[Path]:
    """Mount a memfs for the block."""
    mountpoint = directory / "guest-memory"
    mountpoint.mkdir()
    command = [*MEMFS, "mount", str(mountpoint), "-o", "size=64m", "--socket", str(directory / "memfs.sock")]
    show(command)
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    if result.returncode:
        raise DemoError(result.stderr.strip().removeprefix("memfs: "))
    try:
        yield mountpoint
    finally:
        unmount = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
        lazily = "-l" if os.geteuid() == 0 else "-z"
        show([*unmount, str(mountpoint)])
        if subprocess.run([*unmount, str(mountpoint)], check=False, capture_output=True).returncode:
            subprocess.run([*unmount, lazily, str(mountpoint)], check=False)


def demonstrate(mount: Path) -> None:
    """Show it all on a mounted memfs."""
    say("One file for memory that the host may touch, one that only the guest may: the guest seal.")
    run(["touch", "shared"], mount)
    run([*MEMFS, "create", "--seals", "guest", "--size", "4M", "private"], mount)
    run([*MEMFS, "seals", "private"], mount)
    run(["cat", "private"], mount, may_fail=True)

    say(f"A guest of 4 MiB that repeats the memory accesses of sort(1) for {SECONDS} s, in a process of its own.")
    command = [*KVMSIM, "run", "--shared", "shared", "--private", "private", "--mem", "4M", "--picture"]
    run(command, mount)
    say("It ran once, and each page that it meant as private was converted when it was first touched.")
    say("Now it runs again, while the shell converts memory under it; kvmsim prints what memfs tells it.")
    command += ["--duration", str(SECONDS), "--verbose"]
    show(command, background=True)
    with subprocess.Popen(command, cwd=mount, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as guest:
        try:
            time.sleep(2.5)
            say("16 pages that the guest does not use become private, then shared again.")
            run(["fallocate", "--offset", "2M", "--length", "64K", "private"], mount)
            time.sleep(0.5)
            run(["fallocate", "--punch-hole", "--offset", "2M", "--length", "64K", "private"], mount)
            time.sleep(0.5)
            say("4 private pages in use are taken away; the guest exits for each one that it touches and gets it back.")
            run(["fallocate", "--punch-hole", "--offset", "64K", "--length", "16K", "private"], mount)
            time.sleep(0.5)
            say("And 32 more pages stay private.")
            run(["fallocate", "--offset", "3M", "--length", "128K", "private"], mount)
            output, _ = guest.communicate(timeout=4 * SECONDS)
        finally:
            if guest.poll() is None:
                guest.kill()
    say("What kvmsim said meanwhile:")
    print(output.rstrip(), flush=True)
    if guest.returncode:
        raise DemoError(f"kvmsim ended with exit code {guest.returncode}")
    run(["df", "-h", "."], mount)


def run_native_code(mount: Path) -> None:
    """Show a real vCPU: native code whose memory is sealed, and what it sees of what the host does."""
    say("Second act: native code. A vCPU runs it in memory that the host cannot read.")
    try:
        choose("auto")
    except EngineUnavailable as error:
        print(f"It cannot be shown here: {error}.")
        return
    run(["touch", "ram"], mount)
    run([*MEMFS, "create", "--seals", "guest", "sealed-ram"], mount)
    memory = ["--shared", "ram", "--private", "sealed-ram"]
    if BUSYBOX.exists() and b"/ld-linux" not in BUSYBOX.read_bytes():
        script = f"echo hello from sealed memory; sha256sum {BUSYBOX}"
        run([*KVMSIM, "exec", *memory, "--mem", "16m", "--root", "/", str(BUSYBOX), "sh", "-c", script], mount)
        say("The same outside; and what the guest used cannot be read:")
        run(["sha256sum", str(BUSYBOX)], mount)
    else:
        print("There is no static busybox here (Debian package busybox-static), so its shell is left out.")
    run(["cat", "sealed-ram"], mount, may_fail=True)
    say("A guest that watches its memory, of which the host takes 4 pages away.")
    command = [*KVMSIM, "selftest", *memory, "watch"]
    show(command, background=True)
    with subprocess.Popen(command, cwd=mount, stdout=subprocess.PIPE, text=True) as guest:
        try:
            assert guest.stdout is not None
            print(guest.stdout.readline().rstrip(), flush=True)
            run(["fallocate", "--punch-hole", "--offset", "8200K", "--length", "16K", "sealed-ram"], mount)
            print(guest.stdout.read().rstrip(), flush=True)
        finally:
            if guest.poll() is None:
                guest.kill()
    if guest.returncode:
        raise DemoError(f"kvmsim ended with exit code {guest.returncode}")


def main() -> None:
    """Run the demo; exit code 0 if all went well."""
    for tool in ("fallocate", "umount"):
        if shutil.which(tool) is None:
            sys.exit(f"demo: {tool} is missing; it is part of util-linux")
    with tempfile.TemporaryDirectory(prefix="memfs-demo-") as directory:
        try:
            with mounted(Path(directory)) as mount:
                demonstrate(mount)
                run_native_code(mount)
        except DemoError as error:
            sys.exit(f"demo: {error}")
    print("\nNothing is left mounted, nothing is left running.")


main()
