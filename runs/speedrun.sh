#!/usr/bin/env bash
# GPT-2's capability on one node: download -> tokenizer -> base -> mid -> SFT -> RL -> evaluation -> report card.
#
# Hardware  8 H100 (80 GB). Fewer GPUs take proportionally longer: set NPROC.
# Time      about 2 hours for the base model of depth 24 at 50% of the bf16 peak, by plan (1.7 were published for this
#           recipe in July 2026, with fp8, which isn't here yet); not run by this code base yet. Chat stages and RL on top
# Cost      about $48 at $24 an hour for the node, for the base model
# Expect    CORE near 0.26 and validation bits per byte near 0.718 on ClimbMix, published, likewise
#
# Run it again to continue where it stopped; what is done is skipped. To change it, set any of these:
NPROC=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}    # GPUs, or processes on a machine without
DEPTH=${DEPTH:-24}
RATIO=${RATIO:-8}                        # training tokens per scaling parameter
SEQ_LEN=${SEQ_LEN:-2048}                 # context in tokens
VOCAB_SIZE=${VOCAB_SIZE:-32768}
DATA=${DATA:-climbmix}                   # a source of nanochat.dataset, or a data set that is there
NUM_SHARDS=${NUM_SHARDS:-}               # training shards to download; empty: as many as DEPTH and RATIO need
TOK_CHARS=${TOK_CHARS:-2000000000}       # characters that the tokenizer learns from
NAME=${NAME:-speedrun}                   # of the tokenizer and the run
RL_TASKS=${RL_TASKS-GSM8K}               # tasks with a reward; empty: no RL
RUN=${RUN:-none}                         # log to wandb under this name
EXTRA=${EXTRA:-}                         # more flags for scripts.base_train
EVAL_EXTRA=${EVAL_EXTRA:-}               # more flags for scripts.base_eval
MID_EXTRA=${MID_EXTRA:-}                 # more flags for scripts.mid_train
SFT_EXTRA=${SFT_EXTRA:-}                 # more flags for scripts.chat_sft
RL_EXTRA=${RL_EXTRA:-}                   # more flags for scripts.chat_rl
CHAT_EVAL_EXTRA=${CHAT_EVAL_EXTRA:-}     # more flags for scripts.chat_eval

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

launch() {    # a module on every GPU, with its flags; torchrun, by its module's name, reads those before -- itself
    local module=$1
    shift
    if (( NPROC > 1 )); then
        python -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m "$module" -- "$@"
    else
        python -m "$module" "$@"
    fi
}

case $DATA in
    climbmix | fineweb-edu)
        num_shards=${NUM_SHARDS:-$(python -m scripts.plan --depth "$DEPTH" --target-param-data-ratio "$RATIO" \
            --max-seq-len "$SEQ_LEN" --vocab-size "$VOCAB_SIZE" --shards)}
        python -m nanochat.dataset --source "$DATA" -n "$num_shards" -w 8 ;;
esac
python -m scripts.tok_train --data "$DATA" --vocab-size "$VOCAB_SIZE" --max-chars "$TOK_CHARS" --name "$NAME"
python -m scripts.tok_eval --data "$DATA" --name "$NAME"
launch scripts.base_train --data "$DATA" --tokenizer "$NAME" --model-tag "$NAME" --run "$RUN" --depth "$DEPTH" \
    --max-seq-len "$SEQ_LEN" --target-param-data-ratio "$RATIO" $EXTRA
launch scripts.base_loss --model-tag "$NAME"
if python -m scripts.base_eval --fetch; then
    launch scripts.base_eval --model-tag "$NAME" $EVAL_EXTRA
else
    (( $? == 2 ))    # the tasks of CORE can't be had, as it said: go on without. Anything else ends this
fi
python -m tasks.words || (( $? == 2 ))    # the words to spell; where the list can't be had, those of the corpus
launch scripts.mid_train --model-tag "$NAME" --run "$RUN" $MID_EXTRA
launch scripts.chat_eval --source mid --model-tag "$NAME" $CHAT_EVAL_EXTRA
launch scripts.chat_sft --model-tag "$NAME" --run "$RUN" $SFT_EXTRA
launch scripts.chat_eval --source sft --model-tag "$NAME" $CHAT_EVAL_EXTRA
if [[ $RL_TASKS ]]; then
    launch scripts.chat_rl --model-tag "$NAME" --run "$RUN" --tasks $RL_TASKS $RL_EXTRA
    launch scripts.chat_eval --source rl --model-tag "$NAME" $CHAT_EVAL_EXTRA
fi
python -m nanochat.report generate
echo "talk to it: source .venv/bin/activate; python -m scripts.chat_web --model-tag $NAME"
