"""The files in packaging/: what can be held of them here, and their versions."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prottrans_hpc import __version__

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGING = REPOSITORY / "packaging"
DEFINITION = PACKAGING / "apptainer" / "prottrans.def"
MODULEFILE = PACKAGING / "lmod" / "prottrans-hpc" / f"{__version__}.lua"
EASYCONFIG = PACKAGING / "easybuild" / f"prottrans-hpc-{__version__}-GCCcore-13.2.0.eb"
LMOD = next((path for path in (Path("/usr/share/lmod/lmod/libexec/lmod"), Path(os.environ.get("LMOD_CMD", "/none"))) if path.is_file()), None)
LUA_COMPILER = next(filter(None, map(shutil.which, ("luac", "luac5.4", "luac5.3", "luac5.1"))), None)


def sections() -> dict[str, list[str]]:
    """The sections of the Apptainer definition, as Apptainer cuts them; its header under ""."""
    found: dict[str, list[str]] = {"": []}
    section = ""
    for line in DEFINITION.read_text(encoding="ascii").splitlines():
        if match := re.match(r"%(\w+)", line):
            section = match[1]
            assert section not in found, f"%{section} stands there twice"
            found[section] = []
        else:
            found[section].append(line)
    return found


def test_there_is_one_file_of_each_kind_and_it_is_this_version():
    assert {path for path in PACKAGING.rglob("*") if path.is_file() and path.name != "README.md"} == {DEFINITION, MODULEFILE, EASYCONFIG}
    text = DEFINITION.read_text()
    assert f"image.version {__version__}" in text
    assert f"prottrans-hpc {__version__}:" in text
    assert f"version = '{__version__}'" in EASYCONFIG.read_text()


def test_the_definition_has_the_sections_of_apptainer_and_its_arguments():
    found = sections()
    assert list(found) == ["", "arguments", "files", "post", "environment", "runscript", "test", "labels", "help"]
    header = dict(line.split(": ", 1) for line in found[""] if line and not line.startswith("#"))
    assert header.keys() == {"Bootstrap", "From"}
    given = dict(line.strip().split("=", 1) for line in found["arguments"] if line.strip())
    assert set(re.findall(r"\{\{ (\w+) \}\}", DEFINITION.read_text())) == given.keys()


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_the_scripts_of_the_definition_are_shell(section, shell):
    subprocess.run([shell, "-n"], input="\n".join(sections()[section]), text=True, check=True)


def test_the_definition_copies_what_an_installation_needs():
    sources = [line.split()[0] for line in sections()["files"] if line.strip()]
    assert [name for name in sources if not (REPOSITORY / name).exists()] == []
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    folders = {package.split(".")[0] for package in settings["options"]["packages"].split()} | {
        line.split("=")[1].strip() for line in settings["options"]["package_dir"].strip().splitlines()
    }
    files = {"setup.cfg", "setup.py", "pyproject.toml", "constraints.txt", "launchers"} | set(settings["metadata"]["license_files"].split(", "))
    assert set(sources) >= folders | files | {settings["metadata"]["long_description"].removeprefix("file: ")}


@pytest.mark.parametrize("path", [DEFINITION, EASYCONFIG], ids=lambda path: path.suffix)
def test_what_is_installed_is_an_extra_and_pinned(path):
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    text = path.read_text()
    extras = re.search(r"(?:extras=|\[)(train[a-z,]*)", text)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(settings["options.extras_require"])
    installs = [line for line in text.splitlines() if re.search(r"\bpip install|local_pip (\+|=)", line)]
    assert installs
    assert all("constraints.txt" in line or "local_pip +" in line for line in installs)


def test_the_python_of_the_easyconfig_is_new_enough():
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    least = tuple(map(int, settings["options"]["python_requires"].removeprefix(">=").split(".")))
    version = re.search(r"\('Python', '([\d.]+)'\)", EASYCONFIG.read_text())
    assert version is not None
    assert tuple(map(int, version[1].split(".")))[: len(least)] >= least


def test_the_easyconfig_is_python_with_what_easybuild_asks_for():
    values: dict[str, object] = {}
    exec(compile(EASYCONFIG.read_text(), EASYCONFIG, "exec"), values)
    wanted = {"name", "version", "homepage", "description", "toolchain", "sources", "moduleclass", "sanity_check_paths", "easyblock", "install_cmd"}
    assert wanted <= values.keys()
    assert EASYCONFIG.name == "{name}-{version}-{0}-{1}.eb".format(*values["toolchain"].values(), **values)


def test_easybuild_reads_it():
    pytest.importorskip("easybuild.framework", reason="easybuild-framework is not installed, so its parser does not see the easyconfig")
    program = (
        "import sys; from easybuild.tools.options import set_up_configuration\n"
        "set_up_configuration(args=['--allow-use-as-root-and-accept-consequences'], silent=True)\n"
        "from easybuild.framework.easyconfig.parser import EasyConfigParser\n"
        "values = EasyConfigParser(sys.argv[1]).get_config_dict(); print(values['name'], values['version'])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(EASYCONFIG)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[-2:] == ["prottrans-hpc", __version__], done.stderr


def test_the_modulefile_has_what_lmod_needs():
    text = MODULEFILE.read_text(encoding="ascii")
    assert "help([[" in text
    assert text.count("[[") == text.count("]]")
    for call in ("whatis(", "prepend_path(", "setenv(", "myModuleVersion()"):
        assert call in text
    assert __version__ not in text, "the file's name says the version"


@pytest.mark.skipif(LUA_COMPILER is None, reason="no luac: the modulefile's syntax goes unchecked")
def test_the_modulefile_is_lua():
    assert LUA_COMPILER is not None
    subprocess.run([LUA_COMPILER, "-p", str(MODULEFILE)], check=True)


def load(root: Path) -> subprocess.CompletedProcess[str]:
    """Load the module in a new shell, from a copy that looks for the package in `root`."""
    modules = root / "modules" / "prottrans-hpc"
    modules.mkdir(parents=True)
    text = MODULEFILE.read_text()
    assert '"/opt/apps/prottrans-hpc"' in text
    (modules / MODULEFILE.name).write_text(text.replace("/opt/apps/prottrans-hpc", str(root)))
    script = f"""
eval "$({LMOD} bash use '{modules.parent}')"
code=0; shell=$({LMOD} bash load prottrans-hpc) || code=$?; eval "$shell"
command -v prottrans; echo "$PROTTRANS_HPC_ROOT $PYTHONNOUSERSITE"; exit "$code"
"""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(root), "LMOD_CMD": str(LMOD)}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(LMOD is None, reason="no Lmod (apt-get install lmod): the modulefile is not loaded")
def test_lmod_loads_the_module(tmp_path):
    command = tmp_path / __version__ / "bin" / "prottrans"
    command.parent.mkdir(parents=True)
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    done = load(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(command), f"{tmp_path / __version__} 1"]


@pytest.mark.skipif(LMOD is None, reason="no Lmod (apt-get install lmod): the modulefile is not loaded")
def test_a_module_whose_package_is_not_installed_says_so(tmp_path):
    assert f"is not installed in {tmp_path / __version__}" in load(tmp_path).stderr.replace("\n", " ").replace("  ", " ")
