"""The command `kvmsim serve`: KVM as a process of its own, for VMMs in others."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import resource
import signal
import socket
import stat

import trio

from kvmsim.command import CommandError
from kvmsim.engines.native import EngineUnavailable, choose
from kvmsim.service.paths import default_socket
from kvmsim.service.server import serve
from kvmsim.vm_type import VmType
from memfs.contract import logs
from memfs.contract.sys.dumpable import hide_memory
from memfs.contract.terminal import Parser


def add_command(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `serve`."""
    parser = commands.add_parser("serve", help="be KVM for VMMs in other processes", description=_serve.__doc__)
    parser.add_argument("--socket", metavar="PATH", help=f"where to listen (default: {default_socket()})")
    parser.add_argument("--memfs", metavar="DIR", help="directory of a memfs, where KVM_CREATE_GUEST_MEMFD makes files")
    parser.add_argument("-v", "--verbose", action="store_true", help="print each call that fails, and why")
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
    """Answer KVM's ioctls over a socket, so that a VMM in another process has VMs whose memory it cannot reach.

    The socket is only for the user who started it, and root. It ends with SIGINT or SIGTERM, and all VMs with it.
    """
    hide_memory()
    logs.set_up([], logging.DEBUG if options.verbose else logging.WARNING)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each descriptor of a VMM's is one here, or some
    path = options.socket or default_socket()
    try:
        choice = choose("kvm")
        vm_type, how = choice.vm_type, "the real KVM runs native code"
    except EngineUnavailable as error:
        vm_type, how = VmType.TDX_48, f"vCPUs run no native code: {error}"
    with _listen(path) as listener:
        try:
            trio.run(_until_signalled, listener, vm_type, options.memfs, f"kvmsim: serving on {path}; {how}")
        finally:
            os.unlink(path)


async def _until_signalled(listener: socket.socket, vm_type: VmType, directory: str | None, ready: str) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        print(ready, flush=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, listener, vm_type, directory)
            async for _ in signals:
                nursery.cancel_scope.cancel()


def _listen(path: str) -> socket.socket:
    """Listen on a path that nobody else listens on. Raises CommandError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o177)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_left_behind(path):
                raise CommandError(f"--socket {path}: {error.strerror}") from error
            os.unlink(path)
            listener.bind(path)
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def _is_left_behind(path: str) -> bool:
    """Return whether there is a socket that nobody listens on any more."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
