#!/usr/bin/env bash
# The best model size for a FLOP budget: a grid of depths and budgets, then power laws, figures and one page.
#
# Hardware  8 H100 (80 GB), all of them on each run; fewer take proportionally longer: set NPROC. Or PARALLEL runs at a
#           time, with NPROC GPUs each
# Time      about 4 hours, planned with the MFU published for this recipe (python -m scripts.plan); not run yet
# Cost      about $90 at $24 an hour for the node, likewise
# Expect    10.5 to 12 training tokens per parameter of transformer and head, published
#
# Run it again to continue: finished runs are skipped, an unfinished one goes on. To change it, set any of these:
NPROC=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}    # GPUs of a run
PARALLEL=${PARALLEL:-1}                  # runs at a time
DEPTHS=${DEPTHS:-10,12,14,16,18,20}
BUDGETS=${BUDGETS-1e18,2.15e18,4.64e18}  # training FLOPs; empty: no budget, each depth has RATIO (runs/miniseries.sh)
RATIO=${RATIO:-12}                       # training tokens per scaling parameter, where there is no budget
SEQ_LEN=${SEQ_LEN:-2048}                 # context in tokens
VOCAB_SIZE=${VOCAB_SIZE:-32768}
DATA=${DATA:-climbmix}                   # a source of nanochat.dataset, or a data set that is there
NUM_SHARDS=${NUM_SHARDS:-}               # training shards to download; empty: as many as the largest reader needs
TOK_CHARS=${TOK_CHARS:-2000000000}       # characters that the tokenizer learns from
NAME=${NAME:-laws}                       # of the tokenizer and the sweep
EXTRA=${EXTRA:-}                         # more flags for scripts.base_train; the same every time

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

check_recipe
if [[ $BUDGETS ]]; then
    horizon="--target-flops $(tr , '\n' <<< "$BUDGETS" | sort -g | tail -n 1)"    # of the largest reader
    grid="depth=$DEPTHS target-flops=$BUDGETS" flags="--eval-every 1000000"
else
    horizon="--target-param-data-ratio $RATIO"
    grid="depth=$DEPTHS" flags=$horizon
fi
fetch_data "$DATA" --depth ${DEPTHS//,/ } $horizon --max-seq-len "$SEQ_LEN" --vocab-size "$VOCAB_SIZE"
python -m scripts.tok_train --data "$DATA" --vocab-size "$VOCAB_SIZE" --max-chars "$TOK_CHARS" --name "$NAME"
python -m scripts.sweep --name "$NAME" --grid $grid --parallel "$PARALLEL" --nproc "$NPROC" -- \
    --data "$DATA" --tokenizer "$NAME" --max-seq-len "$SEQ_LEN" $flags --sample-every never --keep-last 1 $EXTRA
if [[ $BUDGETS ]]; then
    python -m dev.scaling_laws "$base_dir/sweeps/$NAME"
fi
