#!/usr/bin/env bash
# Installs what the tests need and runs them: bash launch/test.sh [--all] [PYTEST ARGUMENTS]
#
# The comparisons with torch need a build of it. Where pip finds none without CUDA, they are left out and counted; with
# NOMIC_JAX_TORCH=1 any build is installed.
#
# --all runs the exhaustive tests too, the fuzz tests with 20 times as many new examples, all with XLA's own settings, and
# the whole fault suite: more than an hour on 2 cores. --slow-limit=SECONDS raises the 20 seconds that a test may take;
# see tests/effort.py.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
use_venv dev
everything=
case " $* " in *" --all "*)
  everything=1
  export NOMIC_JAX_FUZZ=${NOMIC_JAX_FUZZ:-20} XLA_FLAGS=${XLA_FLAGS:-"--xla_backend_optimization_level=3"} ;;
esac
# Two workers: much of the time goes to compiling, on one core. A file stays with one worker, for its fixtures.
python -m pytest -n 2 --dist=loadfile --durations=25 "$@"
if [ -n "$everything" ]; then
  echo "== faults"
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
  env -u XLA_FLAGS python -m tests.faults --output="$out/faults.json" >"$out/log" 2>&1 || { tail -n 40 "$out/log"; exit 1; }
  tail -n 1 "$out/log"
fi
