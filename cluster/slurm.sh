#!/usr/bin/env bash
# A Ray cluster inside one Slurm job, with the sweep on it:
#
#   sbatch --nodes 4 cluster/slurm.sh python sweeps/ablation.py --preset voc --seeds 3 ...
#
# from the project's folder, which must lie on a file system that all nodes share; relative paths start there.
# Before the time limit, or when the job is preempted, the command gets SIGTERM, saves and stops, and the job is
# queued again; the same command then goes on where it stopped. The log is cosa-JOB.log, Ray's are in runs/slurm-JOB.
#
# MLFLOW_TRACKING_URI or --tracking-uri names a tracking server of yours. Without one the job runs its own, on the
# folder runs/mlflow. `bash cluster/secrets.sh` makes the token and the login once.
#SBATCH --job-name=cosa
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
#SBATCH --open-mode=append
#SBATCH --output=cosa-%j.log
set -euo pipefail

if [[ $# -eq 0 || -z ${SLURM_JOB_ID:-} ]]; then
    echo "usage: sbatch [--nodes N] cluster/slurm.sh python sweeps/ablation.py ..." >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR"
if [[ -r .venv/bin/activate ]]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi

token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
if [[ $(stat --format %a "$token" 2> /dev/null) != 600 || ! -s $token ]]; then
    echo "Ray's token must be a file of mode 600, got none at $token; run: bash cluster/secrets.sh" >&2
    exit 2
fi
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1

# Ports of this job alone, since nodes may be shared; Ray itself uses 10002 to 19999 for workers.
port=$((20000 + SLURM_JOB_ID % 4000))
dashboard=$((24000 + SLURM_JOB_ID % 4000))
tracking=$((28000 + SLURM_JOB_ID % 4000))
# Ray puts sockets there, whose paths must be short.
folder=/tmp/cosa-ray-$SLURM_JOB_ID
logs=runs/slurm-$SLURM_JOB_ID
mkdir -p "$logs"

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]}
on_head=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head")

# The head answers on the cluster's private network and on no public address.
private='^(10\.|192\.168\.|172\.(1[6-9]|2[0-9]|3[01])\.|100\.(6[4-9]|[7-9][0-9]|1[01][0-9]|12[0-7])\.)'
address=${COSA_HEAD_ADDRESS:-$("${on_head[@]}" hostname -I | tr ' ' '\n' | grep --extended-regexp --max-count=1 "$private" || true)}
if [[ -z $address ]]; then
    echo "$head must have an address on a private network, found none; name one: COSA_HEAD_ADDRESS=..." >&2
    exit 1
fi

command=0
noticed=
# shellcheck disable=SC2329 # called by the trap
notice() {
    noticed=1
    if [[ $command -gt 0 ]]; then
        kill -TERM "$command" 2> /dev/null || true
    fi
}
trap notice TERM
# shellcheck disable=SC2329 # called by the trap
finish() {
    # Steps end with SIGTERM; what does not is ended by Slurm with the job.
    # shellcheck disable=SC2046
    kill -TERM $(jobs -p) 2> /dev/null || true
    wait || true
    srun --overlap --nodes="${#hosts[@]}" --ntasks="${#hosts[@]}" rm -rf "$folder" || true
}
trap finish EXIT

echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): ${#hosts[@]} nodes, head $head at $address:$port"
"${on_head[@]}" ray start --head --block --disable-usage-stats --temp-dir "$folder" \
    --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
    --num-cpus="${SLURM_CPUS_PER_TASK:-8}" > "$logs/head.log" 2>&1 &
export RAY_ADDRESS=$address:$port
until ray health-check --address "$RAY_ADDRESS" > /dev/null 2>&1; do
    if [[ -n $noticed ]] || ! kill -0 $! 2> /dev/null; then
        echo "the head must start, got: $(tail --lines 1 "$logs/head.log")" >&2
        exit 1
    fi
    sleep 1
done
if [[ ${#hosts[@]} -gt 1 ]]; then
    srun --overlap --nodes=$((${#hosts[@]} - 1)) --ntasks=$((${#hosts[@]} - 1)) --exclude="$head" \
        ray start --block --disable-usage-stats --address="$RAY_ADDRESS" \
        --num-cpus="${SLURM_CPUS_PER_TASK:-8}" > "$logs/workers.log" 2>&1 &
fi
if [[ -z ${MLFLOW_TRACKING_URI:-} && " $* " != *" --tracking-uri"* ]]; then
    bash cluster/tracking/serve.sh runs/mlflow "$address" "$tracking" > "$logs/tracking.log" 2>&1 &
    export MLFLOW_TRACKING_URI=http://$address:$tracking
fi
python cluster/wait_for_nodes.py "${#hosts[@]}" "${MLFLOW_TRACKING_URI:-}"

if [[ -z $noticed ]]; then
    "$@" &
    command=$!
    if [[ -n $noticed ]]; then
        kill -TERM "$command" 2> /dev/null || true
    fi
    # A signal ends `wait` before the command has ended.
    while kill -0 "$command" 2> /dev/null; do
        wait "$command" && code=0 || code=$?
    done
else
    code=1
fi
if [[ -n $noticed && ${code:-0} -ne 0 ]]; then
    echo "job $SLURM_JOB_ID: told to stop; it is queued again and goes on from here"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "${code:-0}"
