# syntax=docker/dockerfile:1
# The container image, from the same script as `make image`, which needs no engine:
#
#   docker buildx build --platform linux/amd64,linux/arm64 \
#     --build-arg VERSION="$(scripts/version)" --build-arg REVISION="$(git rev-parse HEAD)" \
#     --tag REGISTRY/headcni:TAG --push .
#
# The one base image is pinned by its tag and not by a digest, which stays out of the result: it only compiles. What ends
# up in the image is pinned by go.sum, by the go.mod and go.sum of each tool, and by checksum in scripts/image-packages.

# Runs on the builder's own architecture and cross-builds for the target's.
FROM --platform=$BUILDPLATFORM golang:1.26.8-bookworm AS build
ARG TARGETARCH
ARG VERSION=dev
WORKDIR /src
COPY . .
ENV GOTOOLCHAIN=local HEADCNI_CACHE=/cache/headcni GOCACHE=/cache/go GOMODCACHE=/cache/mod
# One builder at a time: apt's lists and archives lie in the cache.
RUN --mount=type=cache,target=/cache,sharing=locked scripts/image-rootfs "$TARGETARCH" /rootfs

FROM scratch
ARG VERSION=dev
ARG REVISION=
COPY --from=build /rootfs/system/ /
COPY --from=build /rootfs/programs/ /
ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin
LABEL org.opencontainers.image.title="HeadCNI"
LABEL org.opencontainers.image.description="Pod networking for Kubernetes over Headscale and Tailscale"
LABEL org.opencontainers.image.source="https://github.com/headcni/headcni"
LABEL org.opencontainers.image.licenses="MIT"
LABEL org.opencontainers.image.version="$VERSION"
LABEL org.opencontainers.image.revision="$REVISION"
ENTRYPOINT ["/usr/local/bin/headcni-daemon"]
CMD ["run"]
