#!/usr/bin/env bash
# Trains on the nodes of a SLURM job: Ray on each of them, the command on the first.
#
#     sbatch launch/slurm.sh q1 --loss center --data.shards /data/shards/tiny-imagenet --runs-dir /data/runs
#
# Submit it from this repository, which every node sees, as they see shards and runs. What follows --name or the settings
# names the run: the same command again goes on with it, and so does the job itself when it is requeued.
#
# Edit for your cluster, or pass to sbatch: nodes, GPUs and cores of each, time, partition and account.
#SBATCH --job-name=dlops_dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Two minutes before its time is over the job is told, saves the step, and is queued again. When it is preempted or
# cancelled it saves the step, too; SLURM queues it again where that is how it preempts.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
. launch/setup.sh

# Only who has this job's token may speak to its Ray; --export=ALL, the default, hands it to the other nodes.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_ADDRESS
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
# The first address of this node, which must be one that the others reach: the site's network may need another.
address="$(hostname -I | cut -d' ' -f1)"
RAY_ADDRESS="$address:$((20000 + SLURM_JOB_ID % 10000))"
here="$(hostname -s)"
here="${SLURMD_NODENAME:-$here}"
node=(ray start --block --disable-usage-stats --num-cpus="$SLURM_CPUS_PER_TASK")

# Steps of the job, which end with it: no "ray stop", which would end other people's Ray on the node.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$here" \
    env -u RAY_ADDRESS "${node[@]}" --head --node-ip-address="$address" --port="${RAY_ADDRESS##*:}" &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --overlap --nodes="$others" --ntasks="$others" --exclude="$here" \
        env -u RAY_ADDRESS "${node[@]}" --address="$RAY_ADDRESS" &
fi
python - "$SLURM_JOB_NUM_NODES" <<'PYTHON'
import sys
import time

import ray

number, deadline, there = int(sys.argv[1]), time.monotonic() + 300, 0
while there < number:
    if time.monotonic() > deadline:
        sys.exit(f"only {there} of the job's {number} nodes have joined Ray in 5 minutes; the log says why")
    time.sleep(2)
    try:
        ray.init(logging_level="ERROR")
        there = sum(node["Alive"] for node in ray.nodes())
        ray.shutdown()
    except ConnectionError:
        pass
PYTHON

python -m dlops_dist.train "$@" &
training=$!
again=""
trap 'again=yes; kill -TERM "$training"' USR1
trap 'kill -TERM "$training"' TERM
code=0
while true; do
    wait "$training" && code=0 || code=$?
    kill -0 "$training" 2>/dev/null || break # else it was a signal to this script that ended the waiting
done
if [ -n "$again" ] && [ "$code" -ne 0 ]; then
    echo "the job's time is over: it is queued again, and goes on from the step that was saved"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
