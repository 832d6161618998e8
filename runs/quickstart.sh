#!/usr/bin/env bash
# From nothing to a chat model of your own, with a report card: text -> tokenizer -> base -> mid -> SFT -> RL -> chat.
#
# Hardware  2 CPU cores and 4 GB of memory, no GPU, no account, nothing downloaded but the Python packages
# Time      measured 19 min 50 s, other work beside it for the first 13, and with more evaluation of the base model than
#           now: set-up 44 s, base model 9 min (300 steps take 5.5 where nothing else runs), its evaluation 1.5,
#           midtraining 5.2, SFT 1.6, RL and evaluation 0.5 each
# Cost      none
# Expect    1.454 bits per byte on held-out text (bigram bytes 3.750, unigram 4.733); of 300 held-out problems each:
#           Arithmetic 100%, SimpleSpelling 89%, SpellingBee 89%, Identity 85%
#
# Run it again to continue where it stopped; what is done is skipped. To change it, set any of these:
DEPTH=${DEPTH:-4}                        # layers
SEQ_LEN=${SEQ_LEN:-512}                  # context in tokens
VOCAB_SIZE=${VOCAB_SIZE:-8192}
BATCH_TOKENS=${BATCH_TOKENS:-16384}      # tokens of a step
NUM_ITERATIONS=${NUM_ITERATIONS:-300}    # steps of the base model
DATA=${DATA:-python-docs}                # a source that can be made with no network, or a data set that is there
NAME=${NAME:-quickstart}                 # of the tokenizer and the runs
MID_TASKS=${MID_TASKS:-Arithmetic:12000 SimpleSpelling:110000 SpellingBee:8000 Identity:1500:2 PythonDocs}
SFT_TASKS=${SFT_TASKS:-Arithmetic:3000 SimpleSpelling:25000 SpellingBee:4000 Identity:1500:2 PythonDocs}
RL_TASKS=${RL_TASKS:-SimpleSpelling:320}    # 16 questions a step
EVAL_TASKS=${EVAL_TASKS:-Arithmetic SimpleSpelling SpellingBee Identity PythonDocs}
NUM_PROBLEMS=${NUM_PROBLEMS:-300}        # held-out problems of each task
EXTRA=${EXTRA:-}                         # more flags for scripts.base_train
CHAT_EXTRA=${CHAT_EXTRA:-}               # more flags for mid_train, chat_sft and chat_rl
RL_EXTRA=${RL_EXTRA:-}                   # more flags for chat_rl alone

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

[[ $DATA == python-docs ]] && python -m nanochat.dataset --source python-docs
python -m scripts.tok_train --data "$DATA" --vocab-size "$VOCAB_SIZE" --name "$NAME"
python -m scripts.tok_eval --data "$DATA" --name "$NAME"
python -m scripts.base_train --data "$DATA" --tokenizer "$NAME" --model-tag "$NAME" --depth "$DEPTH" \
    --max-seq-len "$SEQ_LEN" --total-batch-size "$BATCH_TOKENS" --num-iterations "$NUM_ITERATIONS" \
    --eval-every 100 --eval-tokens 131072 $EXTRA
python -m scripts.base_loss --model-tag "$NAME" --eval-tokens 262144
python -m scripts.mid_train --model-tag "$NAME" --tasks $MID_TASKS --eval-tokens 65536 $CHAT_EXTRA
python -m scripts.chat_sft --model-tag "$NAME" --tasks $SFT_TASKS --eval-tokens 65536 $CHAT_EXTRA
python -m scripts.chat_rl --model-tag "$NAME" --tasks $RL_TASKS --max-new-tokens 48 --eval-every never \
    --sample-every never $CHAT_EXTRA $RL_EXTRA
for stage in mid sft rl; do
    python -m scripts.chat_eval --source "$stage" --model-tag "$NAME" --task-name $EVAL_TASKS -x "$NUM_PROBLEMS"
done
python -m nanochat.report generate
echo "ask it:      source .venv/bin/activate; python -m scripts.chat_cli --model-tag $NAME -p 'What is 34 * 27?'"
echo "talk to it:  source .venv/bin/activate; python -m scripts.chat_cli --model-tag $NAME"
echo "in a browser: source .venv/bin/activate; python -m scripts.chat_web --model-tag $NAME"
