#!/bin/bash
#BSUB -P ABC123
#BSUB -J scale-scaling
#BSUB -q batch
#BSUB -W 2:00
#BSUB -nnodes 36
#BSUB -o /data/studies/scaling/job/logs/lsf-%J.log
#BSUB -e /data/studies/scaling/job/logs/lsf-%J.log
#BSUB -wa USR1
#BSUB -wt 10
#BSUB -r
#BSUB -alloc_flags "smt4 nvme"
# LSF may show what a job prints only when it has ended: from here on it goes straight into the log.
exec >>/data/studies/scaling/job/logs/job.log 2>&1
# prottrans-hpc VERSION: a scaling study of 3 points on summit, one after another
set -uo pipefail
exit_file=/data/studies/scaling/job/job.exit-code
trap 'code=$?; printf "%s\n" "$code" > "$exit_file" || true; exit "$code"' EXIT

# A signal goes on to the point that runs; those after it are left for the next job.
point='' stop='' code=0
# shellcheck disable=SC2317 # the traps call it
pass_on() { stop=$1; if [ -n "$point" ]; then kill -s "$1" "$point" 2>/dev/null || true; fi; }
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on USR1' USR1
trap 'pass_on USR2' USR2
measure() {
  if [ -n "$stop" ]; then return; fi
  local status=''
  bash "$1/job.sh" &
  point=$!
  while [ -z "$status" ] || kill -0 "$point" 2>/dev/null; do status=0; wait "$point" || status=$?; done
  point=''
  if [ "$status" -ne 0 ]; then echo "$1 ended with exit code $status" >&2; code=$status; else rm -rf "$1/checkpoints"; fi
}

measure /data/studies/scaling/points/n0036-r1
measure /data/studies/scaling/points/n0018-r1
measure /data/studies/scaling/points/n0001-r1

# Modules and virtual environments use variables that are not set.
set +u
module load gcc spectrum-mpi cuda
set -u

/venv/bin/python -P -m prottrans_hpc.launch.stage_process scale-report /data/studies/scaling/job/report.json || true
if [ -n "$stop" ]; then exit 75; fi
exit "$code"
