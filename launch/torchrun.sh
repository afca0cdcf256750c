#!/usr/bin/env bash
# All GPUs of this node; several nodes: set NNODES, NODE_RANK and MASTER_ADDR on each. CPU only: set NPROC.
#   launch/torchrun.sh stage=2_multitask model=keye_8b data=keye_example deepspeed=zero3
set -euo pipefail
gpus=$( (command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus | wc -l) || echo 0)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
if [ "${NNODES:-1}" -gt 1 ]; then
    : "${MASTER_ADDR:?set MASTER_ADDR to the address of the first node}" "${NODE_RANK:?set NODE_RANK to 0 .. NNODES-1}"
    rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    rendezvous=(--standalone)
fi
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # each restart of the group gets a store without addresses of dead ranks
exec torchrun "${rendezvous[@]}" --nproc-per-node "$nproc" -m keye_train "$@"
