#!/usr/bin/env bash
# What a job runs on each of its nodes: torchrun, with one worker for each GPU. Called by run_torchrun in job.sh.
set -euo pipefail

script=$1
shift
workers=${WORKERS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
if ((workers == 0)); then
    echo "no GPUs on $SLURMD_NODENAME: \`source slurm/settings.sh\` before sbatch to get some, or set WORKERS_PER_NODE" >&2
    exit 1
fi
threads=$((SLURM_CPUS_ON_NODE / workers))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-30}  # seconds; logs are no terminals

exec .venv/bin/python -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$workers" --max-restarts "$MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "$SLURM_JOB_ID.$STARTS" \
    --rdzv-conf "is_host=$((SLURM_NODEID == 0))" \
    "training_code/$script.py" "$@"
