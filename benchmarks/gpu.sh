#!/usr/bin/env bash
# What one GPU makes of mmref, in eight minutes: benchmarks/gpu.sh --out DIR. `--help` and benchmarks/gpu.py say more.
# PYTHON names the interpreter (default: that of .venv, else python3). It needs torch, transformers and the base of mmref. On a
# machine without a network, packages that it lacks are installed from a folder wheels/ beside README.md, where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if compgen -G "wheels/*.whl" > /dev/null; then
  "$python" -m pip install --quiet --no-index --find-links wheels --no-deps --upgrade --target build/wheels wheels/*.whl
  export PYTHONPATH="$PWD/build/wheels:$PYTHONPATH"
fi
exec "$python" benchmarks/gpu.py "$@"
