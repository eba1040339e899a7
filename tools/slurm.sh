#!/bin/bash
# Pretrain on every GPU of every node:  sbatch tools/slurm.sh mae --data /data/imagenet --preset base --compile
# OUT names the run's folder, which all nodes must see. Submitted again, or put back into the queue, it goes on where it was.
#SBATCH --job-name=mim --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12
#SBATCH --time=24:00:00 --open-mode=append
#SBATCH --signal=USR1@300        # five minutes before the time is up, every process is told: save and exit
set -uo pipefail

export OUT=${OUT:-runs/$1} WORLD_SIZE=$SLURM_NTASKS MASTER_PORT=29500 OMP_NUM_THREADS=1
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1); export MASTER_ADDR
if [ -e "$OUT/config.json" ]; then set -- "$@" --resume; fi

# one process a GPU, started by Slurm itself, so that its signals reach them without a detour through torchrun
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m mim_nb.pretrain "$@" --out "$OUT"' pretrain "$@"
code=$?
if [ "$code" = 138 ]; then scontrol requeue "$SLURM_JOB_ID"; fi       # 128 + USR1: saved, and not finished
exit "$code"
