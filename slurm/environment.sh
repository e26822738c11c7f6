#!/usr/bin/env bash
# Build the environment in .venv, once, on a node like those that will use it.
#
#     sbatch --gpus-per-node=1 slurm/environment.sh
#     sbatch --gpus-per-node=1 slurm/environment.sh unsloth     # with requirements-unsloth.txt
#SBATCH --job-name=environment
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --time=01:00:00
#SBATCH --output=slurm/logs/%j.log
set -euo pipefail
# shellcheck source=slurm/job.sh
source slurm/job.sh

prepare
make venv ${MODULES:+PYTHON=python3}  # that of the modules
if [[ ${1-} == unsloth ]]; then
    .venv/bin/python -m pip --disable-pip-version-check install --quiet --requirement requirements-unsloth.txt
fi
.venv/bin/python -c 'import torch; print("PyTorch", torch.__version__, "sees", torch.cuda.device_count(), "GPUs")'
say "the environment is ready"
