# rdeploy with TensorRT for x86 hosts with NVIDIA GPUs (A100, H100, H200, L4, T4): builds, measures and runs on the GPU.
#   docker build -t rdeploy .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" rdeploy \
#     build timm:resnet50 --scale 0.75 --int8 --calib photos/ --target auto
# Without a GPU on the host: docker/cpu.Dockerfile. The host's driver must know CUDA 13 (580 or later).
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docker/constraints.txt docker/constraints.txt
COPY rdeploy rdeploy
COPY profiles profiles
RUN python -m venv /opt/rdeploy && /opt/rdeploy/bin/pip install --no-cache-dir -c docker/constraints.txt '.[gpu,zoo,rtx]'
# The libraries come from NVIDIA's own index, to which this package's wheels point.
RUN /opt/rdeploy/bin/pip install --no-cache-dir tensorrt-cu13==11.4.0.106

FROM python:3.12-slim-bookworm
COPY --from=build /opt/rdeploy /opt/rdeploy
# Any user may write here: `docker run --user` brings the one whose folder is mounted.
RUN useradd --create-home --uid 10001 rdeploy \
 && mkdir -p /home/rdeploy/.cache/rdeploy && chmod 1777 /home/rdeploy /home/rdeploy/.cache /home/rdeploy/.cache/rdeploy
USER 10001
ENV PATH=/opt/rdeploy/bin:$PATH HOME=/home/rdeploy USER=rdeploy RDEPLOY_CACHE=/home/rdeploy/.cache/rdeploy \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=120s CMD ["rdeploy", "doctor"]
ENTRYPOINT ["rdeploy"]
