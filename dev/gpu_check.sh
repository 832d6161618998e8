#!/usr/bin/env bash
# Does this code do on this GPU what it does on a CPU, how fast, and which choices win? Offline, one GPU, torch >= 2.9.
#
#   bash dev/gpu_check.sh 1     at most nine minutes; so are 2, 3 and 4. Without a number, all four
#   bash dev/gpu_check.sh --toy   the same code at toy size, on a CPU too, to see that the script works
#   bash dev/gpu_check.sh --help  sections, files and flags
#
# Uses .venv where there is one, else python3 with whatever packages it has. Each part is a process of its own, since an
# error of CUDA spoils all that follows in a process; one that hangs is killed, and what it had found is on disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}    # read once; a resumed run is compared bit for bit

missing=$("$python" -c 'import importlib.util as util
print(*[name for name in ("torch", "filelock", "safetensors", "tiktoken") if util.find_spec(name) is None])')
if [ -n "$missing" ]; then
    echo "error: $(command -v "$python") has no $missing, which the checks need; install that, or run runs/setup.sh" >&2
    exit 2
fi

# A folder of its own for compiled kernels: the compile times shown are those of a first run
TORCHINDUCTOR_CACHE_DIR=$(mktemp -d)
trap 'rm -rf "$TORCHINDUCTOR_CACHE_DIR"' EXIT
export TORCHINDUCTOR_CACHE_DIR

case " $* " in
    *" --only "* | *" --table "* | *" --help "* | *" -h "*) parts= ;;
    " "[1234]" "*) parts=$1; shift ;;
    *) parts="1 2 3 4" ;;
esac
if [ -z "$parts" ]; then
    "$python" -m dev.gpu_check "$@"
    exit
fi
limit=
if command -v timeout >/dev/null; then limit="timeout --foreground -k 5 535"; fi
case " $* " in *" --budget-sec"[\ =]*) limit= ;; esac    # a budget of one's own may be longer
status=0
for part in $parts; do
    $limit "$python" -m dev.gpu_check "$part" "$@" || status=$?
done
exit "$status"
