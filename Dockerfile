# The image of server and client: the .pyz on a Python, nothing else. `docker compose up --build` makes and runs it.
# Another base with Python 3.9 or later, bash, awk and useradd: docker build --build-arg BASE_IMAGE=...
ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /src
# .dockerignore lets in what the build needs, and nothing else.
COPY . .
RUN python3 build_zipapp.py

FROM ${BASE_IMAGE}
# A user with a name, since scripts ask for it; the folders belong to it, and new volumes take over their owner and mode.
RUN useradd --uid 10001 --user-group --home-dir /data --no-create-home --shell /usr/sbin/nologin joborch \
 && install -d -o joborch -g joborch -m 0700 /data /token
COPY --from=build /src/joborch.pyz /joborch.pyz
# PORT is 5000 whatever runs, so that the health check knows where to ask; a client is given PORT=9000.
# A container that listens on loopback alone could not be reached; whom it serves, JOBORCH_TOKEN or JOBORCH_ALLOW_ANONYMOUS must say.
ENV DATA_PATH=/data JOBORCH_HOST=0.0.0.0 PORT=5000 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 5000 9000
# bash opens the connection itself: a tenth of what starting Python would cost, twice a minute for ever.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --start-interval=1s \
  CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/$PORT && printf 'GET /health HTTP/1.0\\r\\n\\r\\n' >&3 && read -r _ code _ <&3 && [[ $code == 200 ]]"]
ENTRYPOINT ["python3", "/joborch.pyz"]
CMD ["server"]
