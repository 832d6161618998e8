#!/usr/bin/env bash
# marin's three sizes with their recipe, and the ledger that its leaderboard asks for: download -> tokenizer -> three base
# models, each with its validation loss -> ledger.json and leaderboard.md.
#
# Recipe    --preset marin-150m, marin-270m and marin-460m (nanochat/presets.py): model, optimizer, schedule, context and
#           batch of marin-community/marin's speedrun with features of modded-nanogpt, and its steps: 2.5 tokens for each
#           parameter that the models have with Llama 3's vocabulary of 128,256 tokens. The text is fineweb-edu, as there.
#           Ours are the tokenizer, trained here (VOCAB_SIZE=128256 makes one of that size, and the models of the size in
#           their names), and the validation set, a shard of the same text, not Paloma's c4_en
# Hardware  1 H100 (80 GB); more take proportionally less time: set NPROC
# Time      by plan, at the MFU published for nanochat: 1.8 hours for all three; 2.5 with VOCAB_SIZE=128256. Not run by
#           this code base yet. marin's took 19 and 66 minutes, and 100 on two H100
# Cost      by plan, at $3 an hour for one H100: $5.4; $7.5 with VOCAB_SIZE=128256
# Expect    published, on Paloma's c4_en with Llama 3's tokenizer: 1.27092, 1.17501 and 1.11268 bits per byte; nothing is
#           published for a shard of fineweb-edu
#
# Run it again to continue where it stopped; what is done is skipped. To change it, set any of these:
NPROC=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}    # GPUs, or processes on a machine without
SIZES=${SIZES:-150m 270m 460m}
NUM_ITERATIONS=${NUM_ITERATIONS:-}       # steps of each model; empty: as many as marin's
SEQ_LEN=${SEQ_LEN:-2048}                 # context in tokens
VOCAB_SIZE=${VOCAB_SIZE:-32768}
DATA=${DATA:-fineweb-edu}                # a source of nanochat.dataset, or a data set that is there
NUM_SHARDS=${NUM_SHARDS:-}               # training shards to download; empty: as many as the largest model reads
TOK_CHARS=${TOK_CHARS:-2000000000}       # characters that the tokenizer learns from
NAME=${NAME:-marin}                      # of the tokenizer, and the first part of the runs' names
AUTHOR=${AUTHOR:-}                       # your name, for the ledger
EXTRA=${EXTRA:-}                         # more flags for scripts.base_train; the same every time

count_steps() {    # of a size, as marin's had
    case $1 in
        150m) echo "${NUM_ITERATIONS:-955}" ;;
        270m) echo "${NUM_ITERATIONS:-1747}" ;;
        460m) echo "${NUM_ITERATIONS:-2950}" ;;
        *) echo "error: SIZES=$SIZES must be of 150m, 270m and 460m" >&2; exit 2 ;;
    esac
}
for size in $SIZES; do count_steps "$size" > /dev/null; done    # refused now, not after the first model

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
check_recipe

largest=$(tr ' ' '\n' <<< "$SIZES" | sort | tail -n 1)
begin_chain "$NAME" text 0 tokenizer 0 $(for size in $SIZES; do echo "$size" 0; done) ledger 0    # none was timed yet
stage text
fetch_data "$DATA" --preset "marin-$largest" --num-iterations "$(count_steps "$largest")" --max-seq-len "$SEQ_LEN" \
    --vocab-size "$VOCAB_SIZE"
stage tokenizer
python -m scripts.tok_train --data "$DATA" --vocab-size "$VOCAB_SIZE" --max-chars "$TOK_CHARS" --name "$NAME"
for size in $SIZES; do
    stage "$size"
    launch scripts.base_train --preset "marin-$size" --data "$DATA" --tokenizer "$NAME" --model-tag "$NAME-$size" \
        --max-seq-len "$SEQ_LEN" --num-iterations "$(count_steps "$size")" $EXTRA
done
stage ledger
python -m nanochat.report ledger $(for size in $SIZES; do echo "$NAME-$size"; done) ${AUTHOR:+--author "$AUTHOR"}
end_chain
