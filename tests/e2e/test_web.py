"""`memfs web`: who is let in, what is sent, and the page in a real browser."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any

import pytest
import trio

from memfs.contract.protocol.messages import Registered

from .conftest import STOP_TIMEOUT, Memfs, MountMemfs, memfs_command, run
from .owner import Owner, connected, shell
from .tools import skip_without

pytest.importorskip("hypercorn", reason="hypercorn is not installed")

EVIL = "<img src=x onerror=\"document.title='evil'\">\x1b]0;x\x07"


class Page:
    """A running `memfs web`, and its address."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        match = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]{30,})/", url)
        assert match
        self.port, self.token = int(match[1]), match[2]

    def ask(self, path: str, *, method: str = "GET", host: str | None = None) -> tuple[int, dict[str, str], str]:
        """Return status, headers and content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=STOP_TIMEOUT)
        try:
            connection.request(method, path, headers={} if host is None else {"Host": host})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
        finally:
            connection.close()

    @contextmanager
    def events(self, query: str = "") -> Iterator[Iterator[dict[str, Any]]]:
        """Yield what the stream sends."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=STOP_TIMEOUT)
        try:
            connection.request("GET", f"/{self.token}/events{query}")
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("content-type")) == (200, "text/event-stream; charset=utf-8")
            yield (json.loads(line[6:]) for line in iter(answer.readline, b"") if line.startswith(b"data: "))
        finally:
            connection.close()


@contextmanager
def serving(memfs: Memfs) -> Iterator[Page]:
    """Run `memfs web` for one mount."""
    command = memfs_command("web", memfs.path)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield Page(process, process.stdout.readline().removeprefix("memfs: ").strip())
        finally:
            process.terminate()
            said = process.stderr.read()
            process.wait(STOP_TIMEOUT)
        assert said == ""


@asynccontextmanager
async def vm(memfs: Memfs) -> AsyncIterator[tuple[Owner, int]]:
    """A VM of 4 MiB, of which the first half is private; yields its owner and the number of the private file."""
    for command in (
        memfs_command("create", "--size", "4M", EVIL),
        memfs_command("create", "--seals", "guest", "--size", "4M", "private"),
        ["fallocate", "--length", "2M", "private"],
    ):
        done = await shell(*command, cwd=memfs.path)
        assert done.returncode == 0, done.stderr
    async with connected(memfs.socket) as owner:
        assert isinstance(await owner.register(memfs.path / EVIL), Registered)
        private = await owner.register(memfs.path / "private")
        assert isinstance(private, Registered)
        yield owner, private.ino


async def convert(memfs: Memfs, offset: str) -> None:
    done = await shell("fallocate", "--offset", offset, "--length", "256K", "private", cwd=memfs.path)
    assert done.returncode == 0, done.stderr


def test_only_who_has_the_token_and_means_this_machine_is_answered(mount_memfs: MountMemfs) -> None:
    with serving(mount_memfs("size=8m")) as page:
        status, headers, content = page.ask(f"/{page.token}/")
        assert (status, "<title>memfs</title>" in content) == (200, True)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert (headers["referrer-policy"], headers["cache-control"]) == ("no-referrer", "no-store")
        assert not re.search(r"(?:src|href)=\"(?:\w+:|//)", content)  # nothing from elsewhere
        for name in ("page.js", "page.css"):
            assert page.ask(f"/{page.token}/{name}")[0] == 200
        for path in ("/", "/page.js", f"/{page.token[:-1]}/", f"/{page.token}x/", f"/{page.token}", "//", "/%00/"):
            assert page.ask(path)[0] == 404, path
        for path in (f"/{page.token}/../x", f"/{page.token}/page.js/x", f"/{page.token}/web.py"):
            assert page.ask(path)[0] == 404, path
        for host in ("evil.example", f"evil.example:{page.port}", "127.0.0.1", f"127.0.0.1:{page.port}.evil.example"):
            assert page.ask(f"/{page.token}/", host=host)[0] == 421, host
        assert page.ask(f"/{page.token}/", host=f"localhost:{page.port}")[0] == 200
        assert page.ask(f"/{page.token}/", method="POST")[0] == 405
        assert page.ask(f"/{page.token}/events?mount=/&owner=x")[0] == 400


@pytest.mark.parametrize("where", ["0.0.0.0:0", "[::]:0", "192.0.2.1:80", "example.org:80", "127.0.0.1"])
def test_it_listens_for_this_machine_only(where: str) -> None:
    result = run(*memfs_command("web", "--listen", where))
    assert (result.returncode, "not a" in result.stderr.lower()) == (2, True)


