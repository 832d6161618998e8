#!/usr/bin/env bash
# The speedrun's training on several nodes under SLURM: one torchrun a node, which find each other by themselves.
#
#   sbatch runs/slurm.sh                    set-up, data and tokenizer must be there: runs/speedrun.sh up to base_train
#                                           (a login node without a GPU needs TORCH_INDEX, see runs/setup.sh)
#
# Before the time limit, and when it is pre-empted, every rank gets SIGTERM: the run saves, stops and is queued again,
# and the same command goes on, on as many nodes as it then gets. $NANOCHAT_BASE_DIR must be a disk that all nodes see.
# Where a node's own name means 127.0.x.x, GLOO_SOCKET_IFNAME must name the network's interface (`ip -br address`).
# Hardware, hours and cost: not run on a cluster by this code base yet.
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
DEPTH=${DEPTH:-24}
RATIO=${RATIO:-8}                        # training tokens per scaling parameter
DATA=${DATA:-climbmix}
NAME=${NAME:-speedrun}                   # of the tokenizer and the run
NPROC=${NPROC:-8}                        # GPUs of a node
EXTRA=${EXTRA:-}                         # more flags for scripts.base_train

cd "${SLURM_SUBMIT_DIR:?this is a job script: sbatch runs/slurm.sh}" || exit 2
source .venv/bin/activate || { echo "error: there is no .venv; run bash runs/setup.sh first" >&2; exit 2; }
source runs/recipe.sh || exit 2
check_settings slurm.sh runs/slurm.sh
latest=$base_dir/runs/base/$NAME/latest
before=$(cat "$latest" 2> /dev/null)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110  # torchrun kills ranks that still save so many seconds after SIGTERM, else 30
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun python -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$NPROC" --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
    --rdzv-endpoint "$head_node:29500" -m scripts.base_train -- --data "$DATA" --tokenizer "$NAME" \
    --model-tag "$NAME" --depth "$DEPTH" --target-param-data-ratio "$RATIO" $EXTRA
status=$?
if (( status != 0 )) && [[ $(cat "$latest" 2> /dev/null) != "$before" ]]; then
    scontrol requeue "$SLURM_JOB_ID"     # it goes on from its last checkpoint, unless it got no further this time
fi
exit "$status"
