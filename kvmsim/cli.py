"""The command `kvmsim`: run a guest over two files of a memfs, and make the traces that it runs.

Exit codes: 0; 1 for anything that went wrong; 2 for wrong usage (argparse's); 3 for a wrong byte in guest memory.
"""

from __future__ import annotations

import argparse
import errno
import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final, NoReturn

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvmsim import __version__
from kvmsim.backing import Notification, StoreGone, socket_of
from kvmsim.command import CommandError, check_files, picture_file, size_of
from kvmsim.ending import WRONG_BYTE, Interrupted, RunEnded, end_by_signal, sentence_of
from kvmsim.engines.kvm.uapi import KvmUnavailable
from kvmsim.engines.native import EngineUnavailable
from kvmsim.engines.trace import IntegrityError, TraceEngine
from kvmsim.engines.trace_file import Trace, TraceError, read_lackey
from kvmsim.fault_points import install_faults
from kvmsim.guests.linux.kernel import ProgramDied
from kvmsim.guests.loading import LoadError
from kvmsim.memory_map import draw, write_picture
from kvmsim.mmu.fault_around import LARGEST_WINDOW
from kvmsim.native_cli import add_commands
from kvmsim.serve_cli import add_command
from kvmsim.side import Side
from kvmsim.slots.memslots import Memslot
from kvmsim.timeline import Timeline
from kvmsim.uapi import KVM_MAX_VCPU_ID, PreFaultMemory
from kvmsim.vcpu import VCPU
from kvmsim.vm import VM, Listener, VmConfig, create_vm
from kvmsim.vm_type import VmType
from kvmsim.vmm.vmm import UnhandledExit, Vmm, open_memory
from memfs.contract import logs
from memfs.contract.protocol.messages import ConvertBegin, ConvertEnd
from memfs.contract.sizes import parse_bytes, parse_size
from memfs.contract.sys.dumpable import hide_memory
from memfs.contract.sys.standard_descriptors import fill_standard_descriptors
from memfs.contract.terminal import Parser, printable
from memfs.contract.units import PAGE_SIZE, Gfn, GfnRange, Gpa, bytes_to_pages, gpa_to_gfn, is_page_aligned

DEFAULT_TRACE: Final = "sort"
_PRINTED_A_SECOND: Final = 1000  # notifications, with -v


_VM_TYPES: Final = {kind.name: kind for kind in (VmType.SNP, VmType.TDX_48, VmType.TDX_52)}


