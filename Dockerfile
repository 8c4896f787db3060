# One image for CPUs and GPUs: `foretoken serve` behind its API. See docs/operations.md.
#
#   docker build -t foretoken:0.1.0 .
#   docker run --read-only --tmpfs /tmp -v foretoken:/var/lib/foretoken -p 127.0.0.1:8000:8000 foretoken:0.1.0
#
# --build-arg TORCH=2.13.0+cpu and PIP_EXTRA_INDEX_URL choose the CPU build of torch, as with `make setup`.

FROM python:3.11-slim AS build
ARG TORCH=""
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY requirements.lock ./
# Each file is checked against its hash; the tests' and the linters' packages stay behind in this stage.
RUN python3 -m pip download --quiet --no-deps --require-hashes --requirement requirements.lock --dest /wheels
RUN sed -n 's/^\([a-z0-9].*\) \\$/\1/p' requirements.lock > /wheels/pins.txt
RUN python3 -m venv /opt/foretoken
RUN version=$(sed -n 's/^# torch==//p' requirements.lock) \
    && /opt/foretoken/bin/pip install --quiet --no-cache-dir --find-links /wheels --constraint /wheels/pins.txt \
        "torch==${TORCH:-$version}"
COPY pyproject.toml setup.py README.md LICENSE ./
COPY cluster cluster
COPY workers workers
COPY loadtests loadtests
COPY cuda cuda
RUN /opt/foretoken/bin/pip install --quiet --no-index --find-links /wheels --constraint /wheels/pins.txt .

FROM python:3.11-slim
# The compiler (0.2 GB) is here on purpose. The CPU kernels are several times faster than torch's operations because they
# are compiled for the very processor; an image knows no processor, so the first start compiles them into
# FORETOKEN_HOME, where the next one finds them. Kernels for the least common denominator would be slower everywhere.
# tini is process 1: it passes signals on from the first moment and collects what ended.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /var/lib/foretoken foretoken
COPY --from=build /opt/foretoken /opt/foretoken
# In a container 127.0.0.1 reaches nobody. On 0.0.0.0 clients must show a key: give FORETOKEN_API_KEY, or read the one
# that is printed at the start.
ENV PATH=/opt/foretoken/bin:$PATH \
    HOME=/var/lib/foretoken \
    HF_HOME=/var/lib/foretoken/huggingface \
    FORETOKEN_HOME=/var/lib/foretoken \
    FORETOKEN_HOST=0.0.0.0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /var/lib/foretoken
EXPOSE 8000
ENTRYPOINT ["tini", "--", "foretoken"]
CMD ["serve"]
