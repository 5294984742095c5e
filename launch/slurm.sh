#!/usr/bin/env bash
# In every SLURM task. Flags go to slmjax.main. Once before: `make setup VENV=.venv` and
# `.venv/bin/pip install "jax[cuda13]==VERSION"` with the version of jax that is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
export JAX_PLATFORMS=cuda
exec .venv/bin/python -m slmjax.main --distributed "$@"
