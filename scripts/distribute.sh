#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What run_distribute_train_ascend.sh and run_distribute_train_gpu.sh share. Sourced, not run.

fail_unless_number() { # fail_unless_number FLAG VALUE LEAST
    if ! [[ "$2" =~ ^[0-9]+$ ]] || (($2 < $3)); then fail "$1: $2; a whole number, at least $3"; fi
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
    PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}" "$VENV/bin/python" -m switchyard.parallel.launch \
        --devices "$devices" --target "$target" "$@" || exit $?
}

# distribute TARGET ARGUMENTS...: starts this node's processes on devices of TARGET (Ascend, GPU or CPU).
distribute() {
    local target="$1" config="" devices=8 nodes=1 node_rank=0 master=127.0.0.1 port="" log_dir="" rank_table="" dry_run=""
    local program=() launcher
    shift
    while (($#)); do
        case "$1" in
            --config | --devices | --nodes | --node-rank | --master | --port | --log-dir | --rank-table)
                (($# > 1)) || fail "$1: needs a value"
                local name="${1#--}"
                printf -v "${name//-/_}" '%s' "$2"
                shift
                ;;
            --resume) program+=("$1") ;;
            --dry-run) dry_run=yes ;;
            *.*=*) program+=("$1") ;;
            *) fail "$1: unknown option; see --help" ;;
        esac
        shift
    done
    [[ -n "$config" ]] || fail "--config: needs the YAML file of an experiment; see --help"
    [[ -f "$config" ]] || fail "--config: $config; no such file"
    fail_unless_number --devices "$devices" 1
    fail_unless_number --nodes "$nodes" 1
    fail_unless_number --node-rank "$node_rank" 0
    ((node_rank < nodes)) || fail "--node-rank: $node_rank; from 0 below --nodes ($nodes)"
    if ((nodes > 1)); then
        [[ "$master" != 127.0.0.1 ]] || fail "--master: $master; with --nodes $nodes the address of node 0 that all nodes can reach"
        port="${port:-8118}" # the same on all nodes, so none is searched for
    fi
    port="${port:-$(free_port)}"
    fail_unless_number --port "$port" 1024
    [[ -z "$rank_table" || -f "$rank_table" ]] || fail "--rank-table: $rank_table; no such file"
    log_dir="${log_dir:-logs/train-$(date +%Y%m%d-%H%M%S)}"

    launcher=("$VENV/bin/python" -m mindspore.parallel.cluster.run "--worker_num=$((devices * nodes))"
        "--local_worker_num=$devices" "--master_addr=$master" "--master_port=$port" "--node_rank=$node_rank"
        "--log_dir=$log_dir" --join=True "--tail_worker_log=$((node_rank * devices))" --cluster_time_out=300)
    [[ -z "$rank_table" ]] || launcher+=("--rank_table_file=$rank_table")
    program=(--config "$config" "${program[@]+"${program[@]}"}" "context.device_target=$target")
    launcher=("$VENV/bin/python" -m switchyard.parallel.watch "$log_dir" "${launcher[@]}" "$ROOT/train.py")
    if [[ -n "$dry_run" ]]; then
        check_job "$target" $((devices * nodes)) "${program[@]}"
        # shellcheck disable=SC2016  # PATH is for the shell into which this is pasted
        printf 'PATH=%s:"$PATH" GLOG_v=%s OMP_NUM_THREADS=%s ' "$(print_command "$VENV/bin")" \
            "$(print_command "${GLOG_v:-3}")" "$(print_command "${OMP_NUM_THREADS:-1}")"
        print_command "${launcher[@]}" "${program[@]}"
        return
    fi
    set_up run
    export PATH="$VENV/bin:$PATH" GLOG_v="${GLOG_v:-3}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # msrun calls `python`
    say "Logs of all ranks: $log_dir"
    exec "${launcher[@]}" "${program[@]}"
}
