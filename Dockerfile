# syntax=docker/dockerfile:1
# docker build -t loradiag .                                    the command, on the CPU
# docker build -t loradiag-ray --target ray --build-arg EXTRAS=hub,ray,remote .    a node of a Ray cluster
# docker run --rm --read-only --tmpfs /tmp -v "$PWD:/work" loradiag spectrum base tuned -o results.jsonl
# docker build -t loradiag --build-arg IMAGE=python:3.12-slim@sha256:DIGEST .     on exactly that image
# Packages have the versions of image.lock (make lock), but torch, which is that of TORCH and TORCH_INDEX.
ARG IMAGE=python:3.12-slim

FROM ${IMAGE} AS build
ARG EXTRAS=arrow,hub,remote,report
ARG TORCH=torch
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml image.lock README.md LICENSE ./
COPY lora_diag lora_diag
RUN python -m venv /opt/loradiag \
    && /opt/loradiag/bin/python -m pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" "$TORCH" \
    && /opt/loradiag/bin/python -m pip install --no-cache-dir -c image.lock ".[$EXTRAS]"
RUN python -m venv /opt/sbom \
    && /opt/sbom/bin/python -m pip install --no-cache-dir "cyclonedx-bom>=5.0" \
    && /opt/sbom/bin/cyclonedx-py environment /opt/loradiag/bin/python -o /opt/loradiag/sbom.json

FROM ${IMAGE} AS runtime
LABEL org.opencontainers.image.title="loradiag" \
      org.opencontainers.image.description="Rank diagnostics for fine-tuned models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      loradiag.sbom="/opt/loradiag/sbom.json"
RUN useradd --uid 1000 --create-home loradiag
COPY --from=build /opt/loradiag /opt/loradiag
# The root file system may be read-only: what libraries cache goes to /tmp.
ENV PATH=/opt/loradiag/bin:$PATH \
    HF_HOME=/tmp/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /work

FROM runtime AS ray
CMD ["ray", "--help"]

FROM runtime
ENTRYPOINT ["loradiag"]
CMD ["--help"]
