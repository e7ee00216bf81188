"""A wheel, installed by pip in a clean environment or by pipx, brings programs, manual pages and completions."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from memfs import __version__

from .conftest import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    sources = directory / "sources"
    sources.mkdir()
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if names.returncode:
        pytest.skip("not a checkout of git")
    command = ["xargs", "-0", "cp", "--parents", "--target-directory", str(sources)]
    subprocess.run(command, input=names.stdout, cwd=ROOT, check=True)
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", directory, sources, timeout=110)
    if built.returncode:
        pytest.skip(f"no wheel can be built, as without a network: {built.stderr.strip().splitlines()[-1]}")
    [wheel] = directory.glob("*.whl")
    return wheel


def test_wheel_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", clean], check=True)
    subprocess.run([clean / "bin" / "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    libraries = next((clean / "lib").glob("python*/site-packages"))
    assert (libraries / "memfs").is_dir()
    (libraries / "others.pth").write_text(sysconfig.get_paths()["purelib"])  # what it depends on
    for program in ("memfs", "kvmsim", "mount.fuse.memfs"):
        assert run(clean / "bin" / program, "--version", cwd=tmp_path).stdout == f"{program} {__version__}\n"
    share = clean / "share"
    for page in (ROOT / "contrib" / "man").iterdir():
        assert (share / "man" / f"man{page.suffix[1:]}" / page.name).read_bytes() == page.read_bytes()
    assert (share / "bash-completion" / "completions" / "memfs").is_file()
    assert (share / "zsh" / "site-functions" / "_memfs").is_file()
    assert (share / "fish" / "vendor_completions.d" / "memfs.fish").is_file()


def test_pipx_installs_programs_and_manual_pages(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("pipx")
    places = {f"PIPX_{name}": str(tmp_path / name.lower()) for name in ("HOME", "BIN_DIR", "MAN_DIR")}
    command = [sys.executable, "-m", "pipx", "install", "--python", sys.executable, str(wheel)]
    installed = run(*command, env={**os.environ, **places}, timeout=110)
    if "No matching distribution" in installed.stderr:
        pytest.skip("what it depends on cannot be had, as without a network")
    assert installed.returncode == 0, installed.stderr
    for program in ("memfs", "kvmsim", "mount.fuse.memfs"):
        assert run(tmp_path / "bin_dir" / program, "--version", cwd=tmp_path).stdout == f"{program} {__version__}\n"
    for page in (ROOT / "contrib" / "man").iterdir():
        assert (tmp_path / "man_dir" / f"man{page.suffix[1:]}" / page.name).read_bytes() == page.read_bytes()


@pytest.mark.parametrize("program", ["memfs", "kvmsim"])
def test_bash_completes_commands_and_options(program: str) -> None:
    completion = ROOT / "contrib" / "completions" / "bash" / program
    command, option = {"memfs": ("mou", "--fore"), "kvmsim": ("ru", "--sha")}[program]
    for words, expected in (
        ([program, command], {"memfs": "mount", "kvmsim": "run"}[program]),
        ([program, {"memfs": "mount", "kvmsim": "run"}[program], option], option),
    ):
        script = (
            f'source "$1"; shift; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); _shtab_{program}; echo "${{COMPREPLY[@]}}"'
        )
        result = run("bash", "-c", script, "bash", completion, *words)
        assert result.stderr == ""
        assert result.stdout.startswith(expected)
