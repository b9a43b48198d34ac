#!/bin/bash

# Parameters
#SBATCH --account=ABC123
#SBATCH --array=0-3%4
#SBATCH --constraint=nvme
#SBATCH --cpus-per-task=56
#SBATCH --exclusive
#SBATCH --gpu-bind=closest
#SBATCH --gpus-per-node=8
#SBATCH --job-name=preprocess-bfd
#SBATCH --mem=0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/data/bfd.farm/01-scan/submitit/%A_%a_0_log.out
#SBATCH --partition=batch
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=120

# setup
set -eo pipefail
module load PrgEnv-gnu/8.7.0 cpe/26.03 rocm/7.1.1 craype-accel-amd-gfx90a rccl-net-plugin
export LD_LIBRARY_PATH=$CRAY_LD_LIBRARY_PATH:$LD_LIBRARY_PATH
export NCCL_SOCKET_IFNAME=hsn0,hsn1,hsn2,hsn3
export MIOPEN_USER_DB_PATH=/tmp/miopen-$USER MIOPEN_CUSTOM_CACHE_DIR=/tmp/miopen-$USER
export PATH=/venv/bin:"$PATH"
export SRUN_CPUS_PER_TASK=56

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /data/bfd.farm/01-scan/submitit/%A_%a_%t_log.out /venv/bin/python -P -u -m submitit.core._submit /data/bfd.farm/01-scan/submitit
