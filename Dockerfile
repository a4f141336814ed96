# syntax=docker/dockerfile:1
# One file, two images:
#   docker build -t gptq-api .                              GPU: kernels compiled, CUDA runtime from torch's wheel
#   docker build -t gptq-api:cpu --build-arg DEVICE=cpu .   CPU: the CPU kernels
#   docker run --gpus all -p 8000:8000 -v /models:/models -e GPTQ_API_API_KEY=secret gptq-api serve /models/vicuna
ARG DEVICE=cuda
ARG CUDA=13.0.2
ARG PYTHON=3.12

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build-cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ && rm -rf /var/lib/apt/lists/*
ENV GPTQ_API_CUDA=on

FROM python:${PYTHON}-slim AS build-cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ENV GPTQ_API_CUDA=off

FROM build-${DEVICE} AS build
WORKDIR /src
RUN python3 -m venv /venv && /venv/bin/pip install --no-cache-dir build
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY ext ext
COPY gptq_api gptq_api
RUN /venv/bin/python -m build --wheel --outdir /wheels .

FROM nvidia/cuda:${CUDA}-base-ubuntu24.04 AS runtime-cuda
# gcc and the headers: triton builds the launcher of a kernel where it runs
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev && rm -rf /var/lib/apt/lists/*

FROM python:${PYTHON}-slim AS runtime-cpu

FROM runtime-${DEVICE} AS runtime
# torch's default build brings CUDA; an extra package index with CPU builds keeps the CPU image small.
ARG PIP_EXTRA_INDEX_URL
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /tmp/wheels
RUN python3 -m venv /opt/gptq-api \
 && /opt/gptq-api/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt /tmp/wheels/*.whl \
 && rm -rf /tmp/wheels /tmp/constraints.txt \
 && useradd --create-home --uid 10001 gptq
ENV PATH=/opt/gptq-api/bin:$PATH PYTHONUNBUFFERED=1 GPTQ_API_HOST=0.0.0.0 GPTQ_API_PORT=8000
USER gptq
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['GPTQ_API_PORT']}/ready\", timeout=2)"]
ENTRYPOINT ["gptq-api"]
# The image listens on every address of the container: give it GPTQ_API_API_KEY, or say GPTQ_API_ALLOW_UNAUTHENTICATED=true.
CMD ["serve"]
