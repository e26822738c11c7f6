# shellcheck shell=bash
# All settings of the batch scripts: the only file to change for another account or cluster. As it stands it is for
# Snellius (SURF, Netherlands); the names in it were read in SURF's documentation and public scripts, not tried there.
#
#     source slurm/settings.sh    # once in a login shell, in the repository's folder: sbatch then knows the first part
#
# The batch scripts read this file again when they run.

# ---- where to run: these become options of sbatch; others on its command line go before them ----
export SBATCH_PARTITION=gpu_h100  # gpu_a100 and gpu_h100 have 4 GPUs a node, and at most 120 hours
export SBATCH_GPUS_PER_NODE=4     # with every GPU come a quarter of the node's cores and memory
# export SBATCH_ACCOUNT=...       # the project to be charged, if you have several

# ---- inside a job: a variable of the environment goes before the value here ----
MODULES=${MODULES-2024 Python/3.12.3-GCCcore-13.3.0 CUDA/12.6.0}  # loaded before everything else; empty: none
SCRATCH=${SCRATCH-/scratch-shared/${USER-}}  # large disk of all nodes, for downloaded models and packages; empty: home
WORKERS_PER_NODE=${WORKERS_PER_NODE-}     # processes on every node; empty: one for each GPU
MAX_RESTARTS=${MAX_RESTARTS-3}            # how often torchrun starts the workers anew after one of them has died
MAX_REQUEUES=${MAX_REQUEUES-20}           # how often a job that has reached its time limit is put back into the queue

# ---- several nodes: on Snellius NCCL needs to be told the network device (see SURF's page of known issues) ----
if [[ ${SLURM_NNODES-1} -gt 1 ]]; then
    case ${SLURM_JOB_PARTITION-} in
        gpu_h100) export NCCL_SOCKET_IFNAME=eno2np0 ;;
        gpu_a100) export NCCL_SOCKET_IFNAME=eno1np0 ;;
    esac
fi
