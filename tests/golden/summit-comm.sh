#!/bin/bash
#BSUB -P ABC123
#BSUB -J comm
#BSUB -q batch
#BSUB -W 2:00
#BSUB -csm y
#BSUB -n 1513
#BSUB -R "1*{select[((LN)&&(type==any))]order[r15s:pg]span[hosts=1]cu[type=rack:pref=config]}+1512*{select[((CN)&&(type==any))]order[r15s:pg]span[ptile=42]cu[type=rack:maxcus=2]}"
#BSUB -o /data/studies/comm/logs/lsf-%J.log
#BSUB -e /data/studies/comm/logs/lsf-%J.log
#BSUB -wa USR1
#BSUB -wt 10
#BSUB -r
#BSUB -alloc_flags "smt4 nvme"
# LSF may show what a job prints only when it has ended: from here on it goes straight into the log.
exec >>/data/studies/comm/logs/job.log 2>&1
# prottrans-hpc VERSION: comm comm on summit, 36 nodes x 6 ranks
set -euo pipefail
run_dir=/data/studies/comm

# Whoever comes later finds the exit code in the run directory, unless the directory is another job's.
next=''
trap 'code=$?; if [ "$next" != refused ]; then printf "%s\n" "$code" > "$run_dir/job.exit-code" || true; fi; exit "$code"' EXIT

# Modules and virtual environments use variables that are not set.
set +u
module load gcc spectrum-mpi cuda
set -u

export PATH=/venv/bin:"$PATH"
export OMP_NUM_THREADS=7
# With it the ranks of this start know one another from strangers.
PROTTRANS_NONCE=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export PROTTRANS_NONCE
# Whether jsrun ends with the exit code of a rank is not documented: the first that fails writes its own here.
export PROTTRANS_EXIT_CODE_FILE="$run_dir/.exit-code-$PROTTRANS_NONCE"

# What the starter does with a signal is not known. It is shielded from them, and a file asks the ranks instead: rank 0 looks
# for it after every step; then all of them save a checkpoint and end with 75. Its name is that of this start only.
stop_file="$run_dir/.stop-$(printf %s "$PROTTRANS_NONCE" | sha256sum | cut -c 1-16)"
stop='' interrupted=''
# shellcheck disable=SC2317 # the traps call it
pass_on() {
  stop=$1 interrupted=yes
  printf 'SIG%s\n' "$1" > "$stop_file" || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on USR1' USR1
trap 'pass_on USR2' USR2

# One job at a time works in a run directory, and none where nothing is left to do.
next=$(/venv/bin/python -P -m prottrans_hpc.launch.begin lsf "$run_dir")
if [ "$next" = finished ]; then exit 0; fi

(trap '' TERM INT USR1 USR2; exec jsrun -n 216 -r 6 -a 1 -c 7 -g 1 -b packed:7 -l gpu-cpu -d packed /venv/bin/python -P \
    -m prottrans_hpc comm "$run_dir") &
starter=$!

# A signal ends a wait early; the starter's own exit code comes with a later one.
code=''
while [ -z "$code" ] || [ -n "$interrupted" ]; do
  interrupted='' status=0
  wait "$starter" || status=$?
  if [ -z "$code" ] || [ "$status" -ne 127 ]; then code=$status; fi
done
rm -f "$stop_file"
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
/venv/bin/python -P -m prottrans_hpc.launch.end lsf "$run_dir" "$code" || true
exit "$code"
