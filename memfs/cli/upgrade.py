"""`memfs upgrade`: a mounted memfs is served by the code of this program from now on.

All that may be wrong with this code shows before anything is touched: it is loaded, asks the keeper that there is for
the mount, and looks whether it can read the state; and until it serves, the other one can go on (memfs/upgrade.py).

What it becomes was started elsewhere than what it replaces. So it moves into the same cgroup, for memory is charged to
that, and takes over standard error and how to reach the service manager. What a unit forbids its processes (system
calls, the network) this one may do until the unit is restarted.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from memfs import __version__
from memfs.cli.background import prepare, serve_in_background
from memfs.cli.command import CommandError, Commands
from memfs.cli.states import number, state_of
from memfs.contract import logs
from memfs.contract.on_memfs import locate
from memfs.contract.terminal import quoted
from memfs.inherited import InheritedError, raise_limits

if TYPE_CHECKING:
    from memfs.opening import Opened

_CGROUPS: Final = "/sys/fs/cgroup"


def add_to(commands: Commands) -> None:
    """Add the command to those of `memfs`."""
    parser = commands.add_parser(
        "upgrade", help="have a mounted memfs served by this version", description=_upgrade.__doc__
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT")
    parser.set_defaults(run=_upgrade)


def _upgrade(arguments: argparse.Namespace) -> None:
    """Have a memfs that was mounted with survive=on served by this version of the program, older or newer.

    Who uses it waits for a moment. If this version cannot take over, nothing changes.
    """
    path = arguments.mountpoint
    with locate(path, last_link=True) as mount:
        state, mounter = state_of(mount), mount.mounter
    keeper = state.get("keeper_socket")
    if not isinstance(keeper, str):
        why = state.get("no_survival_because") or "nobody listens for an upgrade"
        raise CommandError(f"{path}: it cannot be handed over ({why}); unmount it and mount it anew")
    if os.geteuid() != 0:
        raise CommandError(f"{path}: an upgrade is for root; run it as root")
    if mounter != os.geteuid():  # and could say anything
        raise CommandError(f"{path}: user {mounter} has mounted it, and root did not: it is not taken over")
    pid = number(state, "pid")
    if not os.path.samefile(f"/proc/{pid}/ns/mnt", "/proc/self/ns/mnt"):
        raise CommandError(f"{path}: it was mounted in another mount namespace; go there: nsenter -t {pid} -m")
    serve_in_background(
        functools.partial(_serve, keeper, pid),
        "this version did not come up, and the one before goes on; the log says why",
    )
    with locate(path, last_link=True) as mount:
        now = state_of(mount)
    outage = now.get("last_outage")
    waited = f" after {outage:.3f} s" if isinstance(outage, float) else ""
    print(f"memfs: {quoted(path)} is served by {now.get('version')} now (it was {state.get('version')}){waited}")


def _serve(keeper: str, worker: int, ready: Callable[[list[str]], None], not_kept: Sequence[int]) -> None:
    """Take the mount over from a keeper, and serve it. Raises CommandError."""
    prepare()
    from memfs import fault_points
    from memfs.adoption import AdoptionError
    from memfs.daemon import run
    from memfs.upgrade import UpgradeError

    fault_points.install_faults()
    _join_cgroups_of(worker)
    try:
        raise_limits()
        run(lambda: _take(keeper), ready, not_kept)
    except (AdoptionError, InheritedError, UpgradeError) as error:
        raise CommandError(f"no upgrade to {__version__}: {error}; nothing has changed") from error


def _take(path: str) -> Opened:
    """Return the mount that a keeper has."""
    from memfs.adoption import adopt
    from memfs.upgrade import Predecessor

    predecessor = Predecessor(path)
    said = predecessor.said
    os.environ.update(said["environment"])
    for fd, standard in ((predecessor.output, 1), (predecessor.error, 2)):
        os.dup2(fd, standard)
        os.close(fd)
    logs.set_up(said["log"], said["level"], when_needed=True)
    opened = adopt(predecessor.mount, predecessor)
    opened.is_stored = said["is_stored"]
    return opened


def _join_cgroups_of(pid: int) -> None:
    """Move this process to where another one is, as far as that can be done."""
    with open(f"/proc/{pid}/cgroup") as lines:
        groups = [line.rstrip("\n").split(":", 2) for line in lines]
    for _, controllers, group in groups:
        directory = os.path.join(_CGROUPS, controllers.removeprefix("name="), group.lstrip("/"))
        with suppress(OSError), open(os.path.join(directory, "cgroup.procs"), "w") as processes:
            processes.write(str(os.getpid()))
