#!/usr/bin/env bash
# One recipe at several depths, each trained compute-optimally, to see whether a change helps at every size.
#
# Hardware  8 H100 (80 GB), all of them on each run; fewer take proportionally longer: set NPROC. Or PARALLEL runs at a
#           time, with NPROC GPUs each
# Time      about 2.5 hours, planned with the MFU published for this recipe (python -m scripts.plan); not run yet
# Cost      about $58 at $24 an hour for the node, likewise
# Expect    validation bits per byte that fall with depth along a smooth curve; no figures are published for this data
#
# The variables are those of runs/scaling_laws.sh, of which BUDGETS is empty here. Run it again to continue.
NAME=${NAME:-miniseries} BUDGETS=${BUDGETS-}
source "$(dirname "${BASH_SOURCE[0]}")/scaling_laws.sh"
