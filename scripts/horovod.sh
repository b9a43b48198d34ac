#!/usr/bin/env bash
# Build Horovod for the virtual environment, once: scripts/horovod.sh [--if-possible]
#
# The wheel holds absolute paths of the environment that it was built in, so it is kept outside the checkout under a key
# of everything that it depends on; a second checkout state or a second run only installs it. With --if-possible
# a machine without a C++ compiler gets a note and exit code 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_USER PIP_TARGET PIP_PREFIX
export PYTHONNOUSERSITE=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1

version=0.28.1
venv=$(realpath -m "${VENV:-.venv}")
toolchain=$PWD/scripts/horovod_cxx20.cmake
export PATH=$venv/bin:$PATH

say() { printf '[horovod] %s\n' "$*" >&2; }
pip() { "$venv/bin/python" -m pip "$@"; }

key_of() {
  "$venv/bin/python" - "$version" "$venv" "$toolchain" <<'PYTHON'
import hashlib, importlib.metadata as metadata, pathlib, platform, sys
version, venv, toolchain = sys.argv[1:]
parts = [version, venv, metadata.version("torch"), metadata.version("openmpi"), platform.python_version(), platform.machine(), pathlib.Path(toolchain).read_text()]
print(hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16])
PYTHON
}

# The build takes minutes and prints nothing of use: show that it lives, and its log if it fails.
build() {
  local log=$1/build.log pid seconds=0
  command -v cmake >/dev/null || pip install -qq -c constraints.txt cmake
  say "building Horovod $version against torch and the environment's Open MPI (about 5 minutes on two cores); log: $log"
  CMAKE_TOOLCHAIN_FILE=$toolchain CMAKE_POLICY_VERSION_MINIMUM=3.5 LDFLAGS="-s -Wl,--as-needed" MPI_HOME=$venv \
    HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 MAKEFLAGS=-j$(nproc) \
    "$venv/bin/python" -m pip wheel --no-deps --no-build-isolation --no-cache-dir -w "$1" "horovod==$version" >"$log" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    if ((++seconds % 60 == 0)); then say "still building, $((seconds / 60)) min"; fi
  done
  wait "$pid" || { tail -n 40 "$log" >&2 && say "the build failed; the whole log is $log" && exit 70; }
}

key=$(key_of) || { say "the environment lacks torch or openmpi: run scripts/setup.sh test first" && exit 71; }
stamp=$venv/.prottrans-horovod
if [[ -f $stamp && $(<"$stamp") == "$key" ]] && "$venv/bin/python" -c 'import importlib.metadata as m; m.version("horovod")' 2>/dev/null; then
  exit 0
fi

cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/prottrans-hpc/horovod-$key
mkdir -p "$cache"
if command -v flock >/dev/null; then
  exec 9>"$cache.lock"
  flock 9
fi

wheel=$(find "$cache" -maxdepth 1 -name 'horovod-*.whl')
if [[ -z $wheel ]]; then
  if ! "${CXX:-g++}" --version >/dev/null 2>&1; then
    say "no C++ compiler (${CXX:-g++}): Horovod cannot be built, and what needs it is skipped. To have it: apt-get install g++ make libc6-dev"
    if [[ ${1:-} == --if-possible ]]; then exit 0; else exit 71; fi
  fi
  building=$(mktemp -d "$cache/building.XXXXXX")
  build "$building"
  mv "$building"/horovod-*.whl "$cache/"
  rm -rf "$building"
  wheel=$(find "$cache" -maxdepth 1 -name 'horovod-*.whl')
fi

say "installing $wheel"
pip install -qq -c constraints.txt --force-reinstall --no-deps "$wheel"
"$venv/bin/python" -c 'import horovod.torch as hvd; hvd.mpi_built() or exit("Horovod was built without MPI")'
echo "$key" >"$stamp"
say "ready"
