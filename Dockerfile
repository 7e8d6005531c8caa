# Dynamic-DINO's server in a container; docs/install.md says how to build and run it.
ARG TARGET=cpu

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /src
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY kernels kernels
COPY configs configs
COPY projects/DynamicDINO/dynamic_dino projects/DynamicDINO/dynamic_dino
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# The user's home is for what the Hugging Face hub and Triton keep.
RUN useradd --create-home --uid 1000 detector
COPY constraints.txt /tmp/constraints.txt

# What differs is PyTorch: constraints.txt says which version; pip prefers the one with +cpu.
FROM base AS cpu
# The address of PyTorch's wheels for CPUs, which its own site names; without it come the large ones.
ARG PIP_EXTRA_INDEX_URL
RUN pip install -c /tmp/constraints.txt torch torchvision

FROM base AS cuda
# Triton builds launchers when it runs; they include Python's headers, which this image has.
# Debian keeps no older version of a package, so that there is none to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN pip install -c /tmp/constraints.txt torch torchvision

# hadolint ignore=DL3006
FROM ${TARGET} AS server
COPY --from=wheel /wheels /tmp/wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /tmp/wheels/*.whl)[nano,serve]" \
    && dynamic-dino install-detectron2
# By number, so that a cluster can tell that it isn't root.
USER 1000
WORKDIR /home/detector
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["dynamic-dino"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
