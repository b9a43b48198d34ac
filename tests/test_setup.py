"""The set-up script where it has to say no; that it works is shown by every run of `make test`."""

from __future__ import annotations

import os
import subprocess

import pytest


@pytest.fixture
def set_up(repository):
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([repository / "scripts" / "setup.sh", *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=60)

    return run


def test_a_folder_in_the_way_is_left_alone(set_up, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.txt").write_text("years of work")
    done = set_up("demo", VENV=str(tmp_path / "venv"))
    assert done.returncode == 73
    assert "it is no virtual environment" in done.stderr
    assert [path.name for path in (tmp_path / "venv").iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_comes_with_another(set_up, tmp_path):
    tmp_path.chmod(0o500)
    done = set_up("demo", VENV=str(tmp_path / "venv"))
    assert done.returncode == 77
    assert "VENV=$HOME/.venvs/prottrans make demo" in done.stderr


def test_an_unknown_profile_lists_the_known_ones(set_up, tmp_path):
    done = set_up("everything", VENV=str(tmp_path / "venv"))
    assert done.returncode != 0
    assert "knows the profiles demo and test" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_python_and_without_the_right_to_install_it_the_commands_are_printed(set_up, repository, tmp_path):
    """A machine where no candidate is usable: a copy of the script whose candidates are taken away."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "realpath", "mkdir", "cat", "find", "sort", "xargs", "sha256sum", "head", "grep", "ls", "flock", "sed"):
        (tools / name).symlink_to(os.path.realpath(f"/usr/bin/{name}"))
    copy = tmp_path / "checkout"
    (copy / "scripts").mkdir(parents=True)
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "constraints.txt", "launchers", "prottrans_hpc"):
        (copy / name).symlink_to(repository / name)
    script = (repository / "scripts" / "setup.sh").read_text()
    assert "/usr/bin/python3.11" in script
    (copy / "scripts" / "setup.sh").write_text(script.replace("/usr/bin/python3.11", "/nowhere/python3.11"))
    done = subprocess.run(["/bin/bash", copy / "scripts" / "setup.sh", "demo"], env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 71
    assert "sudo apt-get install python3 python3-venv" in done.stderr
    assert "module load" in done.stderr
    assert not (copy / ".venv").exists()
