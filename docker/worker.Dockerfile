# Workers and evaluators. From the repository's root: docker build -f docker/worker.Dockerfile -t freestep-worker .
# Down to the line of dashes, service.Dockerfile is the same, so that both images share the layer with torch.
ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS client
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PYTHON=/opt/freestep/bin/python
WORKDIR /src
# pip stays outside: the environment is copied as it is.
RUN python -m venv --without-pip /opt/freestep
# PyTorch's index of CPU builds: PyPI's torch brings gigabytes of CUDA. Empty takes PyPI's.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt ./
# Alone and without its dependencies, so that no other package is ever looked for on that index; and without the
# 130 MB of PyTorch's own test programs.
RUN pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint constraints.txt torch \
    && cd /opt/freestep/lib/python3*/site-packages/torch \
    && rm -rf test \
    && find bin -type f ! -name torch_shm_manager -delete
COPY pyproject.toml docker/requirements.py ./
RUN python requirements.py >requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

FROM client AS project
COPY README.md LICENSE ./
COPY client client
COPY service service
RUN pip install --no-deps --prefix /project .
# ----

FROM client AS demo
RUN python requirements.py demo >requirements.txt \
    && pip install --prefix /demo --constraint constraints.txt --requirement requirements.txt

FROM ${PYTHON}
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent freestep
COPY --from=client /opt/freestep /opt/freestep
COPY --from=demo /demo /opt/freestep
COPY --from=project /project /opt/freestep
# One thread: many workers on one machine is the usual case here, and their threads would spin against each other.
# A worker that has the machine to itself takes more.
ENV PATH=/opt/freestep/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=1 \
    MPLCONFIGDIR=/tmp/matplotlib
# `docker stop` has a script of your own release its lease.
ENV FREESTEP_LEAVE_ON_SIGTERM=1
# A number, so that Kubernetes can tell that it is not root.
USER 10001:10001
WORKDIR /tmp
# A worker serves nothing that could be asked; the service knows its health, by its lease.
HEALTHCHECK NONE
CMD ["python", "-m", "freestep.demo.worker"]
