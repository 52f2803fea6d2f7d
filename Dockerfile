# The image of server and client: joborch.pyz and Python, nothing else. `docker compose up --build` builds and runs it.
# Another base with Python 3.9 or later, bash, awk and useradd: docker build --build-arg BASE_IMAGE=...
ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /src
# .dockerignore admits only what the build needs.
COPY . .
RUN python3 build_zipapp.py

FROM ${BASE_IMAGE}
# A user with a name, because scripts ask for it; the folders belong to it, and new volumes inherit their owner and mode.
RUN useradd --uid 10001 --user-group --home-dir /data --no-create-home --shell /usr/sbin/nologin joborch \
 && install -d -o joborch -g joborch -m 0700 /data /token
COPY --from=build /src/joborch.pyz /joborch.pyz
# PORT is 5000 by default, and the health check uses it; a client gets PORT=9000.
# A container that listens only on loopback could not be reached; JOBORCH_TOKEN or JOBORCH_ALLOW_ANONYMOUS must say whom it serves.
ENV DATA_PATH=/data JOBORCH_HOST=0.0.0.0 PORT=5000 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 5000 9000
# bash opens the connection: starting Python twice a minute would cost ten times as much.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --start-interval=1s \
  CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/$PORT && printf 'GET /health HTTP/1.0\\r\\n\\r\\n' >&3 && read -r _ code _ <&3 && [[ $code == 200 ]]"]
ENTRYPOINT ["python3", "/joborch.pyz"]
CMD ["server"]
