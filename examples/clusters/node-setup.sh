#!/bin/sh
# Installs this checkout into a node's Python: `cluster.yaml`, its variants here and the Dockerfile run it.
#
# PYTHON       the node's Python 3.11; default: python
# TORCH_INDEX  index with PyTorch's CPU wheels; saves 6 GB of CUDA libraries that raysq never touches
# PIP_FLAGS    further flags for pip, such as "--no-index --find-links /mnt/wheels" where there is no internet
set -eu
cd "$(dirname "$0")/../.."
pip="${PYTHON:-python} -m pip install --quiet -c constraints.txt ${PIP_FLAGS:-}"
if [ -n "${TORCH_INDEX:-}" ]; then
  $pip --index-url "$TORCH_INDEX" "torch==2.8.*"
fi
$pip ".[ipex,hyperopt,cluster]"
