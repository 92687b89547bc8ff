# shellcheck shell=bash disable=SC2034
# The model and training flags that the launchers share. A launcher sources this file from the repository's root with
# its own arguments, `. examples/granular_gpt.sh "$@"`, and gets the array FLAGS, and RANKS, the processes of this node.
#
# Environment, beside the sizes in the table below:
#   DATA        prefix of an indexed data set (x.bin, x.idx), or `mock`: tokens that count up; default: of `make data`
#   TOKENIZER   Megatron's flags of the tokenizer that made DATA; default bytes, as in the default DATA
#   RANKS       processes on this node; default all GPUs, or 2 on CPU
#   EP          expert-parallel size; default RANKS, so that dispatched tokens stay within a node
#   SPLIT       parts of DATA's documents for training, validation, test; default 98,1,1, or all for training with
#               EVAL_ITERS=0 (the default on CPU). A part must get a document: 98,1,1 needs about 50 of them.
#   PYTHON      default python; .venv/bin/python after `make install`
# Any Megatron flag given to a launcher comes last and wins. For tensor parallelism give
# `--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1`.
#
# The branches for GPUs are written from Megatron's documentation and have not been run yet.

PYTHON=${PYTHON:-python}
has_module() { "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)' "$1"; }
if ! has_module torch; then
  echo "$0: PYTHON ($PYTHON) has no torch; activate its environment, or after 'make install' give PYTHON=.venv/bin/python" >&2
  exit 1
fi
NNODES=${NNODES:-1}

# --- Device ---
case " $* " in
  *" --cpu "*) GPUS=0 && export CUDA_VISIBLE_DEVICES= ;;
  *)
    GPUS=$("$PYTHON" -W ignore -c 'import torch; print(torch.cuda.device_count())')
    if [ "$GPUS" = 0 ]; then
      # A node whose GPUs are missing must not join the others with a tiny model.
      if [ "$NNODES" != 1 ]; then echo "$0: no GPU is visible; give --cpu on every node to train on CPU" >&2; exit 1; fi
      echo "$0: no GPU is visible: training on CPU with gloo, tiny where no sizes are given" >&2
    fi
    ;;
esac
RANKS=${RANKS:-$([ "$GPUS" = 0 ] && echo 2 || echo "$GPUS")}
if [ "$GPUS" != 0 ] && [ "$RANKS" -gt "$GPUS" ]; then
  echo "$0: $RANKS processes need as many GPUs on a node, and $GPUS are visible" >&2
  exit 1
fi

if [ "$GPUS" = 0 ]; then
  DEVICE=(--cpu)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
  DEVICE=(--bf16 --overlap-grad-reduce)
  if has_module transformer_engine; then
    DEVICE+=(--transformer-impl transformer_engine --use-distributed-optimizer --overlap-param-gather)
  else
    # Megatron's own layers; without Transformer Engine a run with the distributed optimizer could not be resumed.
    DEVICE+=(--transformer-impl local --no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion)
    DEVICE+=(--no-bias-dropout-fusion)
  fi
  if ! has_module fused_weight_gradient_mlp_cuda; then DEVICE+=(--no-gradient-accumulation-fusion); fi  # Apex's
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # Megatron asks for it with tensor parallelism
  # The number of rows that a rank receives changes with every step; growing segments do not fragment memory.
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
fi

# --- Sizes ---
# size NAME GPU CPU: the environment's NAME, or the default of this device. The default on GPUs has 4.8 billion
# parameters in the experts, shared out over the expert-parallel ranks, and 0.8 billion in the routers, which every rank
# holds.
size() {
  local default=$2
  if [ "$GPUS" = 0 ]; then default=$3; fi
  printf -v "$1" %s "${!1:-$default}"
}
size NUM_LAYERS     12      2
size HIDDEN_SIZE    1024    64
size NUM_HEADS      16      2
size SEQ_LENGTH     2048    64
size NUM_EXPERTS    65536   256
size EXPERT_SIZE    2       1     # hidden units of an expert, Megatron's --moe-ffn-hidden-size
size TOPK           64      8
size MICRO_BATCH    4       2
size GLOBAL_BATCH   256     "$((MICRO_BATCH * RANKS * NNODES))"
size TRAIN_ITERS    2000    20
size LR             5e-4    3e-3
size INIT_STD       0.02    0.06
size LOG_INTERVAL   10      1
size EVAL_ITERS     10      0
size SAVE_INTERVAL  500     1000
DATA=${DATA:-data/stdlib/stdlib_train}
BYTES="--tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 1"
read -ra TOKENIZER_FLAGS <<<"${TOKENIZER:-$BYTES}"

# --- Flags ---
MODEL=(
  --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --num-attention-heads "$NUM_HEADS"
  --ffn-hidden-size "$((4 * HIDDEN_SIZE))" --seq-length "$SEQ_LENGTH" --max-position-embeddings "$SEQ_LENGTH"
  --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --init-method-std "$INIT_STD"
)
MOE=(
  --air-moe --num-experts "$NUM_EXPERTS" --moe-ffn-hidden-size "$EXPERT_SIZE" --moe-router-topk "$TOPK"
  --expert-model-parallel-size "${EP:-$RANKS}"
)
TRAINING=(
  --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters "$TRAIN_ITERS"
  --lr "$LR" --min-lr 0 --lr-decay-style cosine --lr-warmup-fraction 0.05
  --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 --seed 1234
  --log-interval "$LOG_INTERVAL" --eval-interval "$SAVE_INTERVAL" --eval-iters "$EVAL_ITERS"
)
if [ "$DATA" = mock ]; then
  DATASET=(--mock-data)
else
  if [ ! -e "$DATA.idx" ]; then
    echo "$0: DATA: $DATA.idx does not exist; \`make data\` makes the default data, DATA=mock needs none" >&2
    exit 1
  fi
  # Megatron makes a split that has a share even where nothing is evaluated.
  SPLIT=${SPLIT:-$([ "$EVAL_ITERS" = 0 ] && echo 1,0,0 || echo 98,1,1)}
  DATASET=(--data-path "$DATA" --split "$SPLIT")
fi
FLAGS=(
  "${DEVICE[@]}" "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "${DATASET[@]}" "${TOKENIZER_FLAGS[@]}"
)
