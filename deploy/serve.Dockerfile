# The image of a search service alone: `mmref serve` in one process, and nothing that trains (no Ray, no DeepSpeed, no compiler).
#
#   docker build -f deploy/serve.Dockerfile -t mmref:0.2.0-serve .
#   docker run -p 8000:8000 -v /data/photo-index:/photo-index -e MMREF_TOKEN=$(openssl rand -hex 16) mmref:0.2.0-serve \
#     mmref serve /photo-index --host 0.0.0.0
#
# It indexes and evaluates too, in one process. torch brings its CUDA libraries; an index of CPU-only wheels, given as
# PIP_EXTRA_INDEX_URL, makes the image smaller by gigabytes.
ARG BASE_IMAGE=python:3.12.12-slim-bookworm
FROM ${BASE_IMAGE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --shell /bin/bash mmref \
    && mkdir /opt/mmref /opt/venv /shared \
    && chown mmref:mmref /opt/mmref /opt/venv /shared
USER mmref
WORKDIR /opt/mmref

ENV PATH=/opt/venv/bin:${PATH} \
    HF_HOME=/shared/huggingface \
    MMREF_CACHE=/shared/mmref \
    PYTHONUNBUFFERED=1

ARG PIP_EXTRA_INDEX_URL=""

# the dependencies first, as in Dockerfile: a change of code does not install them again
COPY --chown=mmref pyproject.toml README.md LICENSE deploy/constraints.txt ./
COPY --chown=mmref mmref/__init__.py mmref/version.py mmref/
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --constraint constraints.txt ".[serve,s3]" \
    && pip uninstall --yes mmref

COPY --chown=mmref . .
RUN pip install --no-cache-dir --no-deps .

# no server starts by default, and none without a token
ENTRYPOINT ["tini", "--"]
CMD ["mmref", "--help"]
