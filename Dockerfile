# timebox with all that it needs, for NVIDIA's GPUs and for CPUs. docs/installing.md has the commands.
#
# This image was never built. Each RUN line below was run as a command of a shell, on Debian 12 with its Python 3.11, and
# the commands behind it trained and passed tests; the base image, COPY, and a GPU inside a container were not tried.
#
# The base has no compiler and no CUDA libraries: PyTorch brings its own, and the driver is the host's.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

# Triton compiles a small module for the driver when it first launches a kernel: a C compiler, and Python's headers.
RUN --mount=type=cache,target=/var/lib/apt/lists \
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
    ca-certificates gcc git libc6-dev make python3 python3-dev python3-venv

WORKDIR /timebox
# What is installed depends on these alone: a change elsewhere does not install it anew.
COPY Makefile pyproject.toml README.md LICENSE ./
RUN --mount=type=cache,target=/root/.cache/pip make dev PYTHON=python3

COPY . .
# Prepared data, tuned tiles; a volume of the host's keeps them from one container to the next.
ENV TIMEBOX_HOME=/data
ENTRYPOINT [".venv/bin/python", "-m"]
CMD ["train"]
