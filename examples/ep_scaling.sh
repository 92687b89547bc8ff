#!/usr/bin/env bash
# How training scales with expert parallelism: one short run per expert-parallel size, each on as many ranks, with the
# same tokens per rank. Writes OUT/ep_scaling.csv and OUT/ep_scaling.png, with the prediction of air_moe_megatron.plan
# beside what was measured; NODE_GBYTES is the speed at which it takes a rank to send.
#
#   bash examples/ep_scaling.sh                              # EP 1, 2, 4, 8 on the GPUs of this machine
#   EP_SIZES="1 2 4" bash examples/ep_scaling.sh --cpu       # tiny, on CPU
#
# Any Megatron flag may follow; the sizes of examples/granular_gpt.sh are environment variables. The shortlists are
# rebuilt after each of the first twenty steps, then less and less often, and every twentieth step from the 200th on: steps
# before WARMUP do not count, and a log line of twenty steps holds one rebuild. For a quick look at the pace of a young
# codebook: WARMUP=20 TRAIN_ITERS=70 LOG_INTERVAL=10. All ranks of a CPU share its cores, so tokens per second do not
# scale there; bytes and loads are counted as on GPUs. Not yet run on GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
EP_SIZES=${EP_SIZES:-1 2 4 8}
OUT=${OUT:-out/ep_scaling}
WARMUP=${WARMUP:-400}
export TRAIN_ITERS=${TRAIN_ITERS:-480} LOG_INTERVAL=${LOG_INTERVAL:-20}

mkdir -p "$OUT"
RUNS=()
for size in $EP_SIZES; do
  log=$OUT/ep$size.log run=$OUT/ep$size
  RUNS+=("$run")
  rm -f "$run"/events.*  # of an earlier run
  echo "EP $size of $EP_SIZES: $TRAIN_ITERS steps, log $log"
  SECONDS=0
  (
    RANKS=$size EP=$size EVAL_ITERS=0
    . examples/granular_gpt.sh "$@"
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS" -m air_moe_megatron.pretrain \
      "${FLAGS[@]}" --global-batch-size "$((MICRO_BATCH * RANKS))" \
      --tensorboard-dir "$run" --log-timers-to-tensorboard "$@"
  ) >"$log" 2>&1 || { tail -n 30 "$log" >&2; echo "EP $size failed; its log is $log" >&2; exit 1; }
  echo "EP $size: done in $SECONDS s"
done
# shellcheck disable=SC2031  # the subshells leave PYTHON as it is
"$PYTHON" examples/ep_scaling.py --warmup "$WARMUP" --node-gbytes "${NODE_GBYTES:-300}" --out "$OUT" "${RUNS[@]}"
