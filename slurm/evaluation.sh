#!/usr/bin/env bash
# Run an evaluation script with a worker on every GPU of one or several nodes; they share the tasks.
#
#     sbatch slurm/evaluation.sh run_evaluation_Mini_with_ttt --limit 0
#     sbatch --nodes=2 slurm/evaluation.sh run_evaluation_Llama-rearc_with_ttt --ttt per-task
#
# Before the time limit the workers finish the tasks that they have, and the job goes back into the queue if some are
# left: the next start goes on with them.
#SBATCH --job-name=evaluation
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%j.log
set -euo pipefail
# shellcheck source=slurm/job.sh
source slurm/job.sh

output_folder() {
    # Print the output folder of an evaluation script ($1) that is called with the other arguments.
    local folder=output_${1#run_}
    while shift && (($#)); do
        case $1 in
            --output[-_]path) folder=${2-} ;;
            --output[-_]path=*) folder=${1#*=} ;;
        esac
    done
    echo "$folder"
}

(($#)) || { echo "usage: sbatch slurm/evaluation.sh run_evaluation_... [option...]" >&2; exit 2; }
output=$(output_folder "$@")
prepare
mkdir -p "$output"
rm -f "$output/STOP"  # of the start before this one
run_torchrun "$output" "$@"
