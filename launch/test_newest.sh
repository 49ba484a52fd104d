#!/usr/bin/env bash
# The newest Python and jax that setup.py allows: model, losses, optimizer, and a debug run of each stage.
#
#   bash launch/test_newest.sh [PYTEST ARGUMENTS]
#
# launch/test.sh runs everything, with the oldest Python and the jax of requirements-ci.lock. This script makes .venv-py312
# with what the package itself needs and the versions of requirements-ci-py312.lock: no torch, so tests that compare with
# torch skip themselves. Without a Python 3.12 it says so and does nothing.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
NOMIC_JAX_PYTHON=$(find_python 3.12) || { echo "skipped: there is no python3.12 on the PATH or in pyenv"; exit 0; }
export NOMIC_JAX_PYTHON NOMIC_JAX_VENV=.venv-py312 NOMIC_JAX_LOCK=requirements-ci-py312.lock
use_venv test
python -c 'import sys, jax; print(f"Python {sys.version.split()[0]}, jax {jax.__version__}")'
# launch/test.sh holds the limit of 20 seconds a test.
python -m pytest -n 2 --dist=loadfile --slow-limit=0 tests/model tests/train/losses \
  tests/train/test_optim.py tests/launch/test_commands.py "$@"