#: What is said in one sentence, and no traceback
_FAILURES: Final = (
    *(CommandError, TraceError, RunEnded, UnhandledExit, StoreGone),
    *(EngineUnavailable, KvmUnavailable, LoadError, ProgramDied),
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit."""
    fill_standard_descriptors()
    options = build_parser().parse_args(arguments)
    install_faults()
    try:
        options.run(options)
        sys.stdout.flush()
    except IntegrityError as error:
        print(f"kvmsim: {printable(error)}", file=sys.stderr)
        sys.exit(WRONG_BYTE)
    except Interrupted as error:
        end_by_signal(error.number)
    except _FAILURES as error:
        sys.exit(f"kvmsim: {printable(error)}")
    except BrokenPipeError:  # `kvmsim info sort | head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        sys.exit(f"kvmsim: {sentence_of(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog="kvmsim", description="The KVM side of guest private memory, in userspace.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a guest", description=_run.__doc__)
    run.add_argument("--shared", metavar="FILE", required=True, help="file of shared memory, on a memfs")
    run.add_argument("--private", metavar="FILE", required=True, help="guest-sealed file of private memory, on it, too")
    run.add_argument("--mem", metavar="SIZE", required=True, help="guest memory in bytes, or with k, m, g, t")
    run.add_argument(
        "--trace",
        metavar="TRACE",
        default=DEFAULT_TRACE,
        help=f".npz, or name of a shipped one ({DEFAULT_TRACE})",
    )
    run.add_argument(
        "--private-ranges",
        metavar="START-END[,...]",
        help="guest physical addresses that the guest means as private, e.g. 0-1m,2m-3m "
        "(default: the lower three quarters of the pages that each vCPU's trace uses, in whole huge pages)",
    )
    run.add_argument(
        "--vm-type",
        choices=sorted(_VM_TYPES),
        default="snp",
        help="how the guest says that it means private memory: C-bit, or bit 47 or 51 of the address (default: snp)",
    )
    run.add_argument(
        "--vcpus",
        metavar="N",
        type=_count,
        default=1,
        help="run the trace on so many vCPUs, each on memory of its own (default: 1)",
    )
    run.add_argument(
        "--slots", metavar="N", type=_count, default=1, help="divide guest memory among so many memslots (default: 1)"
    )
    run.add_argument("--no-map-on-fallocate", action="store_true", help="map private memory on faults only")
    run.add_argument(
        "--fault-around",
        metavar="SIZE",
        default="64k",
        help="ask for so much when absent shared memory is touched, 4k to 2m (default 64k)",
    )
    run.add_argument(
        "--granule",
        choices=["4k", "64k", "2m"],
        default="4k",
        help="how far around a page that is converted empty neighbours are converted as well, and ever farther, up to "
        "2m, if the guest goes on in order; 4k: none are (default: 4k)",
    )
    run.add_argument(
        "--prefault",
        action="store_true",
        help="map all guest memory before the guest runs, each page on its side, allocating what is shared",
    )
    run.add_argument("--socket", metavar="PATH", help="memfs's socket (default: asked of the file)")
    run.add_argument("--duration", metavar="SECONDS", type=_seconds, default=0, help="repeat the trace for so long")
    run.add_argument(
        "--picture",
        metavar="FILE",
        nargs="?",
        const=True,
        type=picture_file,
        help="draw guest memory before and after; or afterwards into FILE, .png or .svg",
    )
    run.add_argument("--timeline", metavar="FILE", help="write to FILE, in HTML, what was converted when")
    run.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=0,
        help="print notifications of what others do to the files; twice: of the guest's own conversions, too",
    )
    run.add_argument("--log-file", metavar="FILE", help="append a log of notifications, with request numbers, to FILE")
    run.set_defaults(run=_run)
    add_commands(commands)
    add_command(commands)

    convert = commands.add_parser("convert", help="make a trace of lackey's output", description=_convert.__doc__)
    convert.add_argument("lackey", metavar="LACKEY", help="what lackey wrote, - for standard input")
    convert.add_argument("trace", metavar="TRACE.npz")
    convert.add_argument(
        "--command", dest="traced", default="", metavar="TEXT", help="what was traced, to be kept with it"
    )
    convert.set_defaults(run=_convert)

    info = commands.add_parser("info", help="show what a trace is", description=_info.__doc__)
    info.add_argument("trace", metavar="TRACE")
    info.set_defaults(run=_info)
    return parser


def _run(options: argparse.Namespace) -> None:
    """Run a trace as a guest over two files of a memfs, convert memory as it asks, and say what happened."""
    hide_memory()  # before there is any of the guest's in it
    if options.log_file:
        logs.set_up([options.log_file], logging.INFO)
    size = size_of(options.mem, "--mem")
    trace = _load(options.trace)
    if (needed := trace.memory_size * options.vcpus) > size:
        raise CommandError(
            f"--mem {options.mem} is too small: the trace uses {needed >> 10} KiB; say --mem {needed >> 10}k"
        )
    private = _ranges(options.private_ranges) if options.private_ranges else _default_private(trace, options.vcpus)
    options.fault_around = _fault_around(options.fault_around)
    for path in (each for each in (options.picture, options.timeline) if isinstance(each, str)):
        Path(path).touch()  # whether it can be written is said before the guest runs
    with open_memory(options.shared, options.private, size, parse_size(options.granule), options.slots) as vmm:
        check_files(vmm, options.shared, options.private)
        socket_path = options.socket or socket_of(vmm.shared)
        trio.run(_simulate, options, vmm, trace, private, socket_path, restrict_keyboard_interrupt_to_checkpoints=True)


async def _simulate(
    options: argparse.Namespace, vmm: Vmm, trace: Trace, private: list[GfnRange], socket_path: str
) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    config = VmConfig(
        name=f"kvmsim-{os.getpid()}",
        map_on_fallocate=not options.no_map_on_fallocate,
        fault_around=options.fault_around,
        vm_type=_VM_TYPES[options.vm_type],
    )
    async with create_vm(socket_path, config) as vm:
        await vmm.add_memory(vm)
        if not options.private_ranges:
            private = [gfns for each in private if (gfns := _in_huge_pages(vm, each)) is not None]
        if options.verbose:
            vm.listeners.append(_printer(console, None if options.verbose > 1 else vmm))
        traces = [trace.at(Gpa(number * trace.memory_size)) for number in range(options.vcpus)]
        engines = [TraceEngine(vm, each, private, repeat_for=options.duration) for each in traces]
        vcpus = [vm.create_vcpu(number, engine) for number, engine in enumerate(engines)]
        gfns = GfnRange(Gfn(0), gpa_to_gfn(Gpa(vmm.size)))
        timeline = Timeline(vmm.is_converting)
        if options.timeline:
            vm.listeners.append(timeline.heard)
        if options.picture is True:
            console.print("guest memory before:", draw(vm, gfns, ascii_only=console.options.ascii_only), sep="\n")
        if options.prefault:
            await _prefault(console, vcpus[0], vmm.size)
        started = time.monotonic()
        with _bar(console) as progress:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_show_progress, progress, engines, options.duration)
                failure = await _run_guest(vmm, vcpus)
                nursery.cancel_scope.cancel()
        title = f"kvmsim run --shared {options.shared} --private {options.private}"
        if options.picture is True:
            console.print("guest memory after:", draw(vm, gfns, ascii_only=console.options.ascii_only), sep="\n")
        elif options.picture:
            write_picture(vm, gfns, title, options.picture)
        if options.timeline:
            timeline.write(title, gfns, options.timeline)
        _report(console, vm, vmm, engines, time.monotonic() - started, failure)
        if isinstance(failure, IntegrityError | Interrupted):
            raise failure
        if failure is not None:  # perhaps in the middle of a conversion, of which nobody will tell us the rest
            raise RunEnded(f"the run ended: {sentence_of(failure)}") from failure
        vm.check()


def _bar(console: Console) -> Progress:
    """Return what shows on a terminal how far something is."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal, transient=True)


async def _prefault(console: Console, vcpu: VCPU, size: int) -> None:
    started, left = time.monotonic(), PreFaultMemory(Gpa(0), size)
    with _bar(console) as progress:
        task = progress.add_task("prefault", total=size)
        while left.size:
            await vcpu.pre_fault_memory(left)
            progress.update(task, completed=size - left.size)
    pages = size // PAGE_SIZE
    console.print(f"{'prefault':13}  {pages:,} pages mapped in {time.monotonic() - started:.2f} s")


async def _run_guest(vmm: Vmm, vcpus: Sequence[VCPU]) -> Exception | None:
    """Run vCPUs until all have halted. Returns what has ended them before, so that the report can still be made."""
    failures: list[Exception] = []

    async def run(vcpu: VCPU) -> None:
        failure = await _run_vcpu(vmm, vcpu)
        if failure is not None:
            failures.append(failure)
            for other in vcpus:
                other.kick()

    async def interrupt(guest: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
        wanted = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN]
        with trio.open_signal_receiver(*wanted) as received:
            task_status.started()
            failures.append(Interrupted(await anext(received)))
        guest.cancel()  # a second signal ends us as if there had been no receiver

    async with trio.open_nursery() as outer:
        with trio.CancelScope() as guest:
            await outer.start(interrupt, guest)
            async with trio.open_nursery() as nursery:
                for vcpu in vcpus:
                    nursery.start_soon(run, vcpu)
        outer.cancel_scope.cancel()
    return failures[0] if failures else None


async def _run_vcpu(vmm: Vmm, vcpu: VCPU) -> Exception | None:
    try:
        await vmm.run(vcpu)
    except OSError as error:
        # What a file operation of the VMM says once memfs is gone, which KVM may not have noticed yet.
        gone = error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        return StoreGone("memfs has gone, and guest memory with it") if gone else error
    except (IntegrityError, UnhandledExit, StoreGone) as error:
        return error
    return None


async def _show_progress(progress: Progress, engines: Sequence[TraceEngine], duration: float) -> None:
    """Show how much of the time is over, or, of a guest that runs once, of the trace of the vCPU that is behind."""
    task, started = progress.add_task("running", total=1.0), time.monotonic()
    while True:
        engine = min(engines, key=lambda each: each.passes + each.progress)
        done = min((time.monotonic() - started) / duration, 1) if duration else engine.progress
        progress.update(task, completed=done, description=f"running, pass {engine.passes + 1}")
        await trio.sleep(0.1)


def _printer(console: Console, silent: Vmm | None) -> Listener:
    """Print notifications, so many a second: others decide how many there are. None of what `silent` is converting."""
    started = second = time.monotonic()
    printed = 0

    def print_notification(message: Notification, slot: Memslot, gfns: GfnRange, side: Side) -> None:
        nonlocal second, printed
        pages = slot.pages_of(gfns) if isinstance(message, ConvertBegin | ConvertEnd) else message.pages
        if silent is not None and silent.is_converting(pages):
            return
        name, now = type(message).__name__, time.monotonic()
        if now - second >= 1:
            if printed > _PRINTED_A_SECOND:
                console.print(f"  {now - started:7.3f}s  and {printed - _PRINTED_A_SECOND:,} more before that")
            second, printed = now, 0
        printed += 1
        if printed <= _PRINTED_A_SECOND:
            console.print(f"  {now - started:7.3f}s  {name:15} {side!s:7} pages {pages}")

    return print_notification


def _report(
    console: Console, vm: VM, vmm: Vmm, engines: Sequence[TraceEngine], seconds: float, failure: Exception | None
) -> None:
    everything, tlbs = vm.mmu.table.everything, [vcpu.tlb for vcpu in vm.vcpus.values()]
    exits = sum((vcpu.exits for vcpu in vm.vcpus.values()), Counter[str]())
    counters = vm.backing.counters
    rows = {
        "accesses": f"{sum(each.accesses for each in engines):,} in {seconds:.2f} s, "
        f"{sum(each.passes for each in engines)} passes of the trace",
        "faults": f"{vm.faults[Side.PRIVATE]:,} private, {vm.faults[Side.SHARED]:,} shared, {vm.mmu.retries:,} retried",
        "exits": ", ".join(f"{count:,} {name}" for name, count in sorted(exits.items())) or "none",
        "conversions": f"{vmm.conversions[Side.PRIVATE]:,} to private, {vmm.conversions[Side.SHARED]:,} to shared",
        "notifications": f"{counters.invalidate_begin:,} invalidate begin, {counters.invalidate_end:,} end, "
        f"{counters.fallocate:,} fallocate, {counters.convert:,} convert",
        "TLB": f"{sum(tlb.hits for tlb in tlbs):,} hits, {sum(tlb.misses for tlb in tlbs):,} misses, "
        f"{sum(tlb.flushes for tlb in tlbs):,} flushes",
        "mapped pages": f"{vm.mmu.table.count(everything, Side.PRIVATE):,} private, "
        f"{vm.mmu.table.count(everything, Side.SHARED):,} shared, in {vm.mmu.table.nr_tables} tables",
        "integrity": f"FAILED: {failure}" if isinstance(failure, IntegrityError) else "every byte was as stored",
    }
    for name, value in rows.items():
        console.print(f"{name:13}  {printable(value)}")


def _convert(options: argparse.Namespace) -> None:
    """Make a trace of what `valgrind --tool=lackey --trace-mem=yes` wrote."""
    with open(0 if options.lackey == "-" else options.lackey, encoding="utf-8", errors="replace") as lines:
        try:
            trace = read_lackey(lines, options.traced)
        except TraceError as error:
            name = "standard input" if options.lackey == "-" else options.lackey
            raise CommandError(f"{name}: {error}") from error
    trace.save(Path(options.trace))
    if trace.glued:
        print(
            f"{trace.glued:,} lines are left out: the program's output stands in them beside an access. "
            "Have valgrind write to a file of its own (--log-file=).",
            file=sys.stderr,
        )
    print(f"{len(trace.records):,} accesses, {trace.memory_size >> 10:,} KiB of guest memory")


def _info(options: argparse.Namespace) -> None:
    """Show what a trace is: the program, its accesses, the memory that it needs."""
    trace = _load(options.trace)
    print(f"command   {printable(trace.command) or 'not known'}")
    print(f"accesses  {len(trace.records):,}, {int(trace.records['write'].sum()):,} of them stores")
    print(f"memory    {trace.memory_size >> 10:,} KiB, {trace.memory_size // PAGE_SIZE:,} pages")


def _load(name: str) -> Trace:
    traces = files("kvmsim") / "traces"
    shipped = sorted(each.name.removesuffix(".npz") for each in traces.iterdir() if each.name.endswith(".npz"))
    if os.path.lexists(name):
        return Trace.load(Path(name))
    if name not in shipped:
        raise CommandError(f"{name}: No such file or directory, and no shipped trace ({', '.join(shipped)})")
    return Trace.load(Path(str(traces / f"{name}.npz")))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: not a number of seconds")
    return seconds


def _fault_around(text: str) -> int:
    """Parse --fault-around. Returns pages. Raises CommandError."""
    nbytes = size_of(text, "--fault-around")
    if nbytes & (nbytes - 1) or nbytes > LARGEST_WINDOW * PAGE_SIZE:
        raise CommandError(f"--fault-around {text}: not one of 4k, 8k, 16k and so on, up to 2m")
    return bytes_to_pages(nbytes)


def _ranges(text: str) -> list[GfnRange]:
    """Parse --private-ranges. Raises CommandError."""
    ranges = []
    for part in text.split(","):
        try:
            numbers = [parse_bytes(bound) for bound in part.split("-")]
        except ValueError:
            numbers = []
        if len(numbers) != 2 or numbers[0] >= numbers[1] or not all(map(is_page_aligned, numbers)):
            raise CommandError(f"--private-ranges {part}: not START-END in bytes, multiples of 4k, as in 0-1m")
        ranges.append(GfnRange(gpa_to_gfn(Gpa(numbers[0])), gpa_to_gfn(Gpa(numbers[1]))))
    return ranges


def _count(text: str) -> int:
    """Parse a number of vCPUs or slots. Raises ValueError, as argparse has it."""
    number = int(text)
    if not 0 < number < KVM_MAX_VCPU_ID:
        raise argparse.ArgumentTypeError(f"{text}: from 1 to {KVM_MAX_VCPU_ID - 1}")
    return number


def _in_huge_pages(vm: VM, gfns: GfnRange) -> GfnRange | None:
    """Return the huge pages around private memory, if it lies on such, as far as there is memory."""
    slots = list(vm.mmu.slots)
    assert slots[0].private is not None
    pages = bytes_to_pages(slots[0].private.granule)
    around = GfnRange(Gfn(gfns.start // pages * pages), Gfn(-(-gfns.end // pages) * pages))
    return around.intersect(GfnRange(slots[0].gfns.start, slots[-1].gfns.end))


def _default_private(trace: Trace, vcpus: int) -> list[GfnRange]:
    pages = trace.memory_size // PAGE_SIZE
    starts = [number * pages for number in range(vcpus)]
    return [GfnRange(Gfn(start), Gfn(start + pages * 3 // 4)) for start in starts if pages * 3 // 4]
