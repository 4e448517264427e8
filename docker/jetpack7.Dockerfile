# rdeploy on JetPack 7 (Thor, and Orin from 7.2; SBSA): NVIDIA's mainstream Arm images, there is no l4t-jetpack any more.
# The image's own TensorRT builds the engine, and opens it: 10.16 with CUDA 13.2 here, as JetPack 7.2 has (jetson-agx-orin-jp7).
# JetPack 7.0 and 7.1 (Thor, CUDA 13.0) have 10.13: add --build-arg TENSORRT=25.09-py3.
#   docker build --platform linux/arm64 -t rdeploy:jp7 -f docker/jetpack7.Dockerfile .
#   docker run --rm --runtime nvidia --group-add video --user "$(id -u):$(id -g)" -v "$PWD:/work" rdeploy:jp7 profile BUNDLE
ARG TENSORRT=26.05-py3
FROM nvcr.io/nvidia/tensorrt:${TENSORRT} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docker/constraints.txt docker/constraints.txt
COPY rdeploy rdeploy
COPY profiles profiles
# The image's packages stay visible: TensorRT is its own, and pip must never replace it.
RUN python3 -m venv --system-site-packages /opt/rdeploy \
 && /opt/rdeploy/bin/pip install --no-cache-dir -c docker/constraints.txt . onnxruntime cuda-bindings

FROM nvcr.io/nvidia/tensorrt:${TENSORRT}
COPY --from=build /opt/rdeploy /opt/rdeploy
# Any user may write here: `docker run --user` brings the one whose folder is mounted.
RUN useradd --create-home --uid 10001 rdeploy \
 && mkdir -p /home/rdeploy/.cache/rdeploy && chmod 1777 /home/rdeploy /home/rdeploy/.cache /home/rdeploy/.cache/rdeploy
USER 10001
ENV PATH=/opt/rdeploy/bin:$PATH HOME=/home/rdeploy USER=rdeploy RDEPLOY_CACHE=/home/rdeploy/.cache/rdeploy
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=120s CMD ["rdeploy", "doctor"]
ENTRYPOINT ["rdeploy"]
