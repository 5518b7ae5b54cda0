# The service. From the repository's root: docker build -f docker/service.Dockerfile -t freestep-service .
# Down to the line of dashes, worker.Dockerfile is the same, so that both images share the layer with torch.
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

FROM client AS service
RUN python requirements.py service oidc >requirements.txt \
    && pip install --prefix /service --constraint constraints.txt --requirement requirements.txt

FROM client AS sbom
COPY --from=service /service /opt/freestep
COPY --from=project /project /opt/freestep
# Beside the environment that it lists, and left behind with this stage.
RUN python requirements.py sbom >requirements.txt \
    && env -u PIP_PYTHON pip install --constraint constraints.txt --requirement requirements.txt \
    && cyclonedx-py environment --output-reproducible --output-file /sbom.cdx.json /opt/freestep/bin/python

FROM ${PYTHON}
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent freestep
# From what changes seldom to what changes daily: torch, the service's dependencies, freestep itself.
COPY --from=client /opt/freestep /opt/freestep
COPY --from=service /service /opt/freestep
COPY --from=project /project /opt/freestep
COPY --from=sbom /sbom.cdx.json /opt/freestep/sbom.cdx.json
COPY docker/healthcheck.py /opt/freestep/healthcheck.py
RUN install -d -o freestep -g freestep /data /tokens
# PASSIVE: torch's idle threads sleep instead of spinning against the event loop; FREESTEP_THREADS says how many.
# NUMBA_CACHE_DIR: who has no home keeps compiled loops with the data, so that only the first start compiles them.
# XDG_CONFIG_HOME: who has no home leaves the admin token there, where `docker exec CONTAINER freestep ...` finds it.
ENV PATH=/opt/freestep/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    NUMBA_CACHE_DIR=/data/.cache \
    XDG_CONFIG_HOME=/tmp \
    FREESTEP_HOST=0.0.0.0 \
    FREESTEP_DATA_DIR=/data
# A number, so that Kubernetes can tell that it is not root.
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "/opt/freestep/healthcheck.py"]
ENTRYPOINT ["freestep"]
CMD ["serve"]
