#!/usr/bin/env bash
# Make the virtual environment and install the package into it, editable: scripts/setup.sh demo|test
#
# What is there already is left alone; a second run takes a blink. Variables that are honoured:
#   VENV=.venv        where the environment goes
#   PYTHON            which Python (3.11 or later) makes it
#   PIP_FIND_LINKS    a folder of wheels, as pip reads it; a folder wheels/ in the checkout is used as well
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX
export PYTHONNOUSERSITE=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1

declare -A extras_of=(
  [demo]=train,fast,plots,tensorboard
  [test]=train,fast,plots,tensorboard,mpi,horovod,interop,test
)
profile=${1:-demo}
extras=${extras_of[$profile]:?scripts/setup.sh knows the profiles demo and test}
venv=$(realpath -m "${VENV:-.venv}")
stamp=$venv/.prottrans-$profile

say() { printf '[setup] %s\n' "$*" >&2; }

stop() {
  say "$1"
  exit "$2"
}

# A Python that is too old, or that Debian has cut ensurepip out of, shows only when it is run.
usable() { "$1" -c 'import ensurepip, sys, venv; ensurepip.version(); sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 /usr/bin/python3.11 python3; do
    if usable "$candidate"; then
      echo "$candidate"
      return 0
    fi
  done
  return 1
}

install_python() {
  local packages=(python3 python3-venv) as_root=()
  if ! command -v apt-get >/dev/null || { ((EUID != 0)) && ! sudo -n true 2>/dev/null; }; then
    say "Python 3.11 or later with venv is missing, and this script may not install it. Either run"
    say "    sudo apt-get install ${packages[*]}"
    say "or load it (module load python/3.11), or name one: make demo PYTHON=/path/to/python3.11"
    exit 71
  fi
  ((EUID == 0)) || as_root=(sudo -n)
  say "installing Python with apt-get: ${packages[*]}"
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >&2
}

# Everything that the installation depends on; the place too, because an editable installation holds it.
fingerprint() {
  { echo "$PWD" "$venv" "$extras" && cat setup.cfg setup.py pyproject.toml constraints.txt scripts/setup.sh prottrans_hpc/__init__.py &&
    find launchers prottrans_hpc -type f \( -path 'launchers/*' -o -name '*.c' -o -name '*.h' \) -print0 | LC_ALL=C sort -z | xargs -0 sha256sum; } | sha256sum
}

healthy() { "$venv/bin/python" -c '' 2>/dev/null && head -n 3 "$venv/bin/pip" 2>/dev/null | grep -qF "$venv/bin/"; }

make_venv() {
  healthy && return 0
  if [[ -e $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
    stop "$venv is in the way: it is no virtual environment. Move it, or choose another: VENV=\$HOME/.venvs/prottrans make $profile" 73
  fi
  local python
  python=$(find_python) || { install_python && python=$(find_python); } || stop "no usable Python even after installing one; set PYTHON=/path/to/python3.11" 71
  say "making $venv with $("$python" --version) ($(command -v "$python"))"
  "$python" -m venv --clear "$venv"
}

pip() { "$venv/bin/python" -m pip "$@"; }

install_package() {
  local wheels=() torch
  [[ -d wheels ]] && wheels=(--find-links wheels)
  torch=$(sed -n 's/^torch==//p' constraints.txt)
  # torch first and alone: it is by far the largest, and everything else is resolved around it.
  if ! "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').partition('+')[0] != '$torch')" 2>/dev/null; then
    say "installing torch $torch (about 200 MB for the CPU build; this takes a few minutes)"
    pip install -qq "${wheels[@]}" -c constraints.txt torch
  fi
  say "installing prottrans-hpc[$extras]"
  pip install -qq "${wheels[@]}" -c constraints.txt setuptools wheel
  pip install -qq "${wheels[@]}" -c constraints.txt --no-build-isolation -e ".[$extras]"
  pip check >&2
}

note_missing_kernels() {
  local module
  for module in prottrans_hpc.corpus._kernel prottrans_hpc.train._lamb; do
    "$venv/bin/python" -c "import $module" 2>/dev/null ||
      say "note: $module was not built (a C compiler and Python's headers are needed: apt-get install gcc libc6-dev python3-dev); the slower Python path is used"
  done
}

mkdir -p "$(dirname "$venv")" 2>/dev/null || true
[[ -w $(dirname "$venv") ]] || stop "$(dirname "$venv") cannot be written; choose another place: VENV=\$HOME/.venvs/prottrans make $profile" 77

# Two runs at once would install over each other.
if command -v flock >/dev/null; then
  exec 9>"$venv.lock"
  flock -n 9 || { say "waiting for another set-up of $venv" && flock 9; }
fi

wanted=$(fingerprint)
if healthy && [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  exit 0
fi
make_venv
rm -f "$stamp"
install_package
note_missing_kernels
echo "$wanted" >"$stamp"
say "ready: $venv"
