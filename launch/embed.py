"""Embeds a text column of input files of any size into a .npy, a .parquet or a folder of parts, in input order.

    nomic-jax embed --model=DIR --input='shards/*.jsonl.gz' --output=vectors.npy --prompt_name=search_document
    nomic-jax embed --model=DIR --input=corpus/ --output=vectors.parquet --keep_columns=id,title
    nomic-jax embed --model=DIR --input='notes/**/*.md' --output=notes.parquet --prompt_name=document
    nomic-jax embed --model=DIR --input='s3://bucket/texts/*.parquet' --output=s3://bucket/vectors/ --output_dtype=int8

vectors.npy is float32 [rows, dim]. vectors.parquet has `row` (the row's number over all input files, from 0), the kept
columns and `embedding` (lists of dim float32, or of --output_dtype). A folder has part-00000.parquet and so on, and
manifest.json, which names them once they are complete. Every row is read and checked before the first is embedded.
After an interruption, the same command makes the parts that are missing; those of a file are in .NAME.parts beside it.

Text files (.txt, .md, .rst) are cut into passages, whose path, line and text a .parquet keeps, so that
`nomic-jax search --vectors=notes.parquet` can show them. --update embeds only what is new: new texts of a .parquet, new
files of a folder.
"""

from absl import flags

from nomic_jax.arguments import STEP
from nomic_jax.inference.compilation_cache import use_compilation_cache
from nomic_jax.inference.embed_files import embed_files
from nomic_jax.inference.precision import DTYPES
from nomic_jax.inference.vectors.stored_types import OUTPUT_DTYPES
from nomic_jax.run.pretrained import at_step

from . import engine
from .errors import run

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(engine)  # so that --help lists them


def main(argv: list[str]) -> None:
    del argv
    engine.leave_devices_to_actors()
    use_compilation_cache()
    done = embed_files(
        at_step(FLAGS.model, FLAGS.step),
        FLAGS.input,
        FLAGS.output,
        text_column=FLAGS.text_column,
        prompt_name=FLAGS.prompt_name,
        prompt=FLAGS.prompt,
        batch_size=FLAGS.batch_size,
        max_length=FLAGS.max_length,
        truncate_dim=FLAGS.truncate_dim,
        dtype=engine.dtype(FLAGS.dtype),
        output_dtype=FLAGS.output_dtype,
        shard_rows=FLAGS.shard_rows,
        keep_columns=FLAGS.keep_columns,
        normalize=FLAGS.normalize,
        on_bad_row=FLAGS.on_bad_row,
        overwrite=FLAGS.overwrite,
        update=FLAGS.update,
        engine=engine.choose(None),
        is_shard=engine.is_shard(),
    )
    now, seconds = done["rows"] - done["rows_before"] - done["reused"], done["seconds"]
    before = f" after {done['rows_before']:,} embedded before" if done["rows_before"] else ""
    before += f" and kept the vectors of {done['reused']:,}" if done["reused"] else ""
    rate = f", {now / seconds:,.1f} texts/s" if now else ""
    rejected = f"; rejected {done['rejected']:,} rows, see {done['rejected_file']}" if done["rejected"] else ""
    print(
        f"embedded {now:,} texts{before} in {seconds:.1f} s{rate}: "
        f"{FLAGS.output} has {done['rows']:,} rows of dim {done['dim']}{rejected}"
    )
    if "mean_cosine" in done:
        print(
            f"int8: the cosine of a vector with itself in float32 is {done['mean_cosine']:.5f} on average, "
            f"{done['lowest_cosine']:.5f} at least, over the {done['sample_rows']:,} rows that gave the ranges"
        )


if __name__ == "__main__":
    # Defined here, not at import: two commands that are imported together may use the same flag name.
    flags.DEFINE_string("model", None, "A checkpoint directory, or a name on the Hugging Face hub.", required=True)
    flags.DEFINE_string("step", "", STEP)
    flags.DEFINE_string(
        "input",
        None,
        "Files of rows (jsonl, csv, parquet, ...) or of text (txt, md, rst): a path, folder, glob, brace range or URL.",
        required=True,
    )
    flags.DEFINE_string(
        "output",
        None,
        "What to write: a .npy or .parquet, or a folder/ of parts in parquet, also s3:// or gs://.",
        required=True,
    )
    flags.DEFINE_string("text_column", "text", "Input column with the text. A text may be empty, but not null.")
    flags.DEFINE_string("prompt_name", None, "Name of the model's prompt for these texts, such as search_document.")
    flags.DEFINE_string("prompt", None, 'Text put in front of every text, instead of --prompt_name; "" for none.')
    flags.DEFINE_integer("batch_size", 64, "Texts in a batch.", lower_bound=1)
    flags.DEFINE_integer("max_length", None, "Tokens kept of a text. [the checkpoint's setting]", lower_bound=2)
    flags.DEFINE_integer(
        "truncate_dim", None, "Dimensions kept of an embedding. [the checkpoint's setting]", lower_bound=1
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        DTYPES,
        "Precision of the computation. auto: bfloat16 on a GPU that has flash attention, else float32.",
    )
    flags.DEFINE_enum(
        "output_dtype",
        "float32",
        OUTPUT_DTYPES,
        "Type of the stored vectors. int8: that of quantize_embeddings, with the ranges of a sample, which are kept.",
    )
    flags.DEFINE_integer(
        "shard_rows",
        50_000,
        "Rows in a part, the unit of work after an interruption. One part is held in memory.",
        lower_bound=1,
    )
    flags.DEFINE_list(
        "keep_columns", [], "Input columns to copy into a .parquet output. [none; path, line and text of text files]"
    )
    flags.DEFINE_bool(
        "normalize", None, "Scale vectors to length 1. [if the model's similarity is the cosine; not for dot products]"
    )
    flags.DEFINE_enum(
        "on_bad_row",
        "raise",
        ["raise", "skip"],
        "raise: stop at an unusable row. skip: write it to OUTPUT.rejected.jsonl.",
    )
    flags.DEFINE_bool(
        "update",
        False,
        "Replace an existing .parquet, and keep its vectors of texts that are in the input again. Add parts for new "
        "files to an existing folder.",
    )
    flags.DEFINE_bool("overwrite", False, "Replace an existing output, once the new one is complete.")
    run(main)
