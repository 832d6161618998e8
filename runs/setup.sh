# Make .venv with the locked packages and enter it. Sourced by the other recipes; alone: bash runs/setup.sh
# Needs Python >= 3.10, 2 GB of disk (9 GB beside an NVIDIA GPU) and 1-5 minutes; once done, a second call skips it all.
#
# PYTHON=python3.12          the Python to use; else the first one >= 3.10 that is found
# TORCH_INDEX=https://...    the index that torch comes from, for instance torch's own for ROCm; else torch's CPU index
#                            where Linux has no NVIDIA GPU and the index answers; else the configured sources

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv_python=.venv/bin/python
stamp=.venv/nanochat-setup    # "installing", then a copy of the lock whose packages are all in
log=.venv/setup.log
cpu_index=https://download.pytorch.org/whl/cpu

fail() {
    echo "error: $1" >&2
    exit 2
}

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

has_nvidia_gpu() {
    [[ $(nvidia-smi -L 2>/dev/null || true) == GPU* ]]
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
    local lock=$1 torch
    torch=$(grep '^torch==' "$lock")
    if [[ -n ${TORCH_INDEX:-} ]]; then
        install --index-url "$TORCH_INDEX" "$torch"
    elif [[ $(uname -s) == Linux ]] && ! has_nvidia_gpu; then    # the default build brings gigabytes of CUDA
        if answers "$cpu_index/torch/"; then
            install --index-url "$cpu_index" --no-deps "$torch"
        else
            pip_install "$torch"    # not uv, which wouldn't see a CPU build among pip's configured sources
        fi
    fi
    install -r "$lock"
}

set_up() {
    # A set-up that was interrupted can leave halves of packages behind that pip takes for whole ones: begin again
    if ! "$venv_python" -c '' 2>/dev/null || [[ -f $stamp && $(head -n 1 "$stamp") == installing ]]; then
        make_venv
    fi
    local lock
    lock=$(choose_lock)
    if ! cmp -s "$lock" "$stamp"; then
        echo installing > "$stamp"
        : > "$log"
        echo "set-up: installing the $(wc -l < "$lock" | tr -d ' ') packages of $lock, 1-5 minutes (tail -f $log) ..."
        SECONDS=0
        install_packages "$lock"
        cp "$lock" "$stamp"
        echo "set-up: done in $SECONDS s"
    fi
}

set_up
# Not `source activate`: that names the folder that .venv was made in, the wrong one once the checkout has moved
export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
