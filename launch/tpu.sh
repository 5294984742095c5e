#!/usr/bin/env bash
# On every worker of a TPU slice. Flags go to slmjax.main.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
make setup PYTHON="$PYTHON" VENV=.venv
.venv/bin/pip install -q "jax[tpu]==$(.venv/bin/python -c 'import jax; print(jax.__version__)')"
export JAX_PLATFORMS=tpu
exec .venv/bin/python -m slmjax.main --distributed "$@"
