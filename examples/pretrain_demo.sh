#!/usr/bin/env bash
# Pretrain a byte-level GPT with AIR routing on the source text of Python's standard library: two expert-parallel ranks
# on CPU with gloo, or on GPUs with NCCL where there are any (one rank on a single GPU). `make train` runs this after
# making the data; flags given to it are added to the command. To go on from its checkpoint:
# `--load out/demo/checkpoint --train-iters 400 --override-opt-param-scheduler`.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
DATA=${DATA:-data/stdlib}
OUT=${OUT:-out/demo}

RANKS=2
GPUS=$("$PYTHON" -W ignore -c 'import torch; print(torch.cuda.device_count())')
if [ "$GPUS" = 0 ]; then
  DEVICE=(--cpu)
  export OMP_NUM_THREADS=1
else
  # Megatron's own layers, as Transformer Engine and Apex may be missing.
  DEVICE=(
    --bf16 --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-persist-layer-norm --no-rope-fusion --no-bias-dropout-fusion
  )
  if [ "$GPUS" = 1 ]; then RANKS=1; fi
fi
MODEL=(
  --num-layers 3 --hidden-size 128 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256
  --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --ffn-hidden-size 256
)
MOE=(
  --num-experts 16384 --moe-ffn-hidden-size 2 --moe-router-topk 32 --moe-router-dtype fp32
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --expert-model-parallel-size "$RANKS"
)
AIR=(
  --moe-router-type air --moe-router-input-norm running --moe-router-topk-scaling-factor 16
  --moe-granular-experts --moe-dispatch compact
)
TRAINING=(
  --micro-batch-size 8 --global-batch-size 16 --train-iters 200 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine
  --lr-warmup-fraction 0.05 --init-method-std 0.06 --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 --seed 1234
)
DATASET=(
  --tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 1
  --train-data-path "$DATA/stdlib_train" --valid-data-path "$DATA/stdlib_valid" --test-data-path "$DATA/stdlib_test"
)
OUTPUT=(
  --log-interval 20 --eval-interval 100 --eval-iters 20 --save "$OUT/checkpoint" --save-interval 200
  --tensorboard-dir "$OUT/tensorboard" --log-file "$OUT/train.log" --moe-air-diagnostics-interval 10
)

mkdir -p "$OUT"
: >"$OUT/train.log"
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS" -m air_moe_megatron.pretrain \
  "${DEVICE[@]}" "${MODEL[@]}" "${MOE[@]}" "${AIR[@]}" "${TRAINING[@]}" "${DATASET[@]}" "${OUTPUT[@]}" "$@"

# Megatron prints nats per token, and a token is a byte.
NATS=$(grep 'on validation set | lm loss value' "$OUT/train.log" | tail -n 1 | sed -E 's/.*lm loss value: ([0-9.E+-]+).*/\1/')
"$PYTHON" -c "
import math, sys
nats = float(sys.argv[1])
print(f'''
validation: {nats / math.log(2):.3f} bits per byte, perplexity {math.exp(nats):.2f} per byte
checkpoint:  {sys.argv[2]}/checkpoint
log:         {sys.argv[2]}/train.log
TensorBoard: tensorboard --logdir {sys.argv[2]}/tensorboard
data:        {sys.argv[3]}''')" "$NATS" "$OUT" "$DATA"
PAGE=$("$PYTHON" -m air_moe_megatron.report "$OUT/checkpoint" --out "$OUT/report.html")
printf '%s\n' "report:      $PAGE" ''
"$PYTHON" -m air_moe_megatron.generate "${DEVICE[@]}" --load "$OUT/checkpoint" --prompt $'import os\n\n\ndef ' --temperature 0.6
