#!/usr/bin/env bash
# The chain on a folder of real data, with no network: text -> tokenizer -> base -> SFT -> CORE, answers -> report card.
#
#   DATA_DIR=FOLDER bash runs/offline.sh
#
# The folder holds what the other recipes download. SFT needs its files; an evaluation without its own is left out.
#   pretrain/   the text, as .parquet, .jsonl, .txt or .md
#   sft/        chat_train.jsonl.gz, conversations as tasks/customjson.py has them
#   tasks/      rows as the hub has them, by the names below: gsm8k_train.jsonl.gz ...; and words_alpha.txt.gz
#   core/       eval_bundle.zip
# A file that is only a part may have _dev at the end of its name; mc_train_4choice may stand in for mmlu_train.
#
# Hardware  2 CPU cores with bf16 units, 6 GB of memory
# Time      35 min, measured beside other work, for all but the base model; that takes 25 by estimate
# Cost      none
# Expect    on 77 MB of prose (dev/LOG.md, "The chain on real files") 1.567 bits per byte; of 200 held-out problems each
#           SpellingBee 90%, SimpleSpelling 71%, GSM8K 2%, and MMLU, ARC-Easy and CORE no better than guessing
#
# Run it again to continue where it stopped; what is done is skipped. To change it, set any of these:
DATA_DIR=${DATA_DIR:-}
DEPTH=${DEPTH:-6}                        # layers
SEQ_LEN=${SEQ_LEN:-512}                  # context in tokens
VOCAB_SIZE=${VOCAB_SIZE:-8192}
RATIO=${RATIO:-0.6}                      # tokens of the base model per parameter of its matrices and head
NAME=${NAME:-offline}                    # of the data, the tokenizer and the runs
SFT_TASKS=${SFT_TASKS:-GSM8K MMLU SpellingBee:4000 SimpleSpelling:16000}    # beside the folder's conversations
EVAL_TASKS=${EVAL_TASKS:-GSM8K MMLU ARC-Easy SpellingBee SimpleSpelling HumanEval}
NUM_PROBLEMS=${NUM_PROBLEMS:-200}        # held-out problems of each task, and items of each task of CORE
DEVICE=${DEVICE:-auto}                   # or cpu, where there is a GPU that torch can't use
EXTRA=${EXTRA:-}                         # more flags for scripts.base_train
SFT_EXTRA=${SFT_EXTRA:-}                 # more flags for scripts.chat_sft
CHAT_EVAL_EXTRA=${CHAT_EVAL_EXTRA:-}     # more flags for scripts.chat_eval

for part in pretrain sft/chat_train.jsonl.gz; do    # now, not after the base model
    if [[ ! -e $DATA_DIR/$part ]]; then
        echo "error: DATA_DIR=$DATA_DIR has no $part; see the top of runs/offline.sh for what it must hold" >&2
        exit 2
    fi
done
DATA_DIR=$(cd "$DATA_DIR" && pwd)

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
check_recipe

# Links by the hub's own names, for this chain alone: a part of a test set must not pass for the whole in another one
export NANOCHAT_MIRROR_DIR=$base_dir/mirror/$NAME HF_HUB_OFFLINE=1

link() {    # for SFT on the task $1, where the hub has a file, and the names that it may have in the folder
    local task=$1 place=$NANOCHAT_MIRROR_DIR/$2 suffix=${2#"${2%%.*}"} name path entry
    shift 2
    for name in "$@"; do
        for path in "$DATA_DIR/$name$suffix" "$DATA_DIR/${name}_dev$suffix"; do
            [[ -e $path ]] && mkdir -p "$(dirname "$place")" && ln -sfn "$path" "$place" && return
        done
    done
    for entry in $SFT_TASKS; do    # now, not after the base model
        [[ ${entry%%:*} != "$task" ]] ||
            fail "DATA_DIR=$DATA_DIR has no $1$suffix, which SFT on $task needs; add it, or set SFT_TASKS without $task"
    done
    echo "not there: $DATA_DIR/$1$suffix"
}

for split in train test; do link GSM8K openai/gsm8k/main/$split.jsonl.gz tasks/gsm8k_$split; done
link MMLU cais/mmlu/auxiliary_train/train.jsonl.gz tasks/mmlu_train tasks/mc_train_4choice
link MMLU cais/mmlu/all/validation.jsonl.gz tasks/mmlu_validation
link "" cais/mmlu/all/test.jsonl.gz tasks/mmlu_test
for split in train validation; do link ARC-Easy allenai/ai2_arc/ARC-Easy/$split.jsonl.gz tasks/arc_easy_$split; done
link "" allenai/ai2_arc/ARC-Easy/test.jsonl.gz tasks/arc_easy_test
link "" openai/openai_humaneval/openai_humaneval/test.jsonl.gz tasks/humaneval_test tasks/humaneval
link "" dwyl/english-words/words_alpha.txt.gz tasks/words_alpha
link "" eval_bundle.zip core/eval_bundle
core="" words=own
[[ ! -e $NANOCHAT_MIRROR_DIR/eval_bundle.zip ]] || core="core 150"
[[ ! -e $NANOCHAT_MIRROR_DIR/dwyl/english-words/words_alpha.txt.gz ]] || words=""    # but those of the folder's list

# Seconds by the header; those of training grow about as the depth squared, the base model's with its tokens too. Only
# those of the base model and SFT were measured one by one
size=$(( DEPTH * DEPTH ))
begin_chain "$NAME" text 30 tokenizer 30 base $(( 50 + $(count_tokens) / 230 * size / 1000 )) loss 30 $core \
    sft $(( 46 * size )) eval $(( 5 * size )) report 5
stage text
python -m nanochat.dataset --source files --path "$DATA_DIR/pretrain" --name "$NAME"
stage tokenizer
python -m scripts.tok_train --data "$NAME" --vocab-size "$VOCAB_SIZE" --name "$NAME"
python -m scripts.tok_eval --data "$NAME" --name "$NAME"
stage base
python -m scripts.base_train --data "$NAME" --tokenizer "$NAME" --model-tag "$NAME" --depth "$DEPTH" \
    --max-seq-len "$SEQ_LEN" --target-param-data-ratio "$RATIO" --device-type "$DEVICE" $EXTRA
stage loss
python -m scripts.base_loss --model-tag "$NAME" --device-type "$DEVICE"
if [[ $core ]]; then
    stage core
    python -m scripts.base_eval --model-tag "$NAME" --max-per-task "$NUM_PROBLEMS" \
        --bundle "$NANOCHAT_MIRROR_DIR/eval_bundle" --device-type "$DEVICE"
fi
stage sft
python -m scripts.chat_sft -i base --model-tag "$NAME" --tasks $SFT_TASKS ${words:+--words "$NAME"} \
    --custom-json "$DATA_DIR/sft/chat_train.jsonl.gz" --eval-tokens 65536 --device-type "$DEVICE" $SFT_EXTRA
stage eval
python -m scripts.chat_eval --source sft --model-tag "$NAME" --task-name $EVAL_TASKS ${words:+--words "$NAME"} \
    -x "$NUM_PROBLEMS" --device-type "$DEVICE" $CHAT_EVAL_EXTRA
stage report
python -m nanochat.report generate
end_chain
echo "talk to it: source .venv/bin/activate; python -m scripts.chat_cli --source sft --model-tag $NAME"
