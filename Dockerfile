# The service of 05_deploy: docker build -t llmprod . && docker run -p 127.0.0.1:8000:8000 -e LLMPROD_API_KEY -v "$PWD/served:/served:ro" llmprod
FROM python:3.11-slim

# A build of torch without CUDA is a tenth of the size: pass its index as --build-arg PIP_EXTRA_INDEX_URL=…
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 LLMPROD_HOME=/tmp/llmprod

WORKDIR /build
COPY . .
RUN pip install -c constraints.txt ".[serve,support]" && rm -rf /build/* && useradd --create-home --uid 10001 llmprod

USER 10001
WORKDIR /home/llmprod
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
# Exec form: SIGTERM reaches the service, which answers what waits and ends.
ENTRYPOINT ["python", "-m", "llmprod", "serve", "/served", "--host", "0.0.0.0", "--port", "8000"]
