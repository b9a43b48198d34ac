#!/bin/bash

# Parameters
#SBATCH --account=ABC123
#SBATCH --array=0-15%4
#SBATCH --constraint=gpu
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --job-name=embed-bfd
#SBATCH --mem=0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/data/bfd.h5.farm/embed/submitit/%A_%a_0_log.out
#SBATCH --qos=regular
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --threads-per-core=1
#SBATCH --time=2880

# setup
set -eo pipefail
export PATH=/venv/bin:"$PATH"
export SRUN_CPUS_PER_TASK=64

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /data/bfd.h5.farm/embed/submitit/%A_%a_%t_log.out /venv/bin/python -P -u -m submitit.core._submit /data/bfd.h5.farm/embed/submitit
