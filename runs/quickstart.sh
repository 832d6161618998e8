#!/usr/bin/env bash
# From nothing to a chat model of your own, with a report card: text -> tokenizer -> base -> mid -> chat.
#
# Hardware  2 CPU cores and 4 GB of memory, no GPU, no account, nothing downloaded but the Python packages
# Time      measured 7 min 40 s on two cores with bf16 units (.41 TFLOP/s): set-up 61 s, text and tokenizer 31, base
#           model 4 min 4 s with compiling, midtraining 93 s. With AVX2 alone 20 min 43 s
# Cost      none
# Expect    1.181 bits per byte on held-out text (bigram bytes 3.758, unigram 4.739); of 300 held-out problems each:
#           Arithmetic 100%, SimpleSpelling 95%, SpellingBee 98%, Identity 90%; with seed 43 1.184, 100, 93, 97, 78%
#
# Run it again to continue where it stopped; what is done is skipped. To change it, set any of these:
DEPTH=${DEPTH:-2}                        # layers
SEQ_LEN=${SEQ_LEN:-512}                  # context in tokens
VOCAB_SIZE=${VOCAB_SIZE:-2048}           # of 8,192 the head alone would be three quarters of a step
RATIO=${RATIO:-10}                       # tokens of the base model per parameter of its matrices and head; deeper ones
                                         # have more parameters: DEPTH=3 RATIO=1.75 takes 17 minutes, DEPTH=4 RATIO=1
                                         # about as long (estimate)
DATA=${DATA:-python-docs}                # a source of nanochat.dataset, or a data set that is there; with a network
                                         # climbmix (web pages, 0.2 GB) or tinystories (0.3 GB) teach English
NUM_SHARDS=${NUM_SHARDS:-}               # training shards to download; empty: as many as the base model reads
TOK_CHARS=${TOK_CHARS:-100000000}        # characters that the tokenizer learns from
NAME=${NAME:-quickstart}                 # of the tokenizer and the runs; other DATA needs another
MID_TASKS=${MID_TASKS:-Arithmetic:8000 SimpleSpelling:40000 SpellingBee:16000 Identity:1500:3 PythonDocs}
SFT_TASKS=${SFT_TASKS:-}                 # empty: no SFT, no RL. After this midtraining neither changes what 300
RL_TASKS=${RL_TASKS:-}                   # problems show; runs/runcpu.sh has both
EVAL_TASKS=${EVAL_TASKS:-Arithmetic SimpleSpelling SpellingBee Identity PythonDocs}
NUM_PROBLEMS=${NUM_PROBLEMS:-300}        # held-out problems of each task
DEVICE=${DEVICE:-auto}                   # or cpu, where there is a GPU that torch can't use
WORDS=${WORDS-$DATA}                     # dataset whose words are spelled; empty: those that an older chain took
EXTRA=${EXTRA:-}                         # more flags for scripts.base_train
CHAT_EXTRA=${CHAT_EXTRA:-}               # more flags for mid_train, chat_sft and chat_rl
RL_EXTRA=${RL_EXTRA:-}                   # more flags for chat_rl alone

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
check_recipe

# Seconds, as two slow cores with bf16 units took at depth 2 and 3; training's by the parameters of matrices and head
thousands=$(( $(RATIO=1 count_tokens) / 1000 ))
begin_chain "$NAME" text 25 tokenizer 10 base $(( 60 + $(count_tokens) / 1000 * thousands / 26000 )) \
    loss $(( 15 + thousands / 220 )) mid $(( ${mid_seconds:-100} * (thousands + 250) / 900 )) \
    ${SFT_TASKS:+sft $(( 40 * (thousands + 250) / 900 ))} ${RL_TASKS:+rl $(( 12 * (thousands + 250) / 900 ))} \
    eval $(( 10 + thousands / 150 )) report 5
stage text
fetch_data "$DATA" --depth "$DEPTH" --max-seq-len "$SEQ_LEN" --vocab-size "$VOCAB_SIZE" \
    --target-param-data-ratio "$RATIO"
stage tokenizer
python -m scripts.tok_train --data "$DATA" --vocab-size "$VOCAB_SIZE" --max-chars "$TOK_CHARS" --name "$NAME"
python -m scripts.tok_eval --data "$DATA" --name "$NAME"
stage base
python -m scripts.base_train --data "$DATA" --tokenizer "$NAME" --model-tag "$NAME" --depth "$DEPTH" \
    --max-seq-len "$SEQ_LEN" --target-param-data-ratio "$RATIO" --eval-every 150 --eval-tokens 131072 \
    --device-type "$DEVICE" $EXTRA
stage loss
python -m scripts.base_loss --model-tag "$NAME" --eval-tokens 262144 --device-type "$DEVICE"
stage mid
python -m scripts.mid_train --model-tag "$NAME" --tasks $MID_TASKS ${WORDS:+--words "$WORDS"} --warmdown-ratio 0.7 \
    --eval-every 500 --eval-tokens 65536 --device-type "$DEVICE" $CHAT_EXTRA
last=mid
if [[ $SFT_TASKS ]]; then
    last=sft
    stage sft
    python -m scripts.chat_sft --model-tag "$NAME" --tasks $SFT_TASKS ${WORDS:+--words "$WORDS"} --eval-tokens 65536 \
        --device-type "$DEVICE" $CHAT_EXTRA
fi
if [[ $RL_TASKS ]]; then
    stage rl
    python -m scripts.chat_rl -i "$last" --model-tag "$NAME" --tasks $RL_TASKS \
        ${WORDS:+--words "$WORDS"} --max-new-tokens 48 --eval-every never --sample-every never \
        --device-type "$DEVICE" $CHAT_EXTRA $RL_EXTRA
fi
stage eval
for source in mid ${SFT_TASKS:+sft} ${RL_TASKS:+rl}; do
    python -m scripts.chat_eval --source "$source" --model-tag "$NAME" --task-name $EVAL_TASKS \
        ${WORDS:+--words "$WORDS"} -x "$NUM_PROBLEMS" --device-type "$DEVICE"
done
stage report
python -m nanochat.report generate
end_chain
echo "ask it:      source .venv/bin/activate; python -m scripts.chat_cli --model-tag $NAME -p 'What is 34 * 27?'"
echo "talk to it:  source .venv/bin/activate; python -m scripts.chat_cli --model-tag $NAME"
echo "in a browser: source .venv/bin/activate; python -m scripts.chat_web --model-tag $NAME"
