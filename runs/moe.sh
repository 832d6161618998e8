#!/usr/bin/env bash
# The speedrun's chain with a mixture of experts: as many FLOPs for each token, and more parameters to choose from.
#
# Hardware  1 H100 (80 GB); more take proportionally less time: set NPROC
# Model     depth 12 with 8 experts in every other layer, of which a token has one beside the shared one: 286 M parameters
#           that compute for a token, of 385 M
# Time      1.1 hours for the base model, planned with the MFU published for dense models of this depth; the dispatch takes
#           a part of that (bash dev/gpu_check.sh 4 measures it). Not run by this code base yet
# Cost      $3.4 for the base model at $3 an hour for one H100, likewise
# Expect    per step a lower loss than the dense model, more so at a higher RATIO; per second it depends on the GPU. A dense
#           model to compare with: NAME=dense EXPERTS= bash runs/moe.sh, then python -m dev.compare dense moe
#
# The variables are those of runs/speedrun.sh, and EXPERTS. Run it again to continue where it stopped.
EXPERTS=${EXPERTS-num_experts=8 top_k=1 moe_every=2}    # knobs of the model (nanochat/config.py); empty: a dense one
NPROC=${NPROC:-1} DEPTH=${DEPTH:-12} RATIO=${RATIO:-20} NAME=${NAME:-moe}
model_flags=${EXPERTS:+--knobs $EXPERTS}
source "$(dirname "${BASH_SOURCE[0]}")/speedrun.sh"
