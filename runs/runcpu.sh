#!/usr/bin/env bash
# The longer laptop run: the quickstart's chain with a deeper model, more text, SFT and RL.
#
# Hardware  2 CPU cores with bf16 units, 4 GB of memory
# Time      measured 52 min 16 s on two cores with bf16 units (.41 TFLOP/s): base model 38 min 7 s (18.4 M tokens),
#           midtraining 7 min 48 s, SFT 2 min 42 s, RL 30 s; three times that without bf16, by estimate
# Cost      nothing
# Expect    0.944 bits per byte on held-out text; of 300 held-out problems each, after midtraining, SFT, RL: Arithmetic
#           100, 100, 100%, SimpleSpelling 97, 98, 98%, SpellingBee 100, 100, 100%, Identity 85, 73, 79% (twelve
#           questions in many wordings, so that one is 8 points)
#
# The variables are those of runs/quickstart.sh. Run it again to continue where it stopped.
DEPTH=${DEPTH:-4} RATIO=${RATIO:-5} NAME=${NAME:-runcpu}
MID_TASKS=${MID_TASKS:-Arithmetic:12000 SimpleSpelling:60000 SpellingBee:20000 Identity:1500:3 PythonDocs}
mid_seconds=150    # of these at depth 2, by their number beside the quickstart's
SFT_TASKS=${SFT_TASKS-Arithmetic:3000 SimpleSpelling:25000 SpellingBee:4000 Identity:1500:2 PythonDocs}
RL_TASKS=${RL_TASKS-SimpleSpelling:320}    # 16 questions a step
source "$(dirname "${BASH_SOURCE[0]}")/quickstart.sh"
