# One image for every pod: --target cpu, or --target cuda for hosts with NVIDIA GPUs.
# Weights, secrets and configuration are mounted; nothing of them is in here.

ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS base
ENV PATH=/opt/trivium/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN groupadd --gid 10001 trivium \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/trivium --shell /bin/bash trivium \
    && python -m venv /opt/trivium/venv

FROM base AS cpu-packages
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install torch==${TORCH} --index-url ${TORCH_INDEX}
COPY . /src
RUN pip install /src

FROM base AS cuda-packages
ARG TORCH=2.13.0
COPY . /src
RUN pip install torch==${TORCH} "/src[gpu]"

# The loops of kernels/ and experts/ are compiled here once. What is kept of them is good for sources of the same time,
# of which a layer keeps whole seconds only.
FROM cpu-packages AS cpu-build
WORKDIR /opt/trivium/venv/lib/python3.11/site-packages
RUN find cluster prefill decode experts kernels -name "*.py" -exec touch --date=@1767225600 {} + \
    && python -m compileall -q -f cluster prefill decode experts kernels
ENV NUMBA_CACHE_DIR=/opt/trivium/machine-code
RUN python -c "import decode.step, experts.client, prefill.step" && python -m experts.prepare

FROM cuda-packages AS cuda-build
WORKDIR /opt/trivium/venv/lib/python3.11/site-packages
RUN find cluster prefill decode experts kernels -name "*.py" -exec touch --date=@1767225600 {} + \
    && python -m compileall -q -f cluster prefill decode experts kernels
ENV NUMBA_CACHE_DIR=/opt/trivium/machine-code
RUN python -c "import decode.step, experts.client, prefill.step" && python -m experts.prepare

# Triton compiles a small launcher in C for each kernel when it first runs.
FROM base AS cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=cuda-build /opt/trivium /opt/trivium
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /home/trivium
CMD ["trivium", "--help"]

FROM base AS cpu
COPY --from=cpu-build /opt/trivium /opt/trivium
USER 10001:10001
WORKDIR /home/trivium
CMD ["trivium", "--help"]
