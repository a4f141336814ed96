# syntax=docker/dockerfile:1
# One file, two images; `make image` and `make image DEVICE=cuda` build them with docker, podman or buildah.
#   docker build -t gptq-api:cpu --build-arg DEVICE=cpu .      CPU: torch's CPU build
#   docker build -t gptq-api:cuda .                             GPU: kernels compiled, CUDA's runtime from torch's wheel
#   docker run --gpus all -p 8000:8000 -v models:/cache -e GPTQ_API_API_KEY=secret gptq-api:cuda serve OWNER/NAME
# From top to bottom in the order of how seldom it changes: a change of our sources installs no library again.

# Any image with Python 3.11 or newer, venv and apt: BASE=debian-python:bookworm where that is what you have.
ARG BASE=python:3.12-slim
ARG DEVICE=cuda

# `--build-context wheels=FOLDER`: wheels to take before an index is asked, as where there is no network.
FROM scratch AS wheels

FROM ${BASE} AS requirements
ARG EXTRAS=events,otel
WORKDIR /src
COPY tools/install.py tools/
COPY pyproject.toml ./
RUN python3 tools/install.py --list-dependencies "$EXTRAS" >/requirements.txt

# The secret `pip` is a pip.conf, `ca` the certificates to believe; tools/build_image.py brings those of the machine.
FROM ${BASE} AS dependencies
ARG DEVICE
WORKDIR /src
COPY tools/install.py tools/
COPY constraints.txt ./
COPY --from=requirements /requirements.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=secret,id=pip --mount=type=secret,id=ca \
    case "$DEVICE" in cpu|cuda) ;; *) echo "DEVICE=$DEVICE is neither cpu nor cuda" >&2; exit 1 ;; esac; \
    if [ -e /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca SSL_CERT_FILE=/run/secrets/ca; fi; \
    export PIP_CONFIG_FILE=/run/secrets/pip PIP_FIND_LINKS=/wheels PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1; \
    TORCH=$DEVICE python3 tools/install.py --venv /opt/gptq-api --requirements requirements.txt && rm /opt/gptq-api/install.log

FROM ${BASE} AS compilers
RUN headers=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["include"])'); \
    apt-get update && apt-get install -y --no-install-recommends g++ \
      $([ -e "$headers/Python.h" ] || echo python3-dev) && rm -rf /var/lib/apt/lists/*

# The library by which Triton starts kernels, so that the image needs no compiler: it is for one Triton and one Python.
FROM compilers AS launcher
ARG DEVICE
COPY gptq_api/kernels/launcher.py /src/
RUN --mount=type=bind,from=dependencies,source=/opt/gptq-api,target=/opt/gptq-api \
    mkdir /launcher && if [ "$DEVICE" = cuda ]; then /opt/gptq-api/bin/python /src/launcher.py /launcher; fi

FROM compilers AS wheel
ARG DEVICE
# Of NVIDIA's compiler, from PyPI; it says which drivers will do: docs/operations.md
ARG CUDA=13.0
WORKDIR /src
COPY tools/build_wheels.py tools/
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY ext ext
COPY gptq_api gptq_api
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=secret,id=pip --mount=type=secret,id=ca \
    if [ -e /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca SSL_CERT_FILE=/run/secrets/ca; fi; \
    export PIP_CONFIG_FILE=/run/secrets/pip PIP_FIND_LINKS=/wheels PIP_NO_CACHE_DIR=1; \
    python3 -m venv /build && if [ "$DEVICE" = cuda ]; \
    then /build/bin/python tools/build_wheels.py --cuda "$CUDA" --out /dist && rm /dist/*.tar.gz; \
    else GPTQ_API_CUDA=off /build/bin/python -m pip wheel --no-deps --wheel-dir /dist .; fi

FROM ${BASE} AS base-cpu
FROM ${BASE} AS base-cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM base-${DEVICE} AS image
# /cache: the hub's models, weights packed for the CPU, what Triton compiles. Group 0 may write, for platforms that choose
# the user themselves.
RUN useradd --uid 10001 --gid 0 --create-home gptq && install -d -o gptq -g 0 -m 2770 /cache
COPY --from=dependencies /opt/gptq-api /opt/gptq-api
COPY --from=launcher /launcher /opt/gptq-api/share/gptq-api/launcher
COPY deploy/healthcheck.py /opt/gptq-api/share/gptq-api/
ENV PATH=/opt/gptq-api/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache TRITON_CACHE_DIR=/cache/triton \
    GPTQ_API_HOST=0.0.0.0
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    PYTHONDONTWRITEBYTECODE= pip install --no-cache-dir --no-index --no-deps /dist/*.whl
VOLUME /cache
USER gptq
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python3", "-I", "/opt/gptq-api/share/gptq-api/healthcheck.py"]
ENTRYPOINT ["gptq-api"]
# It listens on every address of the container: give it GPTQ_API_API_KEY, or say GPTQ_API_ALLOW_UNAUTHENTICATED=true.
CMD ["serve"]
ARG VERSION=0
ARG REVISION=unknown
ARG CREATED
LABEL org.opencontainers.image.title="gptq-api" \
      org.opencontainers.image.description="The OpenAI-compatible server for 4-bit GPTQ LLaMA checkpoints" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED"
