#!/usr/bin/env bash
# From nothing to a Hugging Face embedder and a report, on a CPU: bash launch/quickstart.sh [OUT_DIR]
#
# Needs python >= 3.11 and pip. Every command is the one that a full run uses; only the configuration is small. Stopped at
# any moment, the same command goes on where it was.
set -euo pipefail
out=${1:-quickstart}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
use_venv quickstart
export JAX_COMPILATION_CACHE_DIR=$out/jax_cache

echo "== collecting real text and pairs"
python -m launch.collect --output="$out/data" --code_pairs=8000

bash launch/recipe.sh "$out/data" "$out" quickstart

echo; echo "== the exported embedder, read back"
python -m launch.search --model="$out/models/finetune" --corpus="$out/data/held_out/icd10/corpus.jsonl" --column=text \
  --query_prompt=classification --document_prompt=classification \
  --query="burn on the hand" --query="inflammation of the middle ear" --query="alcohol dependence"
python -m launch.search --model="$out/models/finetune" --corpus="$out/data/held_out/code/corpus.jsonl" --column=text \
  --query="convert an array to a list" --query="read a file and return its content"
python -m launch.report "$out" --min_gain=0.1
