# One image for all processes: `ota-receiver serve` (default), `worker`, `api` and `ops`.
FROM python:3.13-slim AS build
WORKDIR /build
COPY requirements.txt .
RUN python -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements.txt
COPY pyproject.toml README.md ./
COPY app app
# app/ops/operations.md is a link to it.
COPY docs/operations.md docs/operations.md
COPY workers workers
# Parts for laptops and tests stay out of the image, also where .dockerignore is not honoured.
RUN rm -rf app/dev \
 && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps . \
 && /opt/venv/bin/pip uninstall --yes pip \
 && /opt/venv/bin/ota-receiver --help > /dev/null

FROM python:3.13-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin receiver \
 && install -d -o receiver -g receiver -m 0700 /var/lib/ota-receiver /var/lib/ota-receiver/spool \
    /var/lib/ota-receiver/erased /var/lib/ota-receiver/orders
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    PORT=8080 \
    API_HOST=0.0.0.0 \
    API_PORT=8081 \
    OPS_HOST=0.0.0.0 \
    OPS_PORT=8082
USER receiver
WORKDIR /var/lib/ota-receiver
EXPOSE 8080 8081 8082
# A worker finishes its fetch: give it more than UPSTREAM_TIMEOUT before SIGKILL (docker run --stop-timeout 120).
STOPSIGNAL SIGTERM
# Alive, not ready: it is healthy while Redis is away. `health --ready` is for readiness probes.
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=3 CMD ["ota-receiver", "health"]
CMD ["ota-receiver", "serve"]
