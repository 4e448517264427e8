# rdeploy on JetPack 5 (Xavier, Orin; L4T r35, TensorRT 8.5). Its TensorRT has Python bindings for 3.8 only and rdeploy needs
# 3.10, so engines are built by the bundle's build-engine.sh (trtexec is in this image) and read by `rdeploy profile`.
#   docker build -t rdeploy:jp5 -f docker/jetpack5.Dockerfile .
#   docker run --rm --runtime nvidia --group-add video --user "$(id -u):$(id -g)" -v "$PWD:/work" \
#     --entrypoint sh rdeploy:jp5 BUNDLE/build-engine.sh
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" rdeploy:jp5 profile BUNDLE
# Debian 11 and Ubuntu 20.04, which JetPack 5 is, have the same C library: this Python runs there.
FROM python:3.10-slim-bullseye AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docker/constraints-py310.txt docker/constraints-py310.txt
COPY rdeploy rdeploy
COPY profiles profiles
RUN pip install --no-cache-dir -c docker/constraints-py310.txt . onnxruntime

FROM nvcr.io/nvidia/l4t-tensorrt:r8.5.2.2-devel
COPY --from=build /usr/local/bin/python3.10 /opt/python/bin/python3.10
COPY --from=build /usr/local/lib/libpython3.10.so.1.0 /opt/python/lib/libpython3.10.so.1.0
COPY --from=build /usr/local/lib/python3.10 /opt/python/lib/python3.10
# Any user may write here: `docker run --user` brings the one whose folder is mounted.
RUN useradd --create-home --uid 10001 rdeploy \
 && mkdir -p /home/rdeploy/.cache/rdeploy && chmod 1777 /home/rdeploy /home/rdeploy/.cache /home/rdeploy/.cache/rdeploy \
 && printf '#!/bin/sh\nexec /opt/python/bin/python3.10 -m rdeploy "$@"\n' > /usr/local/bin/rdeploy \
 && chmod 755 /usr/local/bin/rdeploy
USER 10001
ENV PYTHONHOME=/opt/python LD_LIBRARY_PATH=/opt/python/lib:$LD_LIBRARY_PATH PATH=/usr/src/tensorrt/bin:$PATH \
    HOME=/home/rdeploy USER=rdeploy RDEPLOY_CACHE=/home/rdeploy/.cache/rdeploy
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=120s CMD ["rdeploy", "doctor"]
ENTRYPOINT ["rdeploy"]
