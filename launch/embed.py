"""Embeds a column of files of any size, in their order, into one .npy or .parquet file.

    python -m launch.embed --model=DIR --input='shards/*.jsonl.gz' --output=vectors.npy --prompt_name=search_document
    python -m launch.embed --model=DIR --input=corpus/ --output=vectors.parquet --keep_columns=id,title

vectors.npy is float32 [rows, dim]. vectors.parquet has `row` (the row's place in the input, over all files, from 0),
the kept columns and `embedding` (lists of dim float32). Until the output is complete, the work is in .NAME.parts beside
it: killed at any moment, the same command goes on after the last finished shard.
"""

from absl import flags

from launch.errors import run
from nomic_jax.inference.embed_files import embed_files

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    del argv
    done = embed_files(
        FLAGS.model,
        FLAGS.input,
        FLAGS.output,
        text_column=FLAGS.text_column,
        prompt_name=FLAGS.prompt_name,
        prompt=FLAGS.prompt,
        batch_size=FLAGS.batch_size,
        max_length=FLAGS.max_length,
        truncate_dim=FLAGS.truncate_dim,
        dtype=FLAGS.dtype,
        shard_rows=FLAGS.shard_rows,
        keep_columns=FLAGS.keep_columns,
        normalize=FLAGS.normalize,
        on_bad_row=FLAGS.on_bad_row,
        overwrite=FLAGS.overwrite,
    )
    now, seconds = done["rows"] - done["rows_before"], done["seconds"]
    before = f" after {done['rows_before']:,} embedded before" if done["rows_before"] else ""
    rate = f", {now / seconds:,.1f} texts/s" if now else ""
    rejected = f"; rejected {done['rejected']:,} rows, see {FLAGS.output}.rejected.jsonl" if done["rejected"] else ""
    print(
        f"embedded {now:,} texts{before} in {seconds:.1f} s{rate}: "
        f"{FLAGS.output} has {done['rows']:,} rows of dim {done['dim']}{rejected}"
    )


if __name__ == "__main__":
    # Flags belong to the command, not to the module: imported together, two commands may use one name.
    flags.DEFINE_string("model", None, "A checkpoint directory, or a name on the Hugging Face hub.", required=True)
    flags.DEFINE_string(
        "input", None, "Texts: a jsonl(.gz) or parquet file, a folder, a glob, a brace range or a URL.", required=True
    )
    flags.DEFINE_string("output", None, "The file to write, .npy or .parquet.", required=True)
    flags.DEFINE_string("text_column", "text", "Column of the input with the text; it may be empty, but not null.")
    flags.DEFINE_string("prompt_name", None, "Name of the model's prompt for these texts, such as search_document.")
    flags.DEFINE_string("prompt", None, 'Text in front of every text, instead of a name; "" for none.')
    flags.DEFINE_integer("batch_size", 64, "Texts computed at once.", lower_bound=1)
    flags.DEFINE_integer("max_length", None, "Tokens kept of a text. [what the checkpoint says]", lower_bound=2)
    flags.DEFINE_integer("truncate_dim", None, "Dimensions kept of a vector. [what the checkpoint says]", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Precision of the computation.")
    flags.DEFINE_integer(
        "shard_rows", 50_000, "Rows embedded between two points of restart; so many are in memory.", lower_bound=1
    )
    flags.DEFINE_list("keep_columns", [], "Columns of the input to copy into a .parquet output.")
    flags.DEFINE_bool("normalize", True, "Scale vectors to length 1.")
    flags.DEFINE_enum(
        "on_bad_row", "raise", ["raise", "skip"], "Stop at a row without a text, or put it into OUTPUT.rejected.jsonl."
    )
    flags.DEFINE_bool("overwrite", False, "Replace the output, once the new one is complete.")
    run(main)
