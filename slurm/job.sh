# shellcheck shell=bash
# What the batch scripts have in common; they source it in the repository's folder, where sbatch was called.
#
# The end of a job before its time limit: SLURM sends SIGUSR1 to the batch script alone (torchrun would die of it and
# leave its workers running). The workers of an evaluation are then asked to stop, by a file that they look at between
# tasks; torchrun is ended if that takes too long, and at once in a fine-tuning, which goes on from its checkpoints.
# Then the job is put back into the queue if work is left.

# shellcheck source=slurm/settings.sh
source slurm/settings.sh
LOGS=slurm/logs/$SLURM_JOB_ID
STARTS=${SLURM_RESTART_COUNT-0}  # how often this job has been put back into the queue
RESERVE=45                       # seconds before the time limit at which torchrun is ended
LAST_SECONDS=35                  # that torchrun has to end: it gives its workers 30

say() {
    echo "[$(date '+%F %T')] $*"
}

prepare() {
    # Load the modules, and let downloads go to the scratch disk.
    mkdir -p "$LOGS"
    say "job $SLURM_JOB_ID, start $((STARTS + 1)) on $SLURM_JOB_NODELIST, logs of the nodes in $LOGS"
    if [[ -n $MODULES ]]; then
        local modules
        read -ra modules <<<"$MODULES"
        set +u  # not every version of `module` knows it
        module load "${modules[@]}"
        set -u
    fi
    if [[ -n $SCRATCH ]]; then
        mkdir -p "$SCRATCH"
        export HF_HOME=${HF_HOME-$SCRATCH/huggingface} PIP_CACHE_DIR=${PIP_CACHE_DIR-$SCRATCH/pip}
    fi
}

seconds_left() {
    # Print the seconds until the job's time limit; if it has none, those that SIGUSR1 comes early.
    local end
    end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) && end=$(date --date="$end" +%s 2>/dev/null) ||
        end=$(($(date +%s) + 120))
    echo $((end - $(date +%s)))
}

on_signal() {
    [[ -z $end_at ]] || return 0
    end_at=$SECONDS
    if [[ -n $output ]]; then
        touch "$output/STOP"
        end_at=$((SECONDS + $(seconds_left) - RESERVE))
        say "the time limit is near: the workers are asked to stop, and have $((end_at - SECONDS)) seconds"
    fi
}

tasks_are_left() {
    # Tell whether an evaluation that has ended has unfinished tasks; those set aside after crashes are not tried again.
    [[ -n $output ]] && .venv/bin/python - "$output/record.json" <<'PYTHON'
import json, sys
record = json.load(open(sys.argv[1]))
sys.exit(not set(record["unfinished"]) - set(record["set_aside"]))
PYTHON
}

free_port() {
    # Print the number of a port that nothing on this node uses.
    .venv/bin/python -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])'
}

run_torchrun() {
    # Run a script of training_code ($2, with the other arguments) on all nodes; requeue the job if need be; end it.
    # $1: the output folder of an evaluation; empty for a fine-tuning.
    local output=$1 status=0 end_at="" ended="" torchrun
    shift
    trap on_signal USR1
    MASTER=$(hostname):$(free_port)  # this script runs on the first node
    export MASTER STARTS WORKERS_PER_NODE MAX_RESTARTS
    srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --wait=0 \
        --kill-on-bad-exit=1 --open-mode=append --output="$LOGS/node-%n.log" slurm/node.sh "$@" &
    torchrun=$!
    while kill -0 "$torchrun" 2>/dev/null; do
        sleep 1  # a trap runs after it
        if [[ -n $end_at && -z $ended ]] && ((SECONDS >= end_at)); then
            say "torchrun is ended"
            ended=$SECONDS
            scancel --signal=TERM "$SLURM_JOB_ID" || say "scancel failed"  # to the job's steps, not to this script
        elif [[ -n $ended ]] && ((SECONDS >= ended + LAST_SECONDS)); then
            say "torchrun does not end: SLURM will kill it"
            requeue
        fi
    done
    wait "$torchrun" || status=$?
    say "torchrun has ended with status $status"
    if [[ $status != 0 && -n $ended ]]; then
        requeue
    elif [[ $status == 0 && -n $end_at ]] && tasks_are_left; then
        requeue
    fi
    exit "$status"
}

requeue() {
    # Put this job back into the queue, which kills all that is left of it.
    if ((STARTS >= MAX_REQUEUES)); then
        say "there is work left, but the job has been requeued $STARTS times: submit it again to go on"
        exit 1
    fi
    say "there is work left: the job is put back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60
    exit 1
}
