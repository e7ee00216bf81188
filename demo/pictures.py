"""Take the pictures of the documentation anew: `make pictures` (root; Debian's chromium and chromium-driver).

A guest runs on /mnt/guest, in a mount namespace of this process, while memory is converted beside it; what memfs web,
memfs top and memfs map show of that goes to docs/pictures.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from memfs.cli.watch.sample import Watcher
from memfs.cli.watch.screen import Screen

PICTURES: Final = Path(__file__).parents[1] / "docs" / "pictures"
MOUNT: Final = Path("/mnt/guest")
MEMFS: Final = [sys.executable, "-m", "memfs"]
KVMSIM: Final = [sys.executable, "-m", "kvmsim"]
SIZE: Final = 256 << 20
SECONDS: Final = 40  # for which memory is converted


@contextmanager
def guest() -> Iterator[None]:
    """Have a guest run, of which parts are private and shared."""
    MOUNT.mkdir(exist_ok=True)
    run(*MEMFS, "mount", MOUNT, "-o", "size=1g,socket=/run/memfs/pictures.sock")
    try:
        run(*MEMFS, "create", "--size", SIZE, MOUNT / "shared")
        run(*MEMFS, "create", "--seals", "guest", "--size", SIZE, MOUNT / "private")
        run("fallocate", "-o", "8M", "-l", "96M", MOUNT / "private")
        with (MOUNT / "shared").open("r+b") as file:
            for start, size in ((120, 40), (170, 3), (200, 24)):
                file.seek(start << 20)
                file.write(b"x" * (size << 20))
        files = ["--shared", MOUNT / "shared", "--private", MOUNT / "private"]
        command = [*KVMSIM, "run", *files, "--mem", SIZE, "--vcpus", "2", "--duration", 2 * SECONDS]
        with subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL) as process:
            try:
                yield
            finally:
                process.terminate()
    finally:
        subprocess.run(["umount", "--lazy", str(MOUNT)], check=True)


def run(*command: object) -> None:
    """Run a command. Raises CalledProcessError."""
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def convert(seconds: float) -> None:
    """Convert memory here and there."""
    draw, end = random.Random(7), time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(draw.randrange(6)):
            offset, length = draw.randrange(110, 240), draw.choice((1, 1, 2, 4))
            how = draw.choice(("--keep-size", "--keep-size", "--punch-hole"))
            run("fallocate", how, "-o", f"{offset}M", "-l", f"{length}M", MOUNT / "private")
        time.sleep(draw.random())


@contextmanager
def browser() -> Iterator[Any]:
    """Have a headless Chromium."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1160"):
        options.add_argument(argument)
    driver = Chrome(options=options, service=ChromeService(executable_path=str(shutil.which("chromedriver"))))
    try:
        yield driver
    finally:
        driver.quit()


def take() -> None:
    """Take them, in a mount namespace that nobody else sees."""
    PICTURES.mkdir(exist_ok=True)
    with guest(), browser() as driver:
        web = subprocess.Popen([*MEMFS, "web", str(MOUNT)], stdout=subprocess.PIPE, text=True)
        try:
            assert web.stdout is not None
            driver.get(web.stdout.readline().removeprefix("memfs: ").strip())
            watcher = Watcher([str(MOUNT)])
            before = watcher.look()
            convert(SECONDS)
            top(watcher, before)
            for theme in ("light", "dark"):
                driver.execute_script(f"document.documentElement.dataset.theme = '{theme}'; window.onresize()")
                driver.save_screenshot(str(PICTURES / f"web-{theme}.png"))
            os.chdir(MOUNT)
            run(*MEMFS, "map", "shared", "private", "--output", PICTURES / "map.png")
            os.chdir("/")
        finally:
            web.terminate()
            web.wait()


def top(watcher: Watcher, before: Any) -> None:
    """Write what memfs top shows."""
    console = Console(width=80, height=16, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Screen().render(watcher.look(), before, height=14, clock="12:00:00"))
    drawn = console.export_svg(title="memfs top")
    (PICTURES / "top.svg").write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL))  # from elsewhere


if __name__ == "__main__":
    take()
