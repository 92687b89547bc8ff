#!/usr/bin/env bash
# Train 1,048,576 experts: one small layer, one process, on CPU or on a GPU alike.
#
#   bash examples/million_experts.sh                         # on the data of `make data`
#   NUM_EXPERTS=65536 bash examples/million_experts.sh --cpu
#   RANKS=4 MICRO_BATCH=4 bash examples/million_experts.sh --cpu --moe-air-shard-experts --moe-air-list-parts 4
#
# An expert is one gated row of 64, 192 parameters, and 64 more in the router: 0.27 billion in all, times 16 bytes for
# the fp32 weight, its gradient and Adam's two moments. Any Megatron flag may follow; other sizes are environment
# variables, see examples/granular_gpt.sh. It ends with the peak memory and the time per step. The first two steps take
# longer, because they rebuild the lists in full. Each other step of the default run makes a local rebuild; in longer
# runs a rebuild is spread over up to 20 steps. Not yet run on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

export NUM_EXPERTS=${NUM_EXPERTS:-1048576} HIDDEN_SIZE=${HIDDEN_SIZE:-64} EXPERT_SIZE=${EXPERT_SIZE:-1}
export TOPK=${TOPK:-32} NUM_LAYERS=${NUM_LAYERS:-1} NUM_HEADS=${NUM_HEADS:-2}
RANKS=${RANKS:-1}
export SEQ_LENGTH=${SEQ_LENGTH:-256} MICRO_BATCH=${MICRO_BATCH:-16}
export GLOBAL_BATCH=${GLOBAL_BATCH:-$((MICRO_BATCH * RANKS))}
export TRAIN_ITERS=${TRAIN_ITERS:-20} LOG_INTERVAL=${LOG_INTERVAL:-1} EVAL_ITERS=${EVAL_ITERS:-0}
export LR=${LR:-3e-3} INIT_STD=${INIT_STD:-0.06}
if [ "$RANKS" = 1 ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}; fi
. examples/granular_gpt.sh "$@"

OUT=${OUT:-out/million_experts}
mkdir -p "$OUT"
: >"$OUT/train.log"
COMMAND=(
  "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS" -m air_moe_megatron.pretrain
  "${FLAGS[@]}" --log-file "$OUT/train.log" "$@"
)
"$PYTHON" -c "
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(f'peak memory of a process: {peak / 2**20:.2f} GiB of the host', flush=True)
sys.exit(code)" "${COMMAND[@]}"

"$PYTHON" -c "
import re, statistics, sys
log = open(sys.argv[1]).read()
times = [float(ms) / 1000 for ms in re.findall(r'elapsed time per iteration \(ms\): ([0-9.]+)', log)]
later = times[len(times) // 2 :]
print(f'seconds per step in the last half of the run: median {statistics.median(later):.2f}, longest {max(later):.2f}')
print(f'log: {sys.argv[1]}')" "$OUT/train.log"
