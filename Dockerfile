# The runner on a CPU or, with a torch that has CUDA, on a GPU:
#   docker build -t espalier .
#   docker run --rm -it -v "$PWD/results:/results" -p 5000:5000 espalier
# Results land in /results: pass root=/results, or run in it as by default.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /espalier
# Dependencies first: an edit of the code does not install them again.
COPY pyproject.toml constraints.txt README.md ./
RUN python -m pip install --no-cache-dir --upgrade pip \
    && mkdir kernels models runner analysis conf \
    && PIP_CONSTRAINT=constraints.txt python -m pip install --no-cache-dir '.[track]' \
    && python -m pip uninstall -y espalier
COPY . .
RUN PIP_CONSTRAINT=constraints.txt python -m pip install --no-cache-dir --no-deps -e .

RUN useradd --create-home researcher && mkdir /results && chown researcher /results
USER researcher
WORKDIR /results
EXPOSE 5000
CMD ["bash"]
