#!/usr/bin/env bash
# Installs the project, pinned by constraints.txt, into a virtual environment: what every node and the container image run.
#
#   [PYTHON=python3.12] [TORCH_INDEX=URL] deploy/install.sh FOLDER
#
# Without TORCH_INDEX, torch is the package index's build, which on Linux brings CUDA; an index of CPU builds saves some gigabytes.
set -euo pipefail
venv=${1:?usage: deploy/install.sh FOLDER}
python=${PYTHON:-python3}
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "$python is older than 3.11: PYTHON=python3.11 deploy/install.sh $venv" >&2
  exit 2
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$project/constraints.txt")
if [ -n "${TORCH_INDEX:-}" ]; then
  "${install[@]}" --index-url "$TORCH_INDEX" torch
fi
sources=$(mktemp -d) # a build leaves folders beside what it builds, and reads old ones
trap 'rm -rf "$sources"' EXIT
cp -r "$project"/{pyproject.toml,README.md,LICENSE,platform} "$sources"
rm -rf "$sources"/platform/*.egg-info
"${install[@]}" boto3 "$sources[examples]" # boto3 is the launcher's way to AWS
