#!/usr/bin/env bash
# Set-up, lint and tests on any machine with Python >= 3.10, some minutes on 2 CPU cores.
#
#   bash runs/test.sh                    the default set
#   bash runs/test.sh --all              the slow ones, those in a browser and, where installed, in other engines, too
#   bash runs/test.sh -k tokenizer       more arguments go to pytest
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

marks="not gpu and not slow and not browser and not engines"
if [[ ${1:-} == --all ]]; then
    marks="not gpu"
    shift
fi

run() {    # pytest; that -k chose no test here is no failure
    python -m pytest "$@" || (( $? == 5 ))
}

python -m ruff check .
run -m "($marks) and alone" "$@"
run -m "($marks) and not alone" --numprocesses 2 --dist loadfile "$@"
