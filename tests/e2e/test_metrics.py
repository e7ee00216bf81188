"""`memfs metrics`, read by prometheus-client's parser and by promtool, and the state that it is made of."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest

from .conftest import STOP_TIMEOUT, Memfs, MountMemfs, memfs_command, run, stat_json
from .test_terminal import KVMSIM
from .tools import needs

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse


@pytest.fixture
def converted(memfs: Memfs) -> Memfs:
    """A memfs on which a guest has run, so that an owner was notified of pages that came and went."""
    (memfs.path / "shared").touch()
    assert memfs.run(*memfs_command("create", "--seals", "guest", "private")).returncode == 0
    guest = memfs.run(*KVMSIM, "run", "--shared", "shared", "--private", "private", "--mem", "16M")
    assert guest.returncode == 0, guest.stderr
    return memfs


def samples(text: str, memfs: Memfs) -> dict[str, float]:
    """Return the values of a memfs by name, and by kind of notification, where there is one."""
    found = {}
    for family in parse(text):
        for sample in family.samples:
            if sample.labels.get("mountpoint") == str(memfs.path):
                kind = sample.labels.get("kind", "") or sample.labels.get("direction", "")
                found[" ".join(filter(None, (sample.name, kind, sample.labels.get("le", ""))))] = sample.value
    return found


def test_metrics_are_the_state(converted: Memfs) -> None:
    said = stat_json(converted.path)
    result = run(*memfs_command("metrics", converted.path))
    assert (result.returncode, result.stderr) == (0, "")
    found = samples(result.stdout, converted)
    assert (found["memfs_up"], found["memfs_size_bytes"]) == (1, said["size"])
    assert found["memfs_used_bytes"] == said["used"] > 0
    assert found["memfs_owners_fenced_total"] == 0
    tallies = said["notifications"]
    assert isinstance(tallies, dict)
    assert tallies
    for kind, tally in tallies.items():
        assert found[f"memfs_notified_pages_total {kind}"] == tally["pages"] > 0
        assert found[f"memfs_notification_duration_seconds_count {kind}"] == tally["count"] > 0
        assert found[f"memfs_notification_duration_seconds_bucket {kind} +Inf"] == tally["count"]


def test_conversions_are_counted_by_direction_with_and_without_an_owner(memfs: Memfs) -> None:
    assert memfs.run("truncate", "-s", "1M", "shared").returncode == 0
    assert memfs.run(*memfs_command("create", "--seals", "guest", "--size", "1M", "private")).returncode == 0
    for command in (["fallocate", "-l", "64K", "private"], ["fallocate", "-p", "-l", "16K", "private"]):
        assert memfs.run(*command).returncode == 0
    assert memfs.run("fallocate", "-l", "64K", "shared").returncode == 0  # which is none
    converted = memfs.run(*memfs_command("convert", "--to", "private", "shared", "private", "0:64k", "512k:4k"))
    if converted.returncode:
        assert "not supported" in converted.stderr  # without passthrough
        assert memfs.run("fallocate", "-l", "64K", "private").returncode == 0
        assert memfs.run("fallocate", "-o", "512K", "-l", "4K", "private").returncode == 0
    found = samples(run(*memfs_command("metrics", memfs.path)).stdout, memfs)
    assert found["memfs_converted_pages_total private"] == 16 + 4 + 1
    assert found["memfs_converted_pages_total shared"] == 4
    assert found["memfs_conversions_total private"] in (2, 3)
    assert found["memfs_conversions_total shared"] == 1
    if "memfs_file_bytes private" in found:  # not on memfds
        assert found["memfs_file_bytes private"] == 17 * 4096
        assert found["memfs_file_bytes private"] + found["memfs_file_bytes ordinary"] == found["memfs_used_bytes"]
    assert (found["memfs_restarts_total"], found["memfs_freed_backlog_bytes"]) == (0, 0)


@needs("promtool")
def test_promtool_finds_nothing_to_say(converted: Memfs, tmp_path: Path) -> None:
    textfile = tmp_path / "memfs.prom"
    assert run(*memfs_command("metrics", "--textfile", textfile, converted.path)).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["memfs.prom"]
    assert textfile.stat().st_mode & 0o777 == 0o644
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=textfile.read_bytes(), capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_scrapes_are_answered_anew(memfs: Memfs) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = memfs_command("metrics", "--listen", f":{port}", memfs.path)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == f"memfs: http://127.0.0.1:{port}/metrics\n"

        def used() -> float:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=STOP_TIMEOUT) as answer:
                return next(
                    float(each.split()[-1]) for each in answer.read().decode().splitlines() if "used_bytes{" in each
                )

        assert used() == 0
        (memfs.path / "file").write_bytes(bytes(8192))
        assert used() == 8192
    finally:
        process.terminate()
        process.communicate(timeout=STOP_TIMEOUT)


def test_memfs_that_does_not_answer_is_not_up(mount_memfs: MountMemfs) -> None:
    stopped, memfs = mount_memfs("size=8m"), mount_memfs("size=8m")
    stopped.process.send_signal(signal.SIGSTOP)
    try:
        result = run(*memfs_command("metrics", stopped.path, memfs.path))
    finally:
        stopped.process.send_signal(signal.SIGCONT)
    assert samples(result.stdout, stopped) == {"memfs_up": 0}
    assert samples(result.stdout, memfs)["memfs_up"] == 1


@pytest.mark.parametrize("where", ["", "localhost", "127.0.0.1:x", "127.0.0.1:99999", "a:b:1x"])
def test_address_that_is_none_is_refused(where: str) -> None:
    result = run(*memfs_command("metrics", "--listen", where))
    assert (result.returncode, "not ADDRESS:PORT" in result.stderr) == (2, True)


def test_state_is_as_documented(converted: Memfs, mount_memfs: MountMemfs) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads((Path(__file__).parents[2] / "docs" / "stat.schema.json").read_text())
    for memfs in (converted, mount_memfs("size=8m,backing=memfd"), mount_memfs("size=8m,huge=always")):
        jsonschema.validate(stat_json(memfs.path), schema)
