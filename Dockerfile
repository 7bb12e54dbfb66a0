# The server, on a CPU by default; for a GPU:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t qlora-serve .
FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=quant,gguf
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts/install.sh scripts/install.sh
COPY qlora_serve qlora_serve
RUN TORCH_INDEX="$TORCH_INDEX" scripts/install.sh /opt/qlora-serve "$EXTRAS"

FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 10001 serve \
    && mkdir -p /bases /adapters \
    && chown serve:serve /bases /adapters
COPY --from=build /opt/qlora-serve /opt/qlora-serve
ENV PATH=/opt/qlora-serve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    QLORA_SERVE_CACHE=/bases
USER 10001
VOLUME ["/bases", "/adapters"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
# docker run -p 8000:8000 -v $PWD/bases:/bases -v $PWD/adapters:/adapters qlora-serve
ENTRYPOINT ["qlora-serve", "serve"]
# A container's port is reached by nobody until it is published; with keys, give --keys instead.
CMD ["smollm2", "--host", "0.0.0.0", "--allow-unauthenticated", "--adapters-dir", "/adapters"]
