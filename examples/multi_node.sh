#!/usr/bin/env bash
# Pretrain the model of examples/single_node.sh on several machines: run it on each of them with its own NODE_RANK.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500 GPUS_PER_NODE=8 DATA=/shared/my_corpus \
#     bash examples/multi_node.sh                    # and with NODE_RANK=1 on the second machine
#
# DATA and OUT must be on storage that all machines share. Experts are spread over the GPUs of a node, so that tokens do
# not leave it for their experts, and each node has a copy of them; EP=16 spreads them over two nodes. Megatron's log
# lines come from the last rank, on the last node. If the machines have several networks, or names that lead nowhere, give
# the interface in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: docs/launching.md. The rest is as in
# examples/single_node.sh. Run on two emulated hosts with --cpu, not yet on GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NNODES:?number of machines}" "${NODE_RANK:?number of this machine, from 0}"
: "${MASTER_ADDR:?name or address of machine 0}" "${MASTER_PORT:?a free port of machine 0}"
RANKS=${GPUS_PER_NODE:-}
. examples/granular_gpt.sh "$@"

OUT=${OUT:-out/multi_node}
mkdir -p "$OUT"
: >"$OUT/train-node$NODE_RANK.log"
"$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$RANKS" \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m air_moe_megatron.pretrain \
  "${FLAGS[@]}" --save "$OUT/checkpoint" --save-interval "$SAVE_INTERVAL" --tensorboard-dir "$OUT/tensorboard" \
  --log-file "$OUT/train-node$NODE_RANK.log" "$@"
