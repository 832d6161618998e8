# What the recipes share: how they check their settings, fetch text, start a stage, say how far they are. setup.sh sources
# this for them, slurm.sh does it itself.

base_dir=${NANOCHAT_BASE_DIR:-~/.cache/nanochat}
base_dir=${base_dir/#\~/$HOME}    # as Python does

fail() {
    echo "error: $1" >&2
    exit 2
}

fetch_data() {    # make the source $1, if it is one; of the hub's as much as scripts.base_train with the flags $2... reads
    local num_shards
    case $1 in
        climbmix | fineweb-edu | tinystories)
            num_shards=${NUM_SHARDS:-$(python -m scripts.plan "${@:2}" --shards "$1")}
            python -m nanochat.dataset --source "$1" -n "$num_shards" -w 8 ;;
        python-docs) python -m nanochat.dataset --source python-docs ;;
    esac
}

launch() {    # a module on NPROC GPUs, with its flags; torchrun, by its module's name, reads those before -- itself
    local module=$1
    shift
    if (( NPROC > 1 )); then
        # torchrun kills ranks that still save so many seconds after SIGTERM or Ctrl-C, else 30
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110} \
            python -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m "$module" -- "$@"
    else
        python -m "$module" "$@"
    fi
}

count_tokens() {    # that a laptop's base model reads, by DEPTH, VOCAB_SIZE and RATIO (scaling.count_scaling_params)
    awk -v depth="$DEPTH" -v vocab="$VOCAB_SIZE" -v ratio="$RATIO" \
        'BEGIN { width = 128 * int((depth + 1) / 2); printf "%d", ratio * width * (12 * width * depth + vocab) }'
}

# What a person may set, checked before the first stage

recipes=(quickstart.sh runcpu.sh offline.sh speedrun.sh run1000.sh slurm.sh scaling_laws.sh miniseries.sh marin.sh moe.sh)

check_name() {    # for folders are made and deleted by it
    [[ $1 =~ ^[[:alnum:]_][[:alnum:]._-]*$ && ${#1} -le 60 ]] &&
        [[ $1 != *.new && $1 != *.old && $1 != *.tmp && $1 != *.lock ]] ||
        fail "NAME=$1 must be letters, digits and . _ -, at most 60 and no .new, .old, .tmp or .lock: it names folders"
}

list_settings() {    # of recipes: the names that they take from the environment
    grep -ohE '(^| )[A-Z_]+=\$\{[A-Z_]+[:-]' "$@" | grep -oE '[A-Z_]+=' | tr -d '=' | sort -u || true
}

check_settings() {    # of the recipe $1, which are read by the files $2...; those of other recipes would do nothing
    local name own exported
    check_name "$NAME"
    own=$(list_settings "${@:2}" | tr '\n' ' ')
    [[ " $own" != *" NPROC "* || ${NPROC:-1} =~ ^[1-9][0-9]*$ ]] ||
        fail "NPROC=$NPROC must be a number of GPUs, 1 or more"
    exported=$(compgen -e | tr '\n' ' ')
    for name in $(list_settings "${recipes[@]/#/runs/}") BATCH_TOKENS; do    # the last was a setting once
        [[ " $exported" == *" $name "* && ${!name} && " $own" != *" $name "* ]] || continue
        case $name in
            AUTHOR | DATA | DATA_DIR | DEVICE | NAME | NPROC | PARALLEL | RUN | SIZES | WORDS)    # others use them, too
                echo "warning: $name=${!name} does nothing here, it is no setting of $1" >&2 ;;
            *) fail "$name=${!name} is no setting of $1; unset it, or set one of ${own% }" ;;
        esac
    done
}

# A recipe calls this before its first stage: in a subshell its file is sourced once more, in which python and launch only
# note their words, and the flags of all of them are parsed. Commands that aren't named below would run twice
check_recipe() {
    local file files=()
    for file in "${BASH_SOURCE[@]:1}"; do    # the recipe that has the stages, then one that sourced it
        [[ $file == /* ]] || file=$OLDPWD/$file    # as it was before setup.sh changed the folder
        files+=("$file")
    done
    check_settings "${files[${#files[@]} - 1]##*/}" "${files[@]}"
    ( note_commands; source "${files[0]}"; true ) 3>&1 > /dev/null | python -m scripts.check_commands || exit
}

note_commands() {
    noting() { :; }    # a mark that no environment has
    python() { printf '%s\0' "$#" "$@" >&3; }
    launch() { python -m "$@"; }
    torchrun() { :; }
    mkdir() { :; }
    ln() { :; }
    fetch_data() { :; }
    begin_chain() { :; }
    stage() { :; }
    end_chain() { :; }
    check_recipe() { :; }
}

# The chain's progress. A recipe names its stages once, each with its seconds where the header measured them (else 0):
# `begin_chain NAME text 25 base 330 ...`; then each begins with `stage text`, and the last ends with `end_chain`.
# <base dir>/chains/NAME/STAGE: the seconds of a finished stage, 0 if it was interrupted; empty until it ends.
begin_chain() {
    check_name "$1"
    chain_name=$1 chain=("${@:2}") stage_name="" chain_start=$SECONDS
    chain_dir=$base_dir/chains/$1
    [[ -e $base_dir/runs/base/$1 ]] || rm -rf "$chain_dir"    # its runs were deleted: it begins anew
    mkdir -p "$chain_dir"
}

stage() {
    local i name seconds number=0 total=0 finished=0 expected=0 taken=0 left=""
    end_stage
    stage_name=$1 stage_start=$SECONDS was_begun=0
    for (( i = 0; i < ${#chain[@]}; i += 2 )); do
        name=${chain[i]} seconds=${chain[i + 1]}
        [[ $name != "$1" ]] || number=$(( i / 2 + 1 ))
        (( total += seconds )) || true
        if (( ! number )) || [[ -s $chain_dir/$name ]]; then
            (( finished += seconds )) || true
        fi
        if [[ -s $chain_dir/$name && $(< "$chain_dir/$name") != 0 ]]; then
            (( expected += seconds, taken += $(< "$chain_dir/$name") )) || true
        fi
    done
    (( expected * 10 > total )) || expected=1 taken=1    # too little to judge this machine's pace by
    if (( total )); then
        left=" | $(( 100 * finished / total ))% of the chain done, "
        left+="about $(( ((total - finished) * taken / expected + 30) / 60 )) min left"
    fi
    echo "$chain_name: stage $number of $(( ${#chain[@]} / 2 )), $1$left | $(( (SECONDS - chain_start) / 60 )) min so far"
    [[ ! -e $chain_dir/$1 ]] || was_begun=1
    : >> "$chain_dir/$1"
}

end_stage() {    # one that took less than a twentieth of its time had been done before
    local i seconds=0 taken
    [[ $stage_name && ! -s $chain_dir/$stage_name ]] || return 0
    for (( i = 0; i < ${#chain[@]}; i += 2 )); do
        [[ ${chain[i]} != "$stage_name" ]] || seconds=${chain[i + 1]}
    done
    taken=$(( SECONDS - stage_start ))
    echo "$(( was_begun || taken * 20 < seconds ? 0 : taken ))" > "$chain_dir/$stage_name"
}

end_chain() {
    end_stage
    echo "$chain_name: all $(( ${#chain[@]} / 2 )) stages done in $(( (SECONDS - chain_start) / 60 )) min"
}

! declare -F noting > /dev/null || note_commands
