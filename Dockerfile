# Basestone with what its GPU path needs: CUDA's compiler for DeepSpeed's kernels, InfiniBand's libraries for NCCL.
#     docker build -t basestone .
#     docker run --gpus all --ipc host -v "$PWD/runs:/runs" basestone launch /runs/run.toml
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

ARG DEBIAN_FRONTEND=noninteractive
# Versions are those of the base image's release of Ubuntu.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        git ibverbs-providers libaio-dev libibverbs1 librdmacm1 ninja-build openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/basestone
ENV PATH=/opt/basestone/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/tmp/cache

# The tested versions first: they change less often than the sources.
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt torch \
    && pip install --no-cache-dir --constraint constraints.txt deepspeed megatron-core
COPY . ./
RUN pip install --no-cache-dir --constraint constraints.txt '.[s3,zst,wandb,prometheus]' \
    && useradd --create-home --uid 1001 basestone
USER 1001
WORKDIR /home/basestone
ENTRYPOINT ["basestone"]
CMD ["--help"]
