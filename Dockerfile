# dinat-serve for a GPU host, or for a CPU. docs/deploy.md describes how to build and run it.
#
#   docker build --tag dinat-serve .
#   docker build --tag dinat-serve:cpu --build-arg VARIANT=cpu --build-arg BASE_IMAGE=debian:bookworm-slim .
#
# Large layers that seldom change come first: a change of the code rebuilds one small layer.

# 13.0; 12.8 or 12.6 for older drivers and GPUs (docs/gpus.md). The base images, PyTorch's build and NATTEN's wheel follow from it.
ARG CUDA=13.0
# PyTorch installs the CUDA libraries. Only compiling NATTEN uses BUILD_IMAGE. Both must be the same distribution.
ARG BASE_IMAGE=cuda-${CUDA}
ARG BUILD_IMAGE=cuda-${CUDA}-devel
# cpu; gpu, with NATTEN's published wheel for this PyTorch and CUDA, if there is one; gpu-source compiles NATTEN, in hours
ARG VARIANT=gpu

FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS cuda-13.0
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS cuda-13.0-devel
FROM nvidia/cuda:12.8.1-base-ubuntu24.04 AS cuda-12.8
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04 AS cuda-12.8-devel
FROM nvidia/cuda:12.6.3-base-ubuntu24.04 AS cuda-12.6
FROM nvidia/cuda:12.6.3-devel-ubuntu24.04 AS cuda-12.6-devel

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS packages
ARG CUDA VARIANT
# pip's settings, for another index or a folder of wheels
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
# An index with subfolders cpu, cu126, cu128 and cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl
ENV PATH=/opt/venv/bin:$PATH
# libgomp1: the compiled kernels link to it, and not every build of PyTorch includes it.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates libgomp1 python3 python3-venv \
    && apt-get clean && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
WORKDIR /build
COPY constraints.txt ./
# PyTorch 2.11 is the last release with builds for CUDA 12.8; it requires its own version of Triton.
RUN if [ "$CUDA" = 12.8 ]; then sed --in-place --expression 's/^torch==.*/torch==2.11.0/' --expression '/^triton==/d' constraints.txt; fi
# A build from PyTorch's index has a local version such as +cu126, which pip prefers to the same version without one. The check
# fails if that index was not reached. PyTorch's C++ tests (over 100 MB) and protoc are not used at run time. torch/include is:
# torch.compile includes its headers.
RUN cuda=$CUDA && build=cu${CUDA%.*}${CUDA#*.} \
    && if [ "$VARIANT" = cpu ]; then cuda=none && build=cpu; fi \
    && pip install --no-cache-dir --constraint constraints.txt --extra-index-url "$TORCH_INDEX/$build" torch \
    && if [ -z "$PIP_NO_INDEX" ]; then python -W ignore -c 'import sys, torch; found = torch.version.cuda or "none"; \
        sys.exit(found != sys.argv[1] and f"PyTorch is built for CUDA {found}, not {sys.argv[1]}: is TORCH_INDEX reachable?")' \
        "$cuda"; fi \
    && rm -rf /opt/venv/lib/python3*/site-packages/torch/test \
        /opt/venv/lib/python3*/site-packages/torch/bin/protoc* \
        /opt/venv/lib/python3*/site-packages/torch/bin/*[Tt]est*
COPY requirements-image.txt ./
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement requirements-image.txt && pip check

FROM packages AS variant-cpu
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
COPY requirements-image-cpu.txt ./
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement requirements-image-cpu.txt && pip check

# hadolint ignore=DL3006
FROM ${BUILD_IMAGE} AS natten-source
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
ARG NATTEN_CUDA_ARCH="8.0;9.0;10.0"
ARG NATTEN_N_WORKERS=8
ENV PATH=/opt/venv/bin:$PATH
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && apt-get clean && rm -rf /var/lib/apt/lists/*
COPY --from=packages /opt/venv /opt/venv
WORKDIR /build
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt setuptools wheel ninja cmake \
    && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels --constraint constraints.txt natten

FROM packages AS gpu
# Triton compiles a small launcher for each kernel on its first run.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && apt-get clean && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM gpu AS variant-gpu
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
ARG CUDA
# A page or folder that lists wheels, default NATTEN's own
ARG NATTEN_WHEELS
COPY app/natten_wheel.py ./
RUN mkdir /natten \
    && NATTEN_CUDA="$CUDA" python natten_wheel.py /natten \
    && find /natten -name '*.whl' -exec pip install --no-cache-dir --no-deps {} + \
    && rm -rf /natten

FROM gpu AS variant-gpu-source
COPY --from=natten-source /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl

# hadolint ignore=DL3006
FROM packages AS project
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends gcc libc6-dev \
    && apt-get clean && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE ./
# dinat/app and dinat/model are symbolic links to app/ and model/; the installed package holds their files.
COPY dinat dinat
COPY model model
COPY app app
RUN pip install --no-cache-dir --no-deps --target /opt/dinat .
# Compile the kernels for every CPU of this architecture: the CPU image has no compiler. Python's module path begins with the
# working directory, and in /build the kernels would be written beside the sources there.
WORKDIR /
RUN PYTHONPATH=/opt/dinat python -m dinat.model.native

# hadolint ignore=DL3006
FROM variant-${VARIANT}
# All files written at run time go to /cache: graphs, compiled kernels, downloaded weights. /tmp may be a tmpfs.
RUN useradd --uid 10001 --gid 0 --home-dir /cache --no-create-home dinat \
    && mkdir --parents /cache /models \
    && chown dinat /cache \
    && chmod 775 /cache
WORKDIR /models
# The weights of a Hub id become part of the image; otherwise they are downloaded at the first start and cached in /cache.
ARG MODEL=digits
ARG HF_ENDPOINT
RUN if [ "$MODEL" != digits ]; then \
        hf download "$MODEL" config.json --local-dir "$MODEL" \
        && hf download "$MODEL" preprocessor_config.json --local-dir "$MODEL" \
        && { hf download "$MODEL" model.safetensors --local-dir "$MODEL" \
            || hf download "$MODEL" pytorch_model.bin --local-dir "$MODEL"; } \
        && rm -rf "$MODEL/.cache" "$HOME/.cache"; \
    fi
ENV DINAT_MODEL=$MODEL \
    DINAT_HOST=0.0.0.0 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    PATH=/opt/dinat/bin:/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/dinat \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
COPY --from=project /opt/dinat /opt/dinat
USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-m", "dinat.app.healthcheck"]
ENTRYPOINT ["dinat"]
CMD ["serve"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dinat-serve" \
      org.opencontainers.image.description="DiNAT, the Dilated Neighborhood Attention Transformer, over HTTP" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
