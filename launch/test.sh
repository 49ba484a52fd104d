#!/usr/bin/env bash
# Installs what the tests need and runs them: bash launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
use_venv dev
# Two at a time: much of the time goes to compiling, on one core. A file stays with one of the two, for its fixtures.
exec python -m pytest -n 2 --dist=loadfile --durations=25 "$@"
