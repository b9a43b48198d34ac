#!/usr/bin/env bash
# Install what the tests need to run a real Slurm of eight nodes on this machine: scripts/cluster.sh
#
# Only programs; no daemon is started or configured here: tests/cluster/ runs its own, in namespaces, and takes them down.
# What is there already is left alone. Where this script may not install, it says so and the tests that need it skip.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge iproute2)
programs=(slurmctld slurmd sbatch munged ip)
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '[cluster] %s\n' "$*" >&2; }

missing() {
  local program
  for program in "${programs[@]}"; do
    command -v "$program" >/dev/null || return 0
  done
  return 1
}

missing || exit 0
if ! command -v apt-get >/dev/null; then
  say "the tests on a real Slurm will be SKIPPED: this is no Debian or Ubuntu. They need the programs ${programs[*]}"
  exit 0
fi
as_root=()
if ((EUID != 0)); then
  if ! sudo -n true 2>/dev/null; then
    say "the tests on a real Slurm will be SKIPPED: this script may not install. To have them, run"
    say "    sudo apt-get install --no-install-recommends ${packages[*]}"
    exit 0
  fi
  as_root=(sudo -n)
fi
say "installing with apt-get (about 15 s): ${packages[*]}"
# RUNLEVEL=1: Debian's packages start no daemons then.
install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${packages[@]}")
if ! "${install[@]}" >/dev/null 2>&1 && ! { "${as_root[@]}" apt-get update -qq && "${install[@]}" >/dev/null; }; then
  say "the tests on a real Slurm will be SKIPPED: apt-get could not install ${packages[*]} (see above)"
fi