async def test_stream_shows_a_vm_and_what_is_converted(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m")
    async with vm(memfs) as (_, ino):
        with serving(memfs) as page, page.events() as events:
            first = await trio.to_thread.run_sync(next, events)
            [mount] = first["mounts"]
            [shown] = mount["vms"]
            assert (mount["mountpoint"], shown["ino"], shown["pages"], shown["private"]) == (
                str(memfs.path),
                ino,
                1024,
                512,
            )
            assert first["history"]
            await convert(memfs, "3M")
            later = await trio.to_thread.run_sync(next, events)
            while not later["point"]["mounts"][str(memfs.path)]["pages"]["private"]:
                later = await trio.to_thread.run_sync(next, events)
            assert later["point"]["mounts"][str(memfs.path)]["latency"]["count"] >= 1
            query = f"?mount={memfs.path}&owner={shown['owner']}&ino={ino}"
            with page.events(query) as maps:
                drawn = (await trio.to_thread.run_sync(next, maps))["map"]
                assert (drawn["start"], drawn["end"], drawn["cell"]) == (0, 1024, 1)
                assert drawn["cells"] == "1" * 512 + "4" * 256 + "0" * 64 + "4" * 192
            with page.events(f"{query}&start=511&end=513") as maps:
                assert (await trio.to_thread.run_sync(next, maps))["map"]["cells"] == "14"
            with page.events(f"?mount={memfs.path}&owner=999&ino={ino}") as maps:
                assert "gone" in (await trio.to_thread.run_sync(next, maps))["map"]["error"]


async def test_browser_that_stands_still_holds_up_nobody(mount_memfs: MountMemfs) -> None:
    memfs = mount_memfs("size=64m")
    async with vm(memfs):
        with serving(memfs) as page:
            held = [http.client.HTTPConnection("127.0.0.1", page.port) for _ in range(16)]
            try:
                for connection in held:  # none of them reads
                    connection.request("GET", f"/{page.token}/events")
                deadline = time.monotonic() + STOP_TIMEOUT
                while (status := (await trio.to_thread.run_sync(page.ask, f"/{page.token}/events"))[0]) != 503:
                    assert time.monotonic() < deadline, status
                assert page.ask(f"/{page.token}/page.js")[0] == 200
                await convert(memfs, "3M")
            finally:
                for connection in held:
                    connection.close()
            while page.ask(f"/{page.token}/events", method="HEAD")[0] == 503:  # those that have left make room
                assert time.monotonic() < deadline + STOP_TIMEOUT


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A headless Chromium."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    skip_without("chromium", "chromedriver")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--force-dark-mode=0",
    ):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path / 'chromium'}")
    options.add_argument("--window-size=1040,1150")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(executable_path=str(shutil.which("chromedriver"))))
    driver.set_script_timeout(STOP_TIMEOUT)
    try:
        yield driver
    finally:
        driver.quit()


CELLS = "return document.getElementById('map').dataset.cells"
#: The colour of the middle of a cell, as the canvas has it: row and column are arguments
PIXEL = """const canvas = document.getElementById('map'), ratio = canvas.width / canvas.clientWidth;
const across = (canvas.clientWidth - 64) / 64;
const at = [64 + (arguments[1] + 0.5) * across, arguments[0] * 14 + 7].map((each) => Math.round(each * ratio));
return [...canvas.getContext('2d').getImageData(...at, 1, 1).data].slice(0, 3)"""


def until(driver: Any, script: str, is_right: Callable[[Any], bool]) -> Any:
    """Run a script until it returns what is right."""
    deadline = time.monotonic() + STOP_TIMEOUT
    while not is_right(value := driver.execute_script(script)):
        assert time.monotonic() < deadline, value
        time.sleep(0.1)
    return value


async def test_picture_changes_when_fallocate_does(mount_memfs: MountMemfs, browser: Any) -> None:
    memfs = mount_memfs("size=64m")

    def before(page: Page) -> None:
        browser.get(page.url)
        until(browser, CELLS, lambda cells: cells == "1" * 512 + "4" * 512)
        assert browser.execute_script(PIXEL, 12, 3) == browser.execute_script(PIXEL, 15, 60)  # absent, as that

    def after(page: Page) -> None:
        until(browser, CELLS, lambda cells: cells == "1" * 512 + "4" * 256 + "0" * 64 + "4" * 192)
        assert browser.execute_script(PIXEL, 12, 3) == [0xE6, 0x9F, 0x00]
        assert "2.2M private" in browser.execute_script("return document.getElementById('summary').textContent")
        until(browser, "return document.getElementById('latencies-now').textContent", lambda words: "p99 " in words)
        see_names()
        zoom()
        resources = browser.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
        assert resources
        assert all(each.startswith(page.url) for each in resources if "favicon" not in each), resources
        said = browser.get_log("browser")  # what Chromium itself asks for, and how it would draw, apart
        messages = [each for each in said if "favicon" not in each["message"] and each["source"] != "rendering"]
        assert messages == []

    def see_names() -> None:
        text = browser.execute_script("return document.getElementById('vms').textContent")
        assert "<img src=x onerror=" in text
        assert browser.execute_script("return [document.title, document.images.length]") == ["memfs", 0]

    def zoom() -> None:
        click = "document.getElementById('%s').click()"
        for size in (256, 64, 16, 4, 1):  # pages
            browser.execute_script(click % "in")
            until(browser, f"{CELLS}.length", partial(eq, size))
        browser.execute_script(click % "all")
        until(browser, CELLS, lambda now: len(now) == 1024)

    async with vm(memfs):
        with serving(memfs) as page:
            await trio.to_thread.run_sync(before, page)
            await convert(memfs, "3M")
            await trio.to_thread.run_sync(after, page)
