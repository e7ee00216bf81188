"""What both processes say of themselves: logs in which one conversion can be followed, and the state on request."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import trio

from memfs.contract.protocol.messages import GetPfn, Hello
from memfs.contract.units import PAGE_SIZE, PageIndex, PageRange
from tests.helpers import packed

from .conftest import Memfs, MountMemfs, memfs_command, run, state_of
from .owner import connected, shell
from .test_hostile_messages import CUT_OFF, Client, settled
from .test_kvmsim import running

LINE = re.compile(r"([\w-]+)=(\"(?:[^\"\\]|\\.)*\"|[^ ]*)(?: |$)")


def events(log: Path) -> list[dict[str, str]]:
    """The lines of a log, as fields."""
    parsed = []
    for line in log.read_text().splitlines():
        found = LINE.findall(line)
        assert "".join(f"{name}={value} " for name, value in found).strip() == line, line
        parsed.append({name: json.loads(value) if value.startswith('"') else value for name, value in found})
    return parsed


def followed(by: str, notifications: list[str]) -> list[tuple[str, str]]:
    """What a log says of notifications: the end of an invalidation is not answered."""
    steps = [(what, notification) for notification in notifications for what in (by, "acknowledged")]
    return [step for step in steps if step != ("acknowledged", "InvalidateEnd")]


@pytest.mark.parametrize("how", ["punch", "allocate", "truncate"])
def test_one_conversion_is_followed_across_both_processes(mount_memfs: MountMemfs, tmp_path: Path, how: str) -> None:
    memfs = mount_memfs("size=64m", "-v")
    memfs.expected.append("level=info")
    memfs.run("touch", "shared")
    memfs.run(*memfs_command("create", "--seals", "guest", "private"))
    command, call, notifications = {
        "punch": (["fallocate", "-p", "-o", "3M", "-l", "64K"], "fallocate", ["InvalidateBegin", "InvalidateEnd"]),
        "allocate": (["fallocate", "-o", "3M", "-l", "64K"], "fallocate", ["Fallocate"]),
        "truncate": (["truncate", "-s", "3M"], "truncate", ["InvalidateBegin", "InvalidateEnd"]),
    }[how]
    log = tmp_path / "kvmsim.log"
    with running(memfs, "--duration", "30", "--log-file", str(log)):
        time.sleep(1)
        marker = len(events(memfs.log))
        assert memfs.run(*command, "private").returncode == 0
        asked = [
            event
            for event in events(memfs.log)[marker:]
            if event["msg"] == call and (how == "truncate" or event["offset"] == str(3 << 20))
        ]
    assert len(asked) == 1
    request = asked[0]["request"]
    assert int(asked[0]["pid"]) > 0
    ours = [event for event in events(memfs.log)[marker:] if event.get("request") == request]
    said = [(event["msg"], event.get("notification")) for event in ours if event["msg"] != "answered"]
    assert said == [(call, None), *followed("notify", notifications)]
    theirs = [event for event in events(log) if event.get("request") == request]
    assert [(event["msg"], event["notification"]) for event in theirs] == followed("notified", notifications)
    if how != "truncate":
        assert ours[-1]["msg"] == "answered"
        assert ours[-1]["error"] == "0"
    stamps = [event["time"] for event in (ours[0], ours[1], theirs[0])]
    assert stamps == sorted(stamps)


async def test_name_of_an_owner_is_no_line_of_its_own(memfs: Memfs) -> None:
    memfs.expected.append(CUT_OFF)
    client = Client(memfs, hello=False)
    client.send(packed(Hello(name='x\ntime=1 level=critical msg="all is lost"'), 1))
    client.socket.recv(100)
    client.send(b"nonsense")
    assert await trio.to_thread.run_sync(client.hung_up)
    client.close()
    assert await settled(lambda: bool(memfs.log.read_text()))
    assert [event["level"] for event in events(memfs.log)] == ["warning"]


async def test_name_of_an_owner_does_nothing_to_a_terminal(memfs: Memfs) -> None:
    client = Client(memfs, hello=False)
    client.send(packed(Hello(name="\x1b[2J\nowner 99"), 1))
    client.socket.recv(100)
    text = await trio.to_thread.run_sync(lambda: run(*memfs_command("stat", memfs.path)).stdout)
    client.close()
    assert '"\\u001b[2J\\nowner 99"' in text
    assert "\x1b" not in text


async def test_offenders_without_number_do_not_fill_the_log(memfs: Memfs) -> None:
    memfs.expected.append(CUT_OFF)
    for _ in range(200):
        client = Client(memfs, hello=False)
        client.send(b"nonsense")
        assert await trio.to_thread.run_sync(client.hung_up)
        client.close()
    assert 0 < len(events(memfs.log)) < 60


async def test_state_on_request(memfs: Memfs) -> None:
    memfs.expected.append("logger=memfs.state")
    path = memfs.path / "private"
    await shell(*memfs_command("create", "--seals", "guest", "--size", "1M", path), cwd=memfs.path)
    await shell("fallocate", "-l", "64K", path, cwd=memfs.path)
    async with connected(memfs.socket) as owner, trio.open_nursery() as nursery:
        registered, fds = await owner.registered(path)
        await owner.ask(GetPfn(registered.file, PageRange(PageIndex(0), PageIndex(2)), False))
        owner.acknowledge, owner.arrived = trio.Event(), trio.Event()
        nursery.start_soon(lambda: shell("fallocate", "-p", "-o", "32K", "-l", "4K", path, cwd=memfs.path))
        await owner.arrived.wait()
        await trio.sleep(0.3)
        text = await trio.to_thread.run_sync(lambda: run(*memfs_command("stat", memfs.path)).stdout)
        state = await trio.to_thread.run_sync(state_of, memfs.path)
        os.kill(memfs.process.pid, signal.SIGUSR1)
        assert await settled(lambda: "msg=file" in memfs.log.read_text())
        owner.acknowledge.set()
        for fd in fds:
            os.close(fd)
    assert (state["owners"], state["registered_files"], state["pending"]) == (1, 1, 1)
    (said,) = state["registry"]
    assert (said["name"], said["acknowledged"]) == ("test", 0)
    (file,) = said["files"]
    assert (file["size"], file["pages"], file["guest"], file["locked"]) == (1 << 20, 16, True, 2)
    (notification,) = said["pending"]
    assert (notification["notification"], notification["pages"]) == ("InvalidateBegin", "[8, 9)")
    assert 0.2 < notification["age"] < 5
    assert notification["request"] > 0
    assert re.search(r"^owner 1  name test  .*acknowledged 0$", text, re.MULTILINE)
    line = r"^  notification InvalidateBegin  file 1  pages \[8, 9\)  request \d+  age \d\.\d+$"
    assert re.search(line, text, re.MULTILINE)
    logged = events(memfs.log)
    assert [event["msg"] for event in logged] == ["state", "owner", "registered file", "pending notification", "file"]
    assert (logged[0]["owners"], logged[0]["used"]) == ("1", str(16 * PAGE_SIZE))
    assert logged[3]["pages"] == "[8, 9)"
    assert (logged[4]["seals"], logged[4]["pages"]) == ("guest", "16")


async def test_state_of_many_owners_fits_into_an_attribute(memfs: Memfs) -> None:
    clients = [await trio.to_thread.run_sync(lambda: Client(memfs, hello=False)) for _ in range(100)]
    for _ in range(7):
        for client in clients[-100:]:
            client.send(packed(Hello(name="\n" * 500), 1))
            assert await trio.to_thread.run_sync(client.socket.recv, 100)
        if len(clients) < 700:
            clients += [await trio.to_thread.run_sync(lambda: Client(memfs, hello=False)) for _ in range(100)]
    state = await trio.to_thread.run_sync(state_of, memfs.path)
    assert state["owners"] == 700
    assert 0 < len(state["registry"]) < 700
    for client in clients:
        client.close()
