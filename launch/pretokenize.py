"""Tokenises the data of a stage before training, into memory-mapped files that training runs reuse.

    nomic-jax pretokenize --stage=contrastive --mixture=pairs.yaml --tokenizer=runs/mlm --cache_dir=token_cache

Give the training run the same mixture, tokenizer, cache and on_bad_row (config.data.mixture, .tokenizer ...): it uses
the cached tokens and tokenises only missing sources. The output does not depend on --workers. Work is done in pieces of
about 32 MB of text: after an interruption, the same command continues with the unfinished pieces.
"""

import os
import sys
import time

from absl import flags

from nomic_jax.data.mixture import ROW_KINDS, read_mixture
from nomic_jax.data.tokens.pretokenize import loader, pretokenize
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.jobs.shards import Incomplete, ShardEnded

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    del argv
    try:
        _pretokenize()
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command to continue")


def _pretokenize() -> None:
    sources = read_mixture(FLAGS.mixture, ROW_KINDS[FLAGS.stage], FLAGS.columns, FLAGS.loss, FLAGS.scores)
    tokenizer = Tokenizer.from_pretrained(FLAGS.tokenizer)
    began, all_tokens, incomplete = time.monotonic(), 0, []
    with engine.on_cpus(loader(tokenizer), os.cpu_count() or 1) as (chosen, pool):
        for source in sources:
            try:
                store = pretokenize(
                    source,
                    tokenizer,
                    FLAGS.cache_dir,
                    on_bad_row=FLAGS.on_bad_row,
                    pool=pool,
                    engine=chosen,
                    is_shard=engine.is_shard(),
                )
            except ShardEnded as end:
                print(f"{source.name}: {end}", flush=True)
                continue
            except Incomplete as error:
                incomplete.append(f"{source.name}: {error}")
                continue
            tokens = sum(store.manifest["tokens"].values())
            all_tokens += tokens
            rejected = f", {store.manifest['rejected']:,} rejected" if store.manifest["rejected"] else ""
            print(f"{source.name}: {store.rows:,} rows{rejected}, {tokens:,} tokens in {store.directory}", flush=True)
    if incomplete:
        raise Incomplete("; ".join(incomplete))
    if not engine.is_shard():
        print(f"{len(sources)} source(s), {all_tokens:,} tokens, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    # Worker processes import this module too; they must define no flags and not import jax.
    from . import engine
    from .errors import run

    flags.adopt_module_key_flags(engine)

    flags.DEFINE_string(
        "mixture",
        None,
        "A mixture .yaml, files (path, folder, glob, brace range or URL), hf:NAME or tfds:NAME.",
        required=True,
    )
    flags.DEFINE_list(
        "columns", [], "Columns of files that --mixture names directly. [query,document, and negatives; or text]"
    )
    flags.DEFINE_string("loss", "", "Loss of files that --mixture names directly, as config.data.loss of the run.")
    flags.DEFINE_list("scores", [], "Columns of a teacher's scores, as config.data.scores of the run.")
    flags.DEFINE_string("tokenizer", None, "A directory with tokenizer.json, or a hub name.", required=True)
    flags.DEFINE_enum(
        "stage",
        None,
        list(ROW_KINDS),
        "Stage of the run; sets the kind of rows: text, pairs or triplets.",
        required=True,
    )
    flags.DEFINE_string("cache_dir", "token_cache", "Folder of the tokens, as config.data.cache_dir of the run.")
    flags.DEFINE_enum(
        "on_bad_row", "raise", ["raise", "skip"], "raise: stop at an unusable row. skip: write it to rejected.jsonl."
    )
    run(main)
