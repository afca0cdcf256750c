#!/usr/bin/env bash
# All nodes of a host file (lines such as `node1 slots=8`); without HOSTFILE, this node.
#   HOSTFILE=hosts launch/deepspeed.sh stage=2_multitask model=keye_8b data=keye_example deepspeed=zero3
set -euo pipefail
arguments=()
[ -n "${HOSTFILE:-}" ] && arguments+=(--hostfile "$HOSTFILE")
[ -n "${NPROC:-}" ] && arguments+=(--num_gpus "$NPROC") # on a CPU: the number of ranks
exec deepspeed "${arguments[@]}" --module keye_train "$@"
