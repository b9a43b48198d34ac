"""The wheel and the sdist: what is in them, and that they install with and without a working C compiler."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from prottrans_hpc import __version__

NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "demo", "wheels", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.so", "runs", "results"
)
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
KERNELS = {"prottrans_hpc/corpus/_kernel", "prottrans_hpc/train/_lamb"}
NO_COMPILER = pytest.mark.skipif(shutil.which("gcc") is None, reason="NO C COMPILER: the kernels' builds go untested (apt-get install gcc)")


def run(*argv: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(argv, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, sources: Path, out: Path, **environment: str) -> Path:
    """Build without isolation, so that nothing is downloaded; each build in a copy of its own."""
    copy = out / "sources"
    shutil.copytree(sources, copy, ignore=NOT_SOURCES)
    name = run(sys.executable, "-c", BUILD, kind, str(out), cwd=copy, **environment).splitlines()[-1]
    return out / name


def kernels_in(wheel: Path) -> set[str]:
    return {name.partition(".")[0] for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}


@pytest.fixture(scope="module")
def sdist(repository, tmp_path_factory) -> Path:
    """The unpacked sdist."""
    out = tmp_path_factory.mktemp("sdist")
    archive = build("sdist", repository, out)
    with tarfile.open(archive) as tar:
        tar.extractall(out / "unpacked", filter="data")
    return out / "unpacked" / f"prottrans_hpc-{__version__}"


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel made from the sdist, as an installation from an index would make it, without a compiler."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"), CC="/bin/false")


def test_the_list_of_packages_is_the_folders(repository):
    settings = configparser.ConfigParser()
    settings.read(repository / "setup.cfg")
    listed = set(settings["options"]["packages"].split())
    folders = {".".join(path.parent.relative_to(repository).parts) for path in (repository / "prottrans_hpc").rglob("__init__.py")}
    assert listed == folders | {"prottrans_hpc.hpc", "prottrans_hpc.jobs"}
    assert set(settings["options"]["scripts"].split()) == {f"launchers/{path.name}" for path in (repository / "launchers").iterdir()}


def test_the_sdist_holds_what_a_developer_needs(sdist):
    for name in (
        "LICENSE",
        "NOTICE",
        "Makefile",
        "constraints.txt",
        "scripts/setup.sh",
        "hpc/laptop.toml",
        "jobs/tiny_prot_bert.toml",
        "prottrans_hpc/corpus/_kernel.c",
        "tests/conftest.py",
        "data/README.md",
    ):
        assert (sdist / name).is_file(), name


def test_the_wheel_holds_the_profiles_inside_the_package(wheel, repository):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"prottrans_hpc", f"prottrans_hpc-{__version__}.dist-info", f"prottrans_hpc-{__version__}.data"}
    for kind in ("hpc", "jobs"):
        shipped = {f"prottrans_hpc/{kind}/{path.name}" for path in (repository / kind).glob("*.toml")}
        assert shipped
        assert shipped <= names
    modules = {str(path.relative_to(repository)) for path in (repository / "prottrans_hpc").rglob("*.py")}
    assert modules <= names
    launchers = {f"prottrans_hpc-{__version__}.data/scripts/{path.name}" for path in (repository / "launchers").iterdir()}
    assert launchers <= names


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel installed into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target)
    return target


def test_the_installed_package_finds_its_profiles_and_recipes(installed, tmp_path):
    program = """
import prottrans_hpc
from prottrans_hpc import config, machine, recipe
print(prottrans_hpc.__file__)
print(config.find_file("hpc", "laptop"))
print(recipe.read_recipe("tiny_prot_bert").num_steps, machine.read_machine("laptop").name)
"""
    package, profile, read = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert package.startswith(str(installed))
    assert profile.startswith(str(installed))
    assert read == "200 laptop"


def test_the_installed_commands_answer(installed, tmp_path):
    for command in sorted((installed / "bin").iterdir()):
        assert "Usage: prottrans" in run(sys.executable, str(command), "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert __version__ in run(sys.executable, str(installed / "bin" / "prottrans"), "--version", cwd=tmp_path, PYTHONPATH=str(installed))


def test_without_a_compiler_there_are_no_kernels_and_no_error(wheel):
    assert kernels_in(wheel) == set()


def compiler(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@NO_COMPILER
def test_with_a_compiler_both_kernels_are_built(repository, tmp_path):
    assert kernels_in(build("wheel", repository, tmp_path)) == KERNELS


@NO_COMPILER
def test_a_compiler_without_openmp_still_builds_both(repository, tmp_path):
    no_openmp = compiler(tmp_path / "cc", 'for word in "$@"; do [ "$word" = -fopenmp ] && exit 1; done; exec gcc "$@"')
    assert kernels_in(build("wheel", repository, tmp_path, CC=no_openmp, LDSHARED=f"{no_openmp} -shared")) == KERNELS


@NO_COMPILER
def test_a_toolchain_that_cannot_link_is_no_error(repository, tmp_path):
    cannot_link = compiler(tmp_path / "cc", 'for word in "$@"; do [ "$word" = -c ] && exec gcc "$@"; done; echo "ld is missing" >&2; exit 1')
    assert kernels_in(build("wheel", repository, tmp_path, CC=cannot_link, LDSHARED=f"{cannot_link} -shared")) == set()
