# The server with its bundled model. Torch's wheels bring CUDA's libraries, so a slim base is enough for GPUs, too;
# Triton compiles its kernels at run time and needs a C compiler and libc headers.
# The stop timeout is longer than --shutdown-timeout, so that running requests can finish.
#   docker build -t tidar-server .
#   docker run --stop-timeout 45 -p 8000:8000 tidar-server
#   docker run --stop-timeout 45 --gpus all -p 8000:8000 -v /path/to/checkpoint:/model:ro tidar-server /model
FROM python:3.12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./

# Without the packages this installs what they depend on, in a layer that outlives changes of the code.
# For a CPU-only image: --build-arg PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
ARG PIP_ARGS=""
RUN pip install --no-cache-dir $PIP_ARGS --constraint constraints.txt . \
    && pip uninstall --yes tidar-server

COPY kernels kernels
COPY engine engine
COPY training training
COPY server server
RUN pip install --no-cache-dir --no-deps .

RUN useradd --create-home tidar
USER tidar
ENV TRITON_CACHE_DIR=/home/tidar/.triton
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD python -c "import os, urllib.request as r; port = os.environ.get('TIDAR_PORT') or 8000; \
r.urlopen(f'http://127.0.0.1:{port}/health/ready', timeout=2)"
ENTRYPOINT ["tidar", "serve", "--host", "0.0.0.0"]
