#!/usr/bin/env bash
# Trains 137M parameters on one GPU, from random weights to a report: bash benchmarks/gpu/one_gpu.sh [OPTIONS]
#
# The stages of `launch/recipe.sh DATA OUT one_gpu`: distillation, contrastive, finetune, each with its evaluation. The
# same command goes on where a call before it stopped, in any number of calls: two of 290 seconds, or one of 580. At the
# end of the time a stage saves and stops, and the report shows what there is. Exit code: 0 all is done; 75 call it
# again; 1 a stage failed.
#
#   --prepared=FILE    made elsewhere by `python -m benchmarks.gpu.prepared pack` [./one_gpu.tar.xz]
#   --stages=A,B       these stages only
#   --seconds=N        ends within N seconds [290]
#   --work=DIR         data, runs and exported models; a call on a fresh machine, which lacks them, begins anew
#                      [$TMPDIR/one_gpu]
#   --out=DIR          log.txt, summary.txt, report.html, and one_gpu.tgz: report, curves, scores and metrics, no
#                      weights [./gpu-out, or $OUT]
#   --wheels=DIR       wheels of what this Python lacks, made by `python -m benchmarks.gpu.wheels make` [./wheels]
#   --tiny             the same at a size for a CPU
#
# Nothing is downloaded and nothing installed into this Python. PYTHON names the interpreter [python, or python3].
set -uo pipefail
usage() { sed -n '2,20s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
prepared=one_gpu.tar.xz seconds=290 work=${TMPDIR:-/tmp}/one_gpu out=${OUT:-gpu-out} wheels= tiny=
stages=distillation,contrastive,finetune
for option in "$@"; do
  case $option in
    --prepared=*) prepared=${option#*=} ;;
    --stages=*) stages=${option#*=} ;;
    --seconds=*) seconds=${option#*=} ;;
    --work=*) work=${option#*=} ;;
    --out=*) out=${option#*=} ;;
    --wheels=*) wheels=${option#*=} ;;
    --tiny) tiny=1 ;;
    --help | -h) usage; exit ;;
    *) echo "error: unknown option $option; see --help" >&2; exit 2 ;;
  esac
done
case $seconds in '' | *[!0-9]*) echo "error: --seconds=$seconds is no number of seconds" >&2; exit 2 ;; esac
for stage in ${stages//,/ }; do
  case $stage in
    distillation | contrastive | finetune) ;;
    *) echo "error: there is no stage $stage; see --help" >&2; exit 2 ;;
  esac
done
# Kept for the end: a step and a save of 1.6 GB, the report. A stage that starts later would hardly compile.
reserve=35 least=30
[ -z "$tiny" ] || reserve=15 least=0
mkdir -p "$out" "$work" || exit 2
out=$(cd "$out" && pwd) work=$(cd "$work" && pwd)
prepared=$(realpath -m "$prepared")
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-$(command -v python || command -v python3)}
exec > >(tee -a "$out/log.txt") 2>&1
tee=$! child=
leave() {
  exec >&- 2>&-
  wait "$tee" # it writes the last lines
}
trap leave EXIT
stop() { # a call that is cut leaves no process behind; what was saved stays
  echo "FAILED: SIG$1"
  [ -z "$child" ] || { kill -TERM -- "-$child" 2>/dev/null; wait "$child"; }
  exit "$2"
}
trap 'stop TERM 143' TERM
trap 'stop INT 130' INT

packages=$work/packages
[ -n "$wheels" ] || [ ! -d wheels ] || wheels=wheels
[ -z "$wheels" ] || [ -d "$packages" ] || "$python" -m benchmarks.gpu.wheels install "$wheels" "$packages" || exit 2
export PYTHONPATH="$PWD:$packages${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m benchmarks.gpu.prepared unpack "$prepared" "$work/prepared" || exit 2
# launch/recipe.sh takes the `python` of an environment that has the package. A link would lose what is installed there.
mkdir -p "$work/bin"
printf '#!/bin/sh\nexec "%s" "$@"\n' "$(command -v "$python")" >"$work/bin/python"
chmod +x "$work/bin/python"
export PATH="$work/bin:$PATH" VIRTUAL_ENV=${VIRTUAL_ENV:-$work} TEACHER=$work/prepared/teacher
if [ -n "$tiny" ]; then
  export XLA_FLAGS=${XLA_FLAGS:---xla_backend_optimization_level=0} # compiles faster
  export FLAGS="--config.model.hidden_size=64 --config.model.num_layers=1 --config.model.num_heads=2
    --config.model.intermediate_size=128 --config.model.dtype=float32 --config.batch_size=32 --config.steps=12
    --config.data.document_length=32 --config.data.chunk_tokens=512 --config.checkpoint.every=4 ${FLAGS:-}"
  FLAGS=${FLAGS//$'\n'/ }
fi

recipe() { # STAGE SECONDS: 0, or 75 if the time ended
  # timeout signals the process group: the command that runs, which saves, and the script, which waits for it.
  STAGES=$1 timeout --kill-after=$((reserve - 10)) "$2" \
    bash launch/recipe.sh "$work/prepared/data" "$work/prepared/out" one_gpu &
  child=$!
  wait "$child"
  local status=$?
  child=
  [ $status != 124 ] && [ $status != 137 ] || status=75
  return $status
}
status=0
for stage in ${stages//,/ }; do
  [ ! -f "$work/done.$stage" ] || continue
  began=$SECONDS left=$((seconds - reserve - SECONDS))
  if [ $left -lt $((least + 1)) ]; then status=75; break; fi
  recipe $stage $left
  status=$?
  case $status in
    0) verdict=done; touch "$work/done.$stage" ;;
    75) verdict="stopped for the time; the same command goes on" ;;
    *) verdict="FAILED: exit code $status"; status=1 ;;
  esac
  printf '%-14s %5d s  %s\n' $stage $((SECONDS - began)) "$verdict" | tee -a "$out/summary.txt"
  [ $status = 0 ] || break
done
recipe report 60 || echo "FAILED: the report" | tee -a "$out/summary.txt"
(
  cd "$work/prepared/out" || exit
  cp report.html "$out/" 2>/dev/null
  shopt -s nullglob
  tar -czf "$out/one_gpu.tgz" report.* ./*.png eval/*.json runs/*/{config,goodput}.json runs/*/*.jsonl
)
printf '%-14s %5d s  results are in %s\n' call $SECONDS "$out" | tee -a "$out/summary.txt"
exit $status
