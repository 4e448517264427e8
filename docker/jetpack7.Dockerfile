# rdeploy on JetPack 7 (Thor, and Orin from 7.2; SBSA): NVIDIA's mainstream Arm images, there is no l4t-jetpack any more.
#   docker build --platform linux/arm64 -t rdeploy:jp7 -f docker/jetpack7.Dockerfile .
#   docker run --rm --runtime nvidia -v "$PWD:/work" rdeploy:jp7 profile BUNDLE
FROM nvcr.io/nvidia/tensorrt:25.09-py3 AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docker/constraints.txt docker/constraints.txt
COPY rdeploy rdeploy
COPY profiles profiles
# The image's packages stay visible: TensorRT is its own, and pip must never replace it.
RUN python3 -m venv --system-site-packages /opt/rdeploy \
 && /opt/rdeploy/bin/pip install --no-cache-dir -c docker/constraints.txt . onnxruntime cuda-bindings

FROM nvcr.io/nvidia/tensorrt:25.09-py3
COPY --from=build /opt/rdeploy /opt/rdeploy
RUN useradd --create-home --uid 10001 rdeploy
USER 10001
ENV PATH=/opt/rdeploy/bin:$PATH RDEPLOY_CACHE=/home/rdeploy/.cache/rdeploy
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=120s CMD ["rdeploy", "doctor"]
ENTRYPOINT ["rdeploy"]
