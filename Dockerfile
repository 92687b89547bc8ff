# air_moe_megatron in NVIDIA's PyTorch container, which brings torch, NCCL, Transformer Engine and Apex.
#
#   docker build --tag air_moe_megatron .
#   docker run --rm --gpus all air_moe_megatron             # the doctor: versions, devices, the path of each operation
#
# How to train in it is in docs/launching.md. Linted and read by tests, never built: we had no Docker and no GPU.

# From 2.11 on torch will do: 26.05 has 2.12, and Python 3.12.
ARG PYTORCH_TAG=26.05-py3
FROM nvcr.io/nvidia/pytorch:${PYTORCH_TAG}

ARG MEGATRON_CORE_VERSION=0.19.2

# Without dependencies, so that the container's torch stays. Its constraints hold the versions of what was in it before.
RUN PIP_CONSTRAINT='' pip install --no-cache-dir --no-compile --no-deps "megatron-core==${MEGATRON_CORE_VERSION}"

WORKDIR /opt/air_moe_megatron
COPY LICENSE README.md pyproject.toml setup.py ./
COPY air_moe_megatron ./air_moe_megatron
COPY patches ./patches
COPY examples ./examples
# Editable: one copy of the code, and a checkout mounted over this folder takes its place.
RUN PIP_CONSTRAINT='' pip install --no-cache-dir --no-compile --no-deps --editable .

# Any user may run it, as in `docker run --user "$(id -u):$(id -g)"`: compiled kernels need a home that can be written.
RUN useradd --create-home --uid 10001 air && chmod 1777 /home/air
ENV HOME=/home/air USER=air \
    TRITON_CACHE_DIR=/home/air/.triton \
    TORCHINDUCTOR_CACHE_DIR=/home/air/.inductor
USER 10001

CMD ["python", "-m", "air_moe_megatron.doctor"]
