"""The long run: `python -m tests.fuzz --minutes N --seed N [TARGET...]`, which is `make fuzz`.

With atheris (coverage-guided, libFuzzer) where PyPI has it for this Python, else with hypothesis. Starts from the
corpus; what it learns on the way stays in build/fuzz, and so does an input that found something: put that into the
corpus, under a name that says what it was. A target may take 5 seconds and 1 GiB; more is a finding, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

LEARNED = Path("build/fuzz")
TARGETS = ("protocol", "requests", "options", "lackey", "trace")


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz", description="Fuzz memfs and kvmsim.")
    parser.add_argument("--minutes", type=float, default=10, help="for all targets together (default 10)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="to repeat a run")
    parser.add_argument("--inside", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    unknown = set(names) - set(TARGETS)
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    seconds = int(options.minutes * 60 / len(names)) or 1
    if options.inside:
        _run(options.inside, seconds, options.seed)
        return
    print(f"SEED={options.seed}, {seconds} s for each target", flush=True)
    failed = []
    for name in names:  # in a process each, since libFuzzer never returns
        command = [sys.executable, "-m", "tests.fuzz", "--inside", name]
        command += ["--minutes", str(options.minutes / len(names) * len(TARGETS)), "--seed", str(options.seed)]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    sys.exit(f"fuzz: {', '.join(failed)} failed; the inputs are in {LEARNED}" if failed else 0)


def _run(name: str, seconds: int, seed: int) -> None:
    learned = LEARNED / name
    learned.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("atheris") is not None:
        _with_atheris(name, seconds, seed, learned)
    else:
        _with_hypothesis(name, seconds, seed)


def _with_atheris(name: str, seconds: int, seed: int, learned: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["memfs", "kvmsim"]):
        from .targets import TARGETS as functions
    flags = [f"-max_total_time={seconds}", f"-seed={seed}", "-timeout=5", "-rss_limit_mb=1024", "-max_len=4096"]
    flags += [f"-artifact_prefix={learned}-", "-print_final_stats=1", "-verbosity=0"]
    corpus = Path(__file__).with_name("corpus") / name
    atheris.Setup([f"fuzz {name}", *flags, str(learned), str(corpus)], functions[name])
    atheris.Fuzz()


def _with_hypothesis(name: str, seconds: int, seed: int) -> None:
    import hypothesis

    from .targets import TARGETS as functions
    from .test_fuzz import mutations

    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:

        @hypothesis.seed(seed + count)
        @hypothesis.settings(max_examples=2000, database=None, deadline=5000)
        @hypothesis.given(mutations(name))
        def run(data: bytes) -> None:
            functions[name](data)

        run()
        count += 1
    print(f"{name}: {count * 2000} inputs, nothing found")


if __name__ == "__main__":
    main()
