#!/usr/bin/env bash
# From nothing to a Hugging Face embedder and a report, on a CPU: bash launch/quickstart.sh [--tiny] [OUT_DIR]
#
# Needs python >= 3.11 and pip. The commands are those of a full run; only the configuration is small. If it is stopped,
# the same command continues where it was. OUT_DIR is "quickstart" by default.
#
# --tiny: the same commands with less data and fewer steps, a few minutes on 2 cores. CI runs it.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit ;; esac
tiny=
if [ "${1:-}" = --tiny ]; then tiny=1; shift; fi
case "${1:-}" in -*) echo "error: unknown option $1; see --help" >&2; exit 2 ;; esac
out=${1:-quickstart}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
use_venv quickstart
export JAX_COMPILATION_CACHE_DIR=$out/jax_cache

collecting=(--code_pairs=8000) min_gain=0.1
if [ -n "$tiny" ]; then
  collecting=(--code_pairs=1000 --held_out=200) min_gain=0.02
  # Many small batches: few steps of 128 pairs gain too little to tell training from none.
  export MLM_FLAGS=--config.steps=40 CONTRASTIVE_FLAGS=--config.batch_size=32
fi
export STEPS_BEFORE=1 STEPS_AFTER=1
echo "== step 1 of 10: collecting real text and pairs"
python -m launch.collect --output="$out/data" "${collecting[@]}"
if [ -n "$tiny" ]; then
  # launch.collect takes all diagnoses and 6 MB of text.
  for file_rows in pairs/icd10:1200 labelled/icd10:300 mlm/text:2000; do
    file=$out/data/${file_rows%:*}.jsonl rows=${file_rows#*:}
    [ "$(wc -l <"$file")" -le "$rows" ] && continue
    head -n "$rows" "$file" >"$file.part"
    mv "$file.part" "$file"
  done
fi

bash launch/recipe.sh "$out/data" "$out" quickstart

echo; echo "== step 10 of 10: the exported embedder, read back"
python -m launch.search --model="$out/models/finetune" --corpus="$out/data/held_out/icd10/corpus.jsonl" --column=text \
  --query_prompt=classification --document_prompt=classification \
  --query="burn on the hand" --query="inflammation of the middle ear" --query="alcohol dependence"
python -m launch.search --model="$out/models/finetune" --corpus="$out/data/held_out/code/corpus.jsonl" --column=text \
  --query="convert an array to a list" --query="read a file and return its content"
python -m launch.report "$out" --min_gain="$min_gain"
echo
echo "what to look at ($((SECONDS / 60)) min $((SECONDS % 60)) s in all):"
echo "  $out/report.html      scores after every stage, beside BM25 and the teacher (report.md: the same as text)"
echo "  $out/models/finetune  the embedder: SentenceTransformer(\"$out/models/finetune\")"
