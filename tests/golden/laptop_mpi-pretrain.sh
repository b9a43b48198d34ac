#!/bin/bash
# prottrans-hpc VERSION: pretrain tiny_prot_bert-1a2b3c4d on laptop_mpi, 2 nodes x 1 rank
set -euo pipefail
run_dir=/data/runs/tiny_prot_bert-1a2b3c4d

# Whoever comes later finds the exit code in the run directory.
trap 'code=$?; printf "%s\n" "$code" > "$run_dir/job.exit-code" || true; exit "$code"' EXIT

export PATH=/venv/bin:"$PATH"
export OMP_NUM_THREADS=4
# With it the ranks of this start know one another from strangers.
PROTTRANS_NONCE=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export PROTTRANS_NONCE
# Others use this computer, too: a thread that waits for its mates gives its core away.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
# The machine profile has no GPUs: ranks must not share one that happens to be there.
export CUDA_VISIBLE_DEVICES=
# Open MPI refuses to run as root, as one is in many containers, unless told twice.
if [ "$(id -u)" = 0 ]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# A signal goes on to the starter, which tells the ranks: they save a checkpoint and end with 75.
starter='' stop='' interrupted=''
# shellcheck disable=SC2317 # the traps call it
pass_on() {
  stop=$1 interrupted=yes
  if [ -n "$starter" ]; then kill -s "$1" "$starter" 2>/dev/null || true; fi
}
trap 'pass_on USR1' TERM
trap 'pass_on USR1' INT
trap 'pass_on USR1' USR1
trap 'pass_on USR2' USR2

/venv/bin/python -P -m prottrans_hpc.launch.tether mpirun -np 2 --map-by :OVERSUBSCRIBE --bind-to none /venv/bin/python \
    -P -m prottrans_hpc.launch.tether /venv/bin/python -P -m prottrans_hpc pretrain "$run_dir" &
starter=$!
if [ -n "$stop" ]; then kill -s "$stop" "$starter" 2>/dev/null || true; fi

# A signal ends a wait early; the starter's own exit code comes with a later one.
code=''
while [ -z "$code" ] || [ -n "$interrupted" ]; do
  interrupted='' status=0
  wait "$starter" || status=$?
  if [ -z "$code" ] || [ "$status" -ne 127 ]; then code=$status; fi
done
# Killed by the very signal that asks to stop, before it could be taken: stopped all the same.
if [ -n "$stop" ]; then case "$code" in 130 | 138 | 140 | 143) code=75 ;; esac; fi
exit "$code"
