# make reproduce in a container:
#   docker build -t nondecoupling . && docker run --rm -v "$PWD/results:/nondecoupling/results" nondecoupling
# For a GPU: docker build --build-arg TORCH=cu130 ..., docker run --gpus all ... make reproduce PROFILE=paper
FROM python:3.11-slim
ARG TORCH=cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/${TORCH}
RUN apt-get update \
    && apt-get install -y --no-install-recommends make git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /nondecoupling
# The environment first: an edit of a chapter does not set it up again.
COPY Makefile pyproject.toml requirements.lock README.md ./
COPY src src
RUN PIP_NO_CACHE_DIR=1 make setup
COPY . .
CMD ["make", "reproduce"]
