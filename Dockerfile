# rdeploy with the CPU runtimes, the model zoos and TensorRT-RTX's ahead-of-time builder: builds everywhere, needs no GPU.
#   docker build -t rdeploy .
#   docker run --rm -v "$PWD:/work" rdeploy build timm:resnet50 --scale 0.75 --int8 --calib photos/
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rdeploy rdeploy
COPY profiles profiles
RUN python -m venv /opt/rdeploy && /opt/rdeploy/bin/pip install --no-cache-dir '.[cpu,zoo,rtx]'

FROM python:3.12-slim
COPY --from=build /opt/rdeploy /opt/rdeploy
RUN useradd --create-home --uid 1000 rdeploy
USER rdeploy
ENV PATH=/opt/rdeploy/bin:$PATH RDEPLOY_CACHE=/home/rdeploy/.cache/rdeploy
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=60s CMD ["rdeploy", "doctor"]
ENTRYPOINT ["rdeploy"]
