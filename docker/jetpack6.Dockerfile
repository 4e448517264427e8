# rdeploy on JetPack 6 (Orin; L4T r36, TensorRT 10.3, CUDA 12.6, Python 3.10): builds, measures and runs bundles on the device.
#   docker build -t rdeploy:jp6 -f docker/jetpack6.Dockerfile .
#   docker run --rm --runtime nvidia --group-add video --user "$(id -u):$(id -g)" -v "$PWD:/work" rdeploy:jp6 profile BUNDLE
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0 AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv python3-pip && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docker/constraints-py310.txt docker/constraints-py310.txt
COPY rdeploy rdeploy
COPY profiles profiles
# The system's packages stay visible: TensorRT is JetPack's own, and pip must never replace it.
RUN python3 -m venv --system-site-packages /opt/rdeploy \
 && /opt/rdeploy/bin/pip install --no-cache-dir -c docker/constraints-py310.txt . onnxruntime cuda-bindings

FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0
COPY --from=build /opt/rdeploy /opt/rdeploy
# Any user may write here: `docker run --user` brings the one whose folder is mounted.
RUN useradd --create-home --uid 10001 --groups video rdeploy \
 && mkdir -p /home/rdeploy/.cache/rdeploy && chmod 1777 /home/rdeploy /home/rdeploy/.cache /home/rdeploy/.cache/rdeploy
USER 10001
ENV PATH=/opt/rdeploy/bin:/usr/src/tensorrt/bin:$PATH HOME=/home/rdeploy USER=rdeploy RDEPLOY_CACHE=/home/rdeploy/.cache/rdeploy
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=120s CMD ["rdeploy", "doctor"]
ENTRYPOINT ["rdeploy"]
