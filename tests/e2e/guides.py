"""The commands of a guide in docs/guides, run as they stand there, and what they print compared with what stands there.

A guide shows sessions of root's shell in blocks of ```console:

    # command                what follows "# ", and after a backslash or within quotes and here-documents "> "
    what it prints           `...` stands for anything, and white space counts as little as in a doctest

All blocks of a guide are one session of bash. It has mounts and processes of its own: /mnt and /run are empty, /etc and
/var are copies, and whatever is left at the end goes with it. Programs of examples/ are in its PATH.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .tools import OTHER_PLACES, mount_namespace

ROOT: Final = Path(__file__).parents[2]
_END: Final = "\x1e"  # of what a command prints
_SETUP: Final = """set -e
mount -t tmpfs tmpfs /run
for each in etc var; do
    mkdir -p /run/copies/$each/upper /run/copies/$each/work
    mount -t overlay overlay -o "lowerdir=/$each,upperdir=/run/copies/$each/upper,workdir=/run/copies/$each/work" /$each
done
mount -t tmpfs tmpfs /mnt
mkdir /mnt/guest
exec bash session
"""


@dataclass(frozen=True)
class Step:
    """A command, and what it prints."""

    command: str
    expected: str


def steps(guide: str) -> list[Step]:
    """Return what a guide has its reader type, in order."""
    found: list[Step] = []
    for block in re.findall(r"^```console\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL):
        assert block.startswith("# "), block
        for each in re.split(r"^# ", block, flags=re.MULTILINE)[1:]:
            first, *lines = each.splitlines()
            more = next((number for number, line in enumerate(lines) if not line.startswith("> ")), len(lines))
            command = "\n".join([first, *(line.removeprefix("> ") for line in lines[:more])])
            found.append(Step(command, "".join(f"{line}\n" for line in lines[more:])))
    return found


def session(guide: str) -> str:
    """Return a script of bash that runs all steps; `compare` reads what it prints."""
    todo = steps(guide)
    assert todo
    return "".join(f"{each.command}\nprintf '{_END}%s{_END}' $?\n" for each in todo)


def run_guide(guide: str, directory: Path, timeout: float) -> None:
    """Run all steps, each as it stands there. Raises AssertionError as `compare` does."""
    said = directory / "said"
    (directory / "session").write_text(f"exec >{said} 2>&1 </dev/null\n{session(guide)}")
    command = mount_namespace(directory, "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation=private")
    path = f"{Path(sys.executable).parent}:{ROOT / 'examples'}:{OTHER_PLACES}:{os.environ['PATH']}"
    try:
        done = subprocess.run(
            [*command, "sh", "-c", _SETUP],
            cwd=directory,
            env={"GUEST": str(ROOT / "build" / "guest")} | os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert said.exists(), done.stderr
    except subprocess.TimeoutExpired:
        pass  # the step that did not end is told by the comparison
    compare(guide, said.read_text(errors="replace"))


def compare(guide: str, said: str) -> None:
    """Raise AssertionError for the first step that has printed something else, or failed and printed nothing."""
    answers = said.split(_END)
    checker, options = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for number, step in enumerate(steps(guide)):
        printed, status = [*answers[2 * number : 2 * number + 2], "it did not end", ""][:2]
        as_expected = checker.check_output(step.expected, printed, options) and (step.expected or status == "0")
        assert as_expected, f"# {step.command}\n{printed[-2000:]}(exit code {status})\n\nexpected:\n{step.expected}"
