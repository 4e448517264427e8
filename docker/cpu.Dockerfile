# rdeploy with the CPU runtimes, the model zoos and TensorRT-RTX's ahead-of-time builder: builds everywhere, needs no GPU.
#   docker build -t rdeploy:cpu -f docker/cpu.Dockerfile .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" rdeploy:cpu build timm:resnet50 --scale 0.75 --int8 --calib photos/
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docker/constraints.txt docker/constraints.txt
COPY rdeploy rdeploy
COPY profiles profiles
RUN python -m venv /opt/rdeploy && /opt/rdeploy/bin/pip install --no-cache-dir -c docker/constraints.txt '.[cpu,zoo,rtx]'

FROM python:3.12-slim-bookworm
COPY --from=build /opt/rdeploy /opt/rdeploy
# Any user may write here: `docker run --user` brings the one whose folder is mounted.
RUN useradd --create-home --uid 10001 rdeploy \
 && mkdir -p /home/rdeploy/.cache/rdeploy && chmod 1777 /home/rdeploy /home/rdeploy/.cache /home/rdeploy/.cache/rdeploy
USER 10001
ENV PATH=/opt/rdeploy/bin:$PATH HOME=/home/rdeploy USER=rdeploy RDEPLOY_CACHE=/home/rdeploy/.cache/rdeploy
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=120s CMD ["rdeploy", "doctor"]
ENTRYPOINT ["rdeploy"]
