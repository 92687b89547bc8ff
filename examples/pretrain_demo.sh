#!/usr/bin/env bash
# Pretrain a byte-level GPT with AIR routing on the source text of Python's standard library: two expert-parallel ranks,
# on CPU with gloo, or on two GPUs with NCCL where there are two. `make train` runs this after making the data.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
DATA=${DATA:-data/stdlib}
OUT=${OUT:-out/demo}
GPUS=$("$PYTHON" -W ignore -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null)
if [ "$GPUS" -ge 2 ]; then DEVICE=(--bf16); else DEVICE=(--cpu); export OMP_NUM_THREADS=1; fi

MODEL=(
  --num-layers 3 --hidden-size 128 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256
  --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --ffn-hidden-size 256
)
MOE=(
  --num-experts 64 --moe-ffn-hidden-size 64 --moe-router-topk 4 --moe-router-dtype fp32
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
  --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2
)
AIR=(--moe-router-type air)
TRAINING=(
  --micro-batch-size 8 --global-batch-size 16 --train-iters 300 --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine
  --lr-warmup-fraction 0.05 --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 --seed 1234
)
DATASET=(
  --tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 1
  --train-data-path "$DATA/stdlib_train" --valid-data-path "$DATA/stdlib_valid" --test-data-path "$DATA/stdlib_test"
)
OUTPUT=(
  --log-interval 20 --eval-interval 150 --eval-iters 10 --save "$OUT/checkpoint" --save-interval 300
  --tensorboard-dir "$OUT/tensorboard"
)

mkdir -p "$OUT"
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m air_moe_megatron.pretrain \
  "${DEVICE[@]}" "${MODEL[@]}" "${MOE[@]}" "${AIR[@]}" "${TRAINING[@]}" "${DATASET[@]}" "${OUTPUT[@]}" "$@" \
  2>&1 | tee "$OUT/train.log"
