#!/usr/bin/env bash
# The whole gate, the same on a laptop and in CI: style, types, tests. CPU only; GPU checks skip with a reason.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
ruff check .
ruff format --check .
pyright
python -m pytest -q "$@"
