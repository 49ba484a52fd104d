#!/usr/bin/env bash
# What to run in the first 15 minutes on a GPU machine: bash benchmarks/gpu/quarter_hour.sh [OPTIONS]
#
#   tests              tests/gpu: attention, determinism                                         at most 300 s
#   rows               benchmarks.gpu: the steps of mlm, contrastive and finetune, and norms     at most 300 s
#   peers              benchmarks.gpu: torch_train and encode, nomic_jax and torch               at most 240 s
#   deterministic      benchmarks.gpu: what config.deterministic costs                           at most 240 s
#   train_mlm, train_contrastive, train_finetune
#                      launch.train of each stage of :one_gpu on made-up data: the loss falls,
#                      it resumes after a kill, and exports                                      at most 180 s each
#
#   --steps=A,B        these steps only, so that a call fits a shorter time
#   --out=DIR          log.txt, summary.txt, gpu.json and gpu.md, written as it goes [./gpu-out, or $OUT]
#   --wheels=DIR       wheels of what this Python lacks, made by `python -m benchmarks.gpu.wheels make` [./wheels]
#   --commit=NAME      the commit, where the checkout has no .git
#   --tiny             the same at a size for a CPU; CI runs it
#
# Nothing is downloaded and nothing installed into this Python: missing packages go to a folder that is removed at the end,
# with the checkpoints of the runs. A step that fails or is stopped does not stop the others; the exit code is then 1.
# PYTHON names the interpreter [python, or python3].
set -uo pipefail
usage() { sed -n '2,22s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
steps=tests,rows,peers,deterministic,train_mlm,train_contrastive,train_finetune
out=${OUT:-gpu-out} wheels= commit=() tiny=()
for option in "$@"; do
  case $option in
    --steps=*) steps=${option#*=} ;;
    --out=*) out=${option#*=} ;;
    --wheels=*) wheels=${option#*=} ;;
    --commit=*) commit=("$option") ;;
    --tiny) tiny=(--tiny) ;;
    --help | -h) usage; exit ;;
    *) echo "error: unknown option $option; see --help" >&2; exit 2 ;;
  esac
done
for step in ${steps//,/ }; do
  case $step in
    tests | rows | peers | deterministic | train_mlm | train_contrastive | train_finetune) ;;
    *) echo "error: there is no step $step; see --help" >&2; exit 2 ;;
  esac
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-$(command -v python || command -v python3)}
work=$(mktemp -d)
exec > >(tee -a "$out/log.txt") 2>&1
tee=$! child=
leave() {
  rm -rf "$work"
  exec >&- 2>&-
  wait "$tee" # it writes the last lines
}
trap leave EXIT
# A call that is cut leaves no process behind.
trap 'echo "FAILED: SIGTERM"; [ -z "$child" ] || { kill "$child"; wait "$child"; }; exit 143' TERM
trap 'echo "FAILED: SIGINT"; [ -z "$child" ] || { kill "$child"; wait "$child"; }; exit 130' INT

[ -n "$wheels" ] || [ ! -d wheels ] || wheels=wheels
[ -z "$wheels" ] || "$python" -m benchmarks.gpu.wheels install "$wheels" "$work/packages" || exit 2
export PYTHONPATH="$PWD:$work/packages${PYTHONPATH:+:$PYTHONPATH}"
"$python" - <<'PYTHON' || exit 2
import importlib.util
import sys

names = "jax flax optax orbax numpy tokenizers transformers safetensors yaml absl tqdm grain ml_collections tensorboardX pytest"
missing = [name for name in names.split() if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(
        f"error: {sys.executable} lacks {', '.join(missing)}. Where a package index can be reached, run "
        "`python -m benchmarks.gpu.wheels make`, and give the folder with --wheels"
    )
PYTHON
# The second process of a run finds the programs of the first.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$work/jax_cache}
[ ${#tiny[@]} = 0 ] || export XLA_FLAGS=${XLA_FLAGS:---xla_backend_optimization_level=0} # compiles faster

failed=0 began=$SECONDS
run() { # STEP LIMIT_SECONDS COMMAND...
  case ",$steps," in *",$1,"*) ;; *) return ;; esac
  local started=$SECONDS status verdict
  echo "== $1"
  timeout --kill-after=20 "$2" "${@:3}" &
  child=$!
  wait "$child"
  status=$? child=
  case $status in
    0) verdict=passed ;;
    124) verdict="FAILED: stopped after $2 s" failed=1 ;;
    137) verdict="FAILED: killed (limit: $2 s)" failed=1 ;;
    *) verdict="FAILED: exit code $status" failed=1 ;;
  esac
  printf '%-18s %5d s  %s\n' "$1" $((SECONDS - started)) "$verdict" | tee -a "$out/summary.txt"
}
benchmark() { # STEP LIMIT_SECONDS PARTS
  run "$1" "$2" "$python" -m benchmarks.gpu --parts="$3" --seconds=$(($2 - 10)) --output="$out/gpu" \
    "${commit[@]}" "${tiny[@]}"
}
train() { # STAGE
  run "train_$1" 180 "$python" -m benchmarks.gpu.short_run --stage="$1" --workdir="$work/train" "${tiny[@]}"
}
echo "== $(date -u +%FT%TZ) --steps=$steps ${tiny[*]}" | tee -a "$out/summary.txt"
run tests 300 "$python" -m pytest tests/gpu -rs --durations=5
benchmark rows 300 mlm,contrastive,finetune,norms
benchmark peers 240 torch_train,encode
benchmark deterministic 240 deterministic
train mlm
train contrastive
train finetune
echo "== summary: $((SECONDS - began)) s; results are in $out"
cat "$out/summary.txt"
exit $failed
