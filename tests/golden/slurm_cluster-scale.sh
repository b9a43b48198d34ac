#!/bin/bash
#SBATCH --job-name=scale-scaling
#SBATCH --partition=gpu
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --output=/data/studies/scaling/job/logs/job.log
#SBATCH --open-mode=append
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
# prottrans-hpc VERSION: a scaling study of 3 points on slurm_cluster, one after another
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

measure /data/studies/scaling/points/n0004-r1
measure /data/studies/scaling/points/n0002-r1
measure /data/studies/scaling/points/n0001-r1

/venv/bin/python -P -m prottrans_hpc.launch.stage_process scale-report /data/studies/scaling/job/report.json || true
if [ -n "$stop" ]; then exit 75; fi
exit "$code"
