#!/usr/bin/env bash
# Run a fine-tuning script on every GPU of one or several nodes, data parallel.
#
#     sbatch slurm/finetuning.sh run_finetuning_Llama-rearc
#     sbatch --nodes=2 slurm/finetuning.sh run_finetuning_Nemo-full
#
# Before the time limit torchrun is ended and the job goes back into the queue: the next start goes on from the last
# checkpoint (option --save-every).
#SBATCH --job-name=finetuning
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%j.log
set -euo pipefail
# shellcheck source=slurm/job.sh
source slurm/job.sh

(($#)) || { echo "usage: sbatch slurm/finetuning.sh run_finetuning_... [option...]" >&2; exit 2; }
prepare
run_torchrun "" "$@"
