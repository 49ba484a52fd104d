#!/usr/bin/env bash
# Installs what the tests need and runs them: bash launch/test.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
use_venv dev
exec python -m pytest "$@"
