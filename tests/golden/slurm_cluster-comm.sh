#!/bin/bash
#SBATCH --job-name=comm
#SBATCH --partition=gpu
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --output=/data/studies/comm/logs/job.log
#SBATCH --open-mode=append
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
# prottrans-hpc VERSION: comm comm on slurm_cluster, 4 nodes x 8 ranks
set -euo pipefail
run_dir=/data/studies/comm

# Whoever comes later finds the exit code in the run directory, unless the directory is another job's.
next=''
trap 'code=$?; if [ "$next" != refused ]; then printf "%s\n" "$code" > "$run_dir/job.exit-code" || true; fi; exit "$code"' EXIT

export PATH=/venv/bin:"$PATH"
export OMP_NUM_THREADS=8
# With it the ranks of this start know one another from strangers.
PROTTRANS_NONCE=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export PROTTRANS_NONCE
# srun ends with the highest code of all ranks: the first that fails writes its own here.
export PROTTRANS_EXIT_CODE_FILE="$run_dir/.exit-code-$PROTTRANS_NONCE"

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

# One job at a time works in a run directory, and none where nothing is left to do.
next=$(/venv/bin/python -P -m prottrans_hpc.launch.begin slurm "$run_dir")
if [ "$next" = finished ]; then exit 0; fi

srun --export=ALL --nodes=4 --ntasks=32 --ntasks-per-node=8 --cpus-per-task=8 --cpu-bind=cores --kill-on-bad-exit=1 \
    /venv/bin/python -P -m prottrans_hpc comm "$run_dir" &
starter=$!
if [ -n "$stop" ]; then kill -s "$stop" "$starter" 2>/dev/null || true; fi

# A signal ends a wait early; the starter's own exit code comes with a later one.
code=''
while [ -z "$code" ] || [ -n "$interrupted" ]; do
  interrupted='' status=0
  wait "$starter" || status=$?
  if [ -z "$code" ] || [ "$status" -ne 127 ]; then code=$status; fi
done
# The starter may not pass on the exit codes of the ranks; the first that failed has left its own. One that was killed could not:
# the ranks that lost it left 75, which says less than the signal that the starter tells of.
code_file="$run_dir/.exit-code-$PROTTRANS_NONCE" left=''
if [ -s "$code_file" ]; then left=$(cat "$code_file"); fi
if [ "$left" = 75 ] && [ -z "$stop" ] && [ "$code" -gt 128 ]; then left=''; fi
code=${left:-$code}
rm -f "$code_file"
# Killed by the very signal that asks to stop, before it could be taken: stopped all the same.
if [ -n "$stop" ]; then case "$code" in 130 | 138 | 140 | 143) code=75 ;; esac; fi
# Notes how the ranks ended, and settles what becomes of this job and of those that wait for it.
/venv/bin/python -P -m prottrans_hpc.launch.end slurm "$run_dir" "$code" || true
exit "$code"
