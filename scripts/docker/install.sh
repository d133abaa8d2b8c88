#!/usr/bin/env bash
# Installs the project beside the torch that is there already, as in the image (Dockerfile), and checks what came of it:
#   KERNELS=sm_70 PYTHON=python3 scripts/docker/install.sh
# Whatever is compiled against that torch stays as it is; the rest comes at the versions of requirements.lock.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}

if [[ ! -e /usr/include/jpeglib.h && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then # for the native core
  apt-get update -q
  apt-get install -q -y --no-install-recommends gcc libc6-dev libjpeg-dev
  rm -rf /var/lib/apt/lists/*
fi

lists=$(mktemp -d)
trap 'rm -rf "$lists"' EXIT
"$PYTHON" scripts/docker/requirements.py "$lists"
unset PIP_CONSTRAINT # the base image's own would forbid most of the lock
pip=("$PYTHON" -m pip --disable-pip-version-check --no-cache-dir install -q --root-user-action=ignore)
"${pip[@]}" --constraint "$lists/pins.txt" -r "$lists/needed.txt" "setuptools>=77"
"${pip[@]}" --no-deps --no-build-isolation -e .
"$PYTHON" scripts/docker/check.py
