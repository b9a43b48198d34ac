#!/bin/bash
#BSUB -J "embed-bfd[1-16]%4"
#BSUB -P ABC123
#BSUB -q batch
#BSUB -W 2:00
#BSUB -nnodes 1
#BSUB -wa USR2
#BSUB -wt 10
#BSUB -r
#BSUB -o /data/bfd.h5.farm/embed/submitit/%J_%I_0_log.out
#BSUB -alloc_flags "smt4 nvme"

set -eo pipefail
module load gcc spectrum-mpi cuda
export PATH=/venv/bin:"$PATH"

export SUBMITIT_EXECUTOR=lsf
# What jsrun does with a signal is not known, and compute nodes have no brequeue: warning and requeue go by files.
job=$LSB_JOBID; if [ "${LSB_JOBINDEX:-0}" != 0 ]; then job="${LSB_JOBID}[$LSB_JOBINDEX]"; fi
export SUBMITIT_LSF_WARNING_FILE=/data/bfd.h5.farm/embed/submitit/".warned-$job"
rm -f "$SUBMITIT_LSF_WARNING_FILE" "$SUBMITIT_LSF_WARNING_FILE.requeue"
trap 'touch "$SUBMITIT_LSF_WARNING_FILE" || :' USR2
(trap '' USR2; exec jsrun -n 1 -r 1 -a 1 -c 42 -g 6 -b packed:42 -l gpu-cpu -d packed /venv/bin/python -P -u -m submitit.core._submit /data/bfd.h5.farm/embed/submitit) &
task=$! code=0
# A signal ends a wait early.
while kill -0 "$task" 2>/dev/null; do code=0; wait "$task" || code=$?; done
rm -f "$SUBMITIT_LSF_WARNING_FILE"
if [ -e "$SUBMITIT_LSF_WARNING_FILE.requeue" ]; then
  rm -f "$SUBMITIT_LSF_WARNING_FILE.requeue"
  brequeue "$job" && sleep 600
fi
exit "$code"
