#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What run_distribute_train_ascend.sh and run_distribute_train_gpu.sh share. Sourced, not run.

# check_file FLAG FILE: a file that can be read.
check_file() {
    [[ -e "$2" ]] || fail "$1: $(shown "$2"); no such file"
    [[ -f "$2" ]] || fail "$1: $(shown "$2"); is no regular file"
    [[ -r "$2" ]] || fail "$1: $(shown "$2"); cannot be read: check its permissions"
}

# check_address ADDRESS NODES: of node 0, as all nodes can reach it.
check_address() {
    case "$1" in
        "" | -* | *[!0-9A-Za-z.:_-]*) fail "--master: $(shown "$1"); an address or a host name" ;;
        127.* | localhost | ::1 | 0.0.0.0)
            (($2 == 1)) || fail "--master: $1; with --nodes $2 the address of node 0 that all nodes can reach"
            ;;
    esac
}

# Prints a port of this machine on which nobody listens.
free_port() {
    local port
    for ((port = 20000 + $$ % 20000; port < 60000; port++)); do
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    printf '%s\n' "$port"
}

# print_command WORDS...: as one can paste it into bash, zsh or sh.
print_command() {
    local word line="" quote="'\\''"
    for word in "$@"; do
        [[ "$word" =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/$quote}'"
        line+="$word "
    done
    printf '%s\n' "${line% }"
}

# check_job TARGET DEVICES ARGUMENTS...: ends in one line where train.py would refuse the keys or the degrees.
check_job() {
    local target="$1" devices="$2"
    shift 2
    if ! "$VENV/bin/python" -c "$RIGHT_VERSION" 2>/dev/null; then
        say "note: $VENV holds no Python yet, so the keys and degrees were not checked; without --dry-run it is made"
        return
    fi
    PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}" "$VENV/bin/python" -m switchyard.training.launch \
        --devices "$devices" --target "$target" "$@" || exit $?
}

