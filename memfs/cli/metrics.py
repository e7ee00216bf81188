"""`memfs metrics`: what memfs's do, for Prometheus, in OpenMetrics.

Each scrape asks each memfs anew (docs/stat.schema.json says what it answers). One that cannot be asked has memfs_up 0
and nothing else, so that its graphs break off and do not stand still. prometheus-client is an extra (`[metrics]`).
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from memfs.cli.arguments import address, listening_at
from memfs.cli.command import CommandError, Commands
from memfs.cli.replacing import replace
from memfs.cli.states import Answer, Asking, mountpoints, state_at
from memfs.contract.terminal import printable

if TYPE_CHECKING:
    from prometheus_client.core import Metric

#: metric -> name in the state, and what it is
_GAUGES: Final = {
    "memfs_size_bytes": ("size", "Limit of what files may take."),
    "memfs_used_bytes": ("used", "What files take."),
    "memfs_freed_backlog_bytes": ("freed_backlog", "What removed files still take while they are being freed."),
    "memfs_pool_bytes": ("pool", "The machine's pool of huge pages that guest-sealed files lie on."),
    "memfs_pool_free_bytes": ("pool_free", "What is free of that pool."),
    "memfs_inodes": ("nr_inodes", "Limit of files and directories."),
    "memfs_inodes_used": ("inodes_used", "Files and directories."),
    "memfs_open_handles": ("open_handles", "Open files."),
    "memfs_descriptors_used": ("descriptors_used", "Descriptors that files in use take."),
    "memfs_owners": ("owners", "Processes that have registered files, or may."),
    "memfs_registered_files": ("registered_files", "Files that have an owner."),
    "memfs_connections": ("connections", "Connections to the socket."),
    "memfs_notifications_pending": ("pending", "Notifications that owners have not acknowledged."),
    "memfs_passthrough": ("passthrough", "Whether the kernel reads, writes and maps ordinary files itself."),
}
_COUNTERS: Final = {
    "memfs_owners_fenced": ("owners_fenced", "Owners that were cut off for not answering."),
    "memfs_connections_rejected": ("rejected", "Connections that were refused."),
    "memfs_restarts": ("restarts", "How often a daemon was followed by another (survive=)."),
}


def add_to(commands: Commands) -> None:
    """Add the command to those of `memfs`."""
    parser = commands.add_parser("metrics", help="print metrics for Prometheus", description=_run.__doc__)
    parser.add_argument("path", metavar="PATH", nargs="*", help="mountpoints (default: all memfs's that are mounted)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--listen", metavar="ADDRESS:PORT", type=address, help="answer scrapes until a signal")
    how.add_argument(
        "--textfile", metavar="FILE", help="replace FILE, in a directory of node_exporter's textfile collector"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    """Print the metrics of mounted memfs's in OpenMetrics, or answer scrapes of them, or write them to a file."""
    try:
        from prometheus_client import CollectorRegistry, exposition, start_http_server
        from prometheus_client.openmetrics.exposition import generate_latest
    except ImportError as error:
        raise CommandError(
            "metrics are made by prometheus-client, which is not installed "
            "(pip install 'memfs-kvmsim[metrics]'; Debian: python3-prometheus-client)"
        ) from error
    registry = CollectorRegistry()
    registry.register(_Collector(arguments.path))
    if arguments.listen is not None:
        host, port = arguments.listen
        try:
            start_http_server(port, host, registry)
        except OSError as error:
            raise OSError(error.errno, error.strerror, listening_at(host, port)) from error
        print(f"memfs: http://{listening_at(host, port)}/metrics", file=sys.stderr, flush=True)
        threading.Event().wait()
    elif arguments.textfile is not None:
        replace(arguments.textfile, exposition.generate_latest(registry))  # node_exporter reads the older format
    else:
        sys.stdout.write(generate_latest(registry).decode())


class _Collector:
    """What prometheus-client asks at each scrape."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths: Final = paths
        self._asking: Final = Asking(lambda path: partial(state_at, path))
        self._turn: Final = threading.Lock()  # for each scrape comes in a thread of its own

    def describe(self) -> list[Metric]:
        """Return nothing: names are known when memfs's were asked, and none is registered twice."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Ask each memfs, and yield metrics that have the answers of all."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        with self._turn:
            answers = self._asking.ask(self._paths or mountpoints())
        up = GaugeMetricFamily("memfs_up", "Whether a memfs answers.", labels=["mountpoint"])
        for answer in answers:
            up.add_metric([printable(answer.mountpoint)], float(answer.said is not None))
        yield up
        about = InfoMetricFamily("memfs", "What it is mounted with.", labels=["mountpoint"])
        for answer in answers:
            if answer.said is not None:
                said = {name: str(answer.said.get(name, "")) for name in ("version", "backing", "huge")}
                about.add_metric([printable(answer.mountpoint)], said)
        yield about
        for families, names in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for metric, (name, help_) in names.items():
                family = families(metric, help_, labels=["mountpoint"])
                for answer in answers:
                    value = (answer.said or {}).get(name)
                    if isinstance(value, int | float):
                        family.add_metric([printable(answer.mountpoint)], float(value))
                yield family
        yield from _of_kinds(answers)
        yield from _of_conversions(answers)
        yield from _of_notifications(answers)


def _of_kinds(answers: Sequence[Answer[dict[str, Any]]]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    labels = ["mountpoint", "kind"]
    used = GaugeMetricFamily("memfs_file_bytes", "What files take, guest-sealed (private) or ordinary.", labels=labels)
    for answer in answers:
        total, private = ((answer.said or {}).get(name) for name in ("used", "guest_used"))
        if isinstance(total, int) and isinstance(private, int):  # where all lie on memfds, nobody counts by kind
            used.add_metric([printable(answer.mountpoint), "private"], float(private))
            used.add_metric([printable(answer.mountpoint), "ordinary"], float(max(0, total - private)))
    yield used


def _of_conversions(answers: Sequence[Answer[dict[str, Any]]]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily

    labels = ["mountpoint", "direction"]
    calls = CounterMetricFamily("memfs_conversions", "Calls by which memory became private, or shared.", labels=labels)
    pages = CounterMetricFamily("memfs_converted_pages", "Pages that became private, or shared.", labels=labels)
    for answer in answers:
        for side, count in ((answer.said or {}).get("conversions") or {}).items():
            of = [printable(answer.mountpoint), side]
            calls.add_metric(of, float(count["count"]))
            pages.add_metric(of, float(count["pages"]))
    yield calls
    yield pages


def _of_notifications(answers: Sequence[Answer[dict[str, Any]]]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

    labels = ["mountpoint", "kind"]
    pages = CounterMetricFamily("memfs_notified_pages", "Pages that owners were notified of.", labels=labels)
    seconds = HistogramMetricFamily(
        "memfs_notification_duration_seconds",
        "From a notification until its owner acknowledged it, or was cut off.",
        labels=labels,
    )
    for answer in answers:
        for kind, tally in _tallies(answer):
            of = [printable(answer.mountpoint), kind]
            pages.add_metric(of, float(tally["pages"]))
            buckets = [*tally["buckets"].items(), ("+Inf", tally["count"])]
            seconds.add_metric(of, buckets=buckets, sum_value=tally["seconds"])
    yield pages
    yield seconds


def _tallies(answer: Answer[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(((answer.said or {}).get("notifications") or {}).items())
