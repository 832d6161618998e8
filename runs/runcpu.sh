#!/usr/bin/env bash
# The longer laptop run: the quickstart's chain with a deeper model, more text, SFT and RL.
#
# Hardware  2 CPU cores with bf16 units, 6 GB of memory
# Time      about an hour, by estimate: 40 minutes for the base model (18.4 M tokens), 20 for the rest
# Cost      nothing
# Expect    not measured yet
#
# DEPTH, SEQ_LEN, VOCAB_SIZE, RATIO, DATA, NAME and EXTRA are those of runs/quickstart.sh.
export DEPTH=${DEPTH:-4} RATIO=${RATIO:-5} NAME=${NAME:-runcpu}
export MID_TASKS=${MID_TASKS:-Arithmetic:12000 SimpleSpelling:60000 SpellingBee:20000 Identity:1500:3 PythonDocs}
export MID_SECONDS=150    # of these at depth 2, by their number beside the quickstart's
export SFT_TASKS=${SFT_TASKS-Arithmetic:3000 SimpleSpelling:25000 SpellingBee:4000 Identity:1500:2 PythonDocs}
export RL_TASKS=${RL_TASKS-SimpleSpelling:320}    # 16 questions a step
exec bash "$(dirname "${BASH_SOURCE[0]}")/quickstart.sh"
