#!/bin/bash

# Parameters
#SBATCH --account=ABC123
#SBATCH --array=0-3%4
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --job-name=preprocess-bfd
#SBATCH --mem=0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/data/bfd.farm/01-scan/submitit/%A_%a_0_log.out
#SBATCH --partition=batch
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=2880

# setup
set -eo pipefail
module load gcc openmpi
export PATH=/venv/bin:"$PATH"
export SRUN_CPUS_PER_TASK=16

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /data/bfd.farm/01-scan/submitit/%A_%a_%t_log.out /venv/bin/python -P -u -m submitit.core._submit /data/bfd.farm/01-scan/submitit
