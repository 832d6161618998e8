# Make .venv with the locked packages and enter it. Sourced by the other recipes; alone: bash runs/setup.sh
# Needs Python >= 3.10, 2 GB of disk (9 GB beside an NVIDIA GPU) and 1-5 minutes; once done, a second call skips it all.
#
# PYTHON=python3.12          the Python to use; else the first one >= 3.10 that is found
# TORCH_INDEX=https://...    the index that torch comes from, for instance torch's own for ROCm; else the one of the build
#                            for this machine's driver and GPUs (nanochat/devices.py has the table), or of the CPU build
#                            where Linux has no NVIDIA GPU and the index answers; else the configured sources
# On a cluster whose login node has no GPU, ask for the GPU nodes' build, by their driver:
# TORCH_INDEX=https://download.pytorch.org/whl/cu130 (driver 580 or newer), .../cu126 (525 or newer). What was asked for
# stays; a build for CPUs that nobody asked for is replaced where there is a GPU.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv_python=.venv/bin/python
stamp=.venv/nanochat-setup    # "installing"; then "torch: <build>" and a copy of the locks whose packages are in
log=.venv/setup.log
indexes=https://download.pytorch.org/whl
gpu_lock=requirements-gpu.lock

source runs/recipe.sh

find_python() {
    local name names=(python3 python3.14 python3.13 python3.12 python3.11 python3.10 python)
    [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
    for name in "${names[@]}"; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "${PYTHON:-python3} is missing or older than 3.10; install a newer Python, or name one: PYTHON=/path/to/python3"
}

make_venv() {
    local python
    python=$(find_python)
    echo "set-up: making .venv with $("$python" --version)"
    rm -rf .venv
    if ! "$python" -m venv .venv >/dev/null 2>&1; then
        rm -rf .venv
        command -v uv >/dev/null && uv venv --quiet --seed --python "$python" .venv ||
            fail "$python can't make .venv; install its venv module (on Debian and Ubuntu: apt install python3-venv)"
    fi
}

choose_lock() {    # some packages have left Python 3.10 behind
    if "$venv_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo requirements.lock
    else
        echo requirements-py310.lock
    fi
}

choose_build() {    # of torch: an index that was asked for; default (PyPI's), cu126 or cpu; fails with a sentence
    if [[ -n ${TORCH_INDEX:-} ]]; then
        echo "$TORCH_INDEX"
    elif [[ $(uname -s) == Linux ]]; then
        "$venv_python" -m nanochat.devices
    else
        echo any
    fi
}

still_serves() {    # whether an environment with torch of build $1 can stay where $2 would be chosen now
    [[ $1 != "$2" ]] || return 0
    [[ -z ${TORCH_INDEX:-} ]] || return 1
    case $1:$2 in
        cpu:default | cpu:cu* | default:cu*) return 1 ;;    # without kernels for a GPU, or too new for the driver
    esac
}

answers() {
    "$venv_python" -c "import urllib.request; urllib.request.urlopen('$1', timeout=4)" >/dev/null 2>&1
}

pip_install() {
    "$venv_python" -m pip install "$@" >>"$log" 2>&1 && return
    local reason
    if grep -q -E 'from versions: none|ConnectionError|Connection refused|timed out' "$log"; then
        reason="no source of packages answers; is there a network"    # pip itself only says that nothing was found
    else
        reason=$(grep -E '^ERROR|No module named' "$log" | tail -1 || true)
    fi
    fail "packages can't be installed: ${reason:-pip gave no reason} (see $log); mend that and run this again"
}

install() {    # pip also where uv fails: pip's configuration may name sources that uv doesn't know
    command -v uv >/dev/null && uv pip install --python "$venv_python" "$@" >>"$log" 2>&1 || pip_install "$@"
}

install_packages() {
    local lock=$1 build=$2 torch
    torch=$(grep '^torch==' "$lock")
    case $build in
        default | any) ;;
        cu*) install --index-url "$indexes/$build" "$torch" ;;
        cpu)    # the default build brings gigabytes of CUDA
            if answers "$indexes/cpu/torch/"; then
                install --index-url "$indexes/cpu" --no-deps "$torch"
            else
                pip_install "$torch"    # not uv, which wouldn't see a CPU build among pip's configured sources
            fi ;;
        *) install --index-url "$build" "$torch" ;;
    esac
    install -r "$lock"
    case $build in
        default | *cu[0-9]*) install -r "$gpu_lock" ;;    # the kernels hub, for FlashAttention 3
    esac
}

describe() {    # what the stamp says of an environment
    echo "torch: $2"
    cat "$1" "$gpu_lock"
}

wait_for_others() {    # that set up this folder. The lock is this shell's, on the folder, until it closes it or ends; NFS
    exec 7< .          # and Windows have none
    "$1" -c '
import sys, time
try:
    import fcntl
    for _ in range(20):    # one that finds all in place takes no longer
        try:
            sys.exit(fcntl.flock(7, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            time.sleep(0.1)
    print("set-up: waiting for another one in this folder", file=sys.stderr)
    fcntl.flock(7, fcntl.LOCK_EX)
except (ImportError, OSError):
    pass'
}

set_up() {
    local python=$venv_python
    "$python" -c '' 2>/dev/null || python=$(find_python)
    wait_for_others "$python"
    # A set-up that was interrupted can leave halves of packages behind that pip takes for whole ones: begin again
    if ! "$venv_python" -c '' 2>/dev/null || [[ -f $stamp && $(head -n 1 "$stamp") == installing ]]; then
        make_venv
    fi
    local build first lock
    build=$(choose_build)
    if [[ -f $stamp ]]; then
        first=$(head -n 1 "$stamp")
        if [[ $first != torch:* ]]; then    # from before stamps named a build, and the locks of a GPU: taken for a CPU's
            first="torch: cpu"
            { echo "$first"; cat "$stamp" "$gpu_lock"; } > "$stamp.new"
            mv "$stamp.new" "$stamp"
        fi
        if still_serves "${first#torch: }" "$build"; then
            build=${first#torch: }
        else
            echo "set-up: .venv has torch's build ${first#torch: }, and this machine wants $build"
            make_venv    # pip takes any build of the locked version for the right one
        fi
    fi
    lock=$(choose_lock)
    if ! describe "$lock" "$build" | cmp -s - "$stamp"; then
        echo installing > "$stamp"
        : > "$log"
        echo "set-up: installing the $(wc -l < "$lock" | tr -d ' ') packages of $lock, 1-5 minutes (tail -f $log) ..."
        [[ $build != cpu ]] || echo "set-up: no NVIDIA GPU here, so torch is for CPUs (a login node? see runs/setup.sh)"
        SECONDS=0
        install_packages "$lock" "$build"
        describe "$lock" "$build" > "$stamp"
        echo "set-up: done in $SECONDS s"
    fi
    exec 7<&-
}

declare -F noting > /dev/null || set_up
# Not `source activate`: that names the folder that .venv was made in, the wrong one once the checkout has moved
export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
