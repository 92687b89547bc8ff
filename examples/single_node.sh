#!/usr/bin/env bash
# Pretrain a granular MoE on the GPUs of one machine: 65,536 experts of two hidden units, 64 per token.
#
#   DATA=/data/my_corpus TOKENIZER="--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR" \
#     bash examples/single_node.sh
#   RANKS=2 bash examples/single_node.sh --cpu        # the same on CPU, tiny, on the data of `make data`
#
# Any Megatron flag may follow. To go on from the checkpoint: `--load OUT/checkpoint`. Sizes and data are environment
# variables, see examples/granular_gpt.sh. Not yet run on GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/granular_gpt.sh "$@"

OUT=${OUT:-out/single_node}
mkdir -p "$OUT"
: >"$OUT/train.log"
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS" -m air_moe_megatron.pretrain \
  "${FLAGS[@]}" --save "$OUT/checkpoint" --save-interval "$SAVE_INTERVAL" --tensorboard-dir "$OUT/tensorboard" \
  --log-file "$OUT/train.log" "$@"
