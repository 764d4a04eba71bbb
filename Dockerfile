# syntax=docker/dockerfile:1
# Two images from one file: `--target operator` (small, no torch) and `--target trainer` (prepare, train, finish,
# engine and agent). Both run as uid 65532, write nothing outside their mounts, and hold what the locks list.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
WORKDIR /src
COPY requirements/uv.txt requirements/uv.txt
RUN python -m pip install --no-cache-dir --require-hashes -r requirements/uv.txt
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_NO_CACHE=1

FROM build AS operator-build
COPY requirements/operator.txt requirements/operator.txt
RUN uv venv /opt/tuneward && uv pip sync --python /opt/tuneward/bin/python --require-hashes requirements/operator.txt
COPY . .
RUN uv pip install --python /opt/tuneward/bin/python --no-deps .

FROM build AS trainer-build
COPY requirements/trainer.txt requirements/trainer.txt
RUN uv venv /opt/tuneward && uv pip sync --python /opt/tuneward/bin/python --require-hashes requirements/trainer.txt
COPY . .
RUN uv pip install --python /opt/tuneward/bin/python --no-deps .

FROM python:${PYTHON}-slim-bookworm AS runtime
# A random uid (OpenShift) has no passwd entry and no home: these keep torch and transformers from asking for one.
ENV PATH=/opt/tuneward/bin:$PATH HOME=/tmp USER=tuneward PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /tmp

FROM runtime AS operator
COPY --from=operator-build /opt/tuneward /opt/tuneward
ENTRYPOINT ["python", "-m", "tuneward_operator"]
CMD ["run"]

# torch.compile's kernels are started by small C programs, which Triton makes on the spot; without a compiler layers run as they
# are.
FROM runtime AS compiling
USER 0
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 65532:65532

FROM compiling AS trainer
COPY --from=trainer-build /opt/tuneward /opt/tuneward
CMD ["python", "-m", "tuneward_trainer", "--help"]
