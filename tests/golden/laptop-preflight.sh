#!/bin/bash
# prottrans-hpc VERSION: pretrain first on laptop, 2 nodes x 1 rank
set -euo pipefail
run_dir='/data/my runs/first'

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

# A signal goes on to the starter, which tells the ranks: they save a checkpoint and end with 75.
starter='' stop='' interrupted=''
# shellcheck disable=SC2317 # the traps call it
pass_on() {
  stop=$1 interrupted=yes
  if [ -n "$starter" ]; then kill -s "$1" "$starter" 2>/dev/null || true; fi
}
trap 'pass_on TERM' TERM
trap 'pass_on TERM' INT
trap 'pass_on USR1' USR1
trap 'pass_on USR2' USR2

# The network between this job's own nodes is measured first. Where a node is slow, or nothing could be measured, no rank of the training starts.
/venv/bin/python -P -m prottrans_hpc.launch.preflight local "$run_dir" -- /venv/bin/python -P -m \
    prottrans_hpc.launch.local_ranks --nodes 2 --ranks-per-node 1 --run-dir "$run_dir" --hold-stop-signals -- \
    /venv/bin/python -P -m prottrans_hpc preflight "$run_dir" &
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
if [ "$code" -ne 0 ]; then
  exit "$code"
fi

/venv/bin/python -P -m prottrans_hpc.launch.local_ranks --nodes 2 --ranks-per-node 1 --run-dir "$run_dir" \
    --hold-stop-signals -- /venv/bin/python -P -m prottrans_hpc pretrain "$run_dir" &
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