# distribute TARGET ARGUMENTS...: starts this node's processes on devices of TARGET (Ascend, GPU or CPU).
distribute() {
    local target="$1" config="" devices=8 nodes=1 node_rank=0 master=127.0.0.1 port="" log_dir="" rank_table="" dry_run=""
    local program=() flags=() launcher watch cluster_timeout=1800 max_restarts=0 main=train.py
    local min_workers=0 rendezvous="" rejoin_wait=180
    local job="" job_of="" words=() trusted=()
    shift
    while (($#)); do
        case "$1" in
            --config | --devices | --nodes | --node-rank | --master | --port | --log-dir | --rank-table | --cluster-timeout | --max-restarts | --min-workers | --rendezvous | --rejoin-wait)
                (($# > 1)) || fail "$1: needs a value"
                local name="${1#--}"
                printf -v "${name//-/_}" '%s' "$2"
                shift
                ;;
            --eval | --export | --infer)
                (($# > 1)) || fail "$1: needs a value"
                [[ -z "$job" ]] || fail "$1: $(shown "$2"); leave out $job or $1"
                job="$1" job_of="$2"
                shift
                ;;
            --resume | --restarted) program+=("$1") ;;
            --trust-code)
                flags+=("$1") trusted=("$1")
                ;;
            --json) flags+=("$1") ;;
            --out | --key-file)
                (($# > 1)) || fail "$1: needs a value"
                flags+=("$1" "$2")
                shift
                ;;
            --)
                shift
                words=("$@")
                break
                ;;
            --init)
                (($# > 1)) || fail "$1: needs a value"
                program+=("$1" "$2")
                shift
                ;;
            --dry-run) dry_run=yes ;;
            -*) fail "$(shown "$1"): unknown option; see --help" ;;
            *.*=*) program+=("$1") ;;
            *) fail "$(shown "$1"): unknown option; see --help" ;;
        esac
        shift
    done
    if [[ -n "$job" ]]; then
        [[ -z "$config" ]] || fail "--config: $(shown "$config"); the configuration is that of $job: leave it out"
        [[ " ${program[*]-} " != *" --"* ]] || fail "$job: $(shown "$job_of"); leave --resume and --init out"
        [[ "$max_restarts" == 0 ]] || fail "--max-restarts: $(shown "$max_restarts"); only training is started again"
        main="${job#--}.py"
    else
        ((${#flags[@]} == 0)) || fail "${flags[0]}: only with --eval, --export or --infer"
        [[ -n "$config" ]] || fail "--config: needs the YAML file of an experiment; see --help"
        check_file --config "$config"
    fi
    ((${#words[@]} == 0)) || [[ "$job" == --infer ]] || fail "--: only with --infer, whose options follow it"
    devices="$(whole --devices "$devices" 1 65536)" # each in a line of its own, so that a refusal ends the script
    nodes="$(whole --nodes "$nodes" 1 65536)"
    node_rank="$(whole --node-rank "$node_rank" 0 65535)"
    ((node_rank < nodes)) || fail "--node-rank: $node_rank; from 0 below --nodes ($nodes)"
    check_address "$master" "$nodes"
    if ((nodes > 1)); then port="${port:-8118}"; fi # the same on all nodes, so none is searched for
    port="$(whole --port "${port:-$(free_port)}" 1024 65535)"
    cluster_timeout="$(whole --cluster-timeout "$cluster_timeout" 1 604800)"
    max_restarts="$(whole --max-restarts "$max_restarts" 0 1000000)"
    min_workers="$(whole --min-workers "$min_workers" 0 $((devices * nodes)))"
    rejoin_wait="$(whole --rejoin-wait "$rejoin_wait" 1 86400)"
    if ((min_workers > 0)); then
        ((nodes > 1)) || fail "--min-workers: $min_workers; only with --nodes 2 or more: what is lost is a node"
        ((max_restarts > 0)) || fail "--min-workers: $min_workers; only with --max-restarts N"
        [[ -n "$rendezvous" ]] || fail "--min-workers: $min_workers; needs --rendezvous DIR, a folder that all nodes see"
        [[ -z "$rank_table" ]] || fail "--min-workers: $min_workers; not with --rank-table, which names all devices"
    elif [[ -n "$rendezvous" ]]; then
        fail "--rendezvous: $(shown "$rendezvous"); only with --min-workers N"
    fi
    [[ -z "$rank_table" ]] || check_file --rank-table "$rank_table"
    [[ ! -e "$log_dir" || -d "$log_dir" ]] || fail "--log-dir: $(shown "$log_dir"); is no folder"
    log_dir="${log_dir:-logs/train-$(date +%Y%m%d-%H%M%S)}"

    launcher=("$VENV/bin/python" -m mindspore.parallel.cluster.run "--worker_num=$((devices * nodes))"
        "--local_worker_num=$devices" "--master_addr=$master" "--master_port=$port" "--node_rank=$node_rank"
        "--log_dir=$log_dir" --join=True "--tail_worker_log=$((node_rank * devices))"
        "--cluster_time_out=$cluster_timeout")
    [[ -z "$rank_table" ]] || launcher+=("--rank_table_file=$rank_table")
    local source=(--config "$config")
    case "$job" in
        --eval | --export) source=(--checkpoint "$job_of") ;;
        --infer) source=(--model "$job_of") ;;
    esac
    if [[ "$job" == --infer ]]; then # the keys are those of the export
        ((${#program[@]} == 0)) || fail "$(shown "${program[0]}"): not with --infer: leave it out"
        program=("${words[@]+"${words[@]}"}")
    else
        program=("${program[@]+"${program[@]}"}" "context.device_target=$target")
    fi
    watch=("$VENV/bin/python" -m switchyard.distributed.watch)
    ((max_restarts == 0)) || watch+=(--max-restarts "$max_restarts")
    ((min_workers == 0)) ||
        watch+=(--min-workers "$min_workers" --rendezvous "$rendezvous" --rejoin-wait "$rejoin_wait")
    launcher=("${watch[@]}" "$log_dir" "${launcher[@]}" "$ROOT/$main")
    if [[ -n "$dry_run" ]]; then
        [[ "$job" == --infer ]] ||
            check_job "$target" $((devices * nodes)) "${job:---config}" "${job_of:-$config}" "${program[@]}" \
                "${trusted[@]+"${trusted[@]}"}"
        # shellcheck disable=SC2016  # PATH is for the shell into which this is pasted
        printf 'PATH=%s:"$PATH" GLOG_v=%s OMP_NUM_THREADS=%s ' "$(print_command "$VENV/bin")" \
            "$(print_command "${GLOG_v:-3}")" "$(print_command "${OMP_NUM_THREADS:-1}")"
        print_command "${launcher[@]}" "${source[@]}" "${flags[@]+"${flags[@]}"}" "${program[@]+"${program[@]}"}"
        return
    fi
    set_up run
    export PATH="$VENV/bin:$PATH" GLOG_v="${GLOG_v:-3}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # msrun calls `python`
    say "Logs of all ranks: $log_dir, joined in all.log"
    exec "${launcher[@]}" "${source[@]}" "${flags[@]+"${flags[@]}"}" "${program[@]+"${program[@]}"}"
}
