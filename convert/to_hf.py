"""Converts a checkpoint to a Hugging Face directory: python -m convert.to_hf CHECKPOINT OUT_DIR

CHECKPOINT is the working directory of a run (its latest checkpoint is converted), one of its checkpoints, or another
Hugging Face directory, to change its format or dtype.

OUT_DIR may be the clone of a repository: only files of an export are written, all or none of them, and everything else
stays.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from nomic_jax.arguments import Parser, fail
from nomic_jax.files.reading import read_json
from nomic_jax.hf import write_checkpoint
from nomic_jax.run.pretrained import read_pretrained


def main() -> None:
    parser = Parser("python -m convert.to_hf", __doc__)
    parser.add_argument("checkpoint", help="the checkpoint to convert")
    parser.add_argument(
        "out_dir", help="directory to write; sentence-transformers, transformers and others can load it"
    )
    parser.add_argument(
        "--format",
        choices=("hub", "native"),
        default="hub",
        help="tensor names. hub: as published, which every client reads; native: those inside transformers",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the tensors"
    )
    parser.add_argument("--mlm_head", action="store_true", help="also write the masked-LM head")
    parser.add_argument("--classifier", action="store_true", help="also write the sequence classifier")
    parser.add_argument("--max_length", type=int, help="tokens kept of a text; the checkpoint's setting by default")
    parser.add_argument(
        "--truncate_dim", type=int, help="dimensions that the exported model keeps by default (Matryoshka)"
    )
    parser.add_argument(
        "--layer_norm", action="store_true", help="apply LayerNorm after pooling, as in nomic-embed-text-v1.5"
    )
    parser.add_argument(
        "--evaluation", action="append", default=[], help="report of launch.evaluate for the model card; repeatable"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="also replace files in OUT_DIR that no export wrote, or changed ones"
    )
    args = parser.parse_args()
    try:
        write(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        fail(error)
    print(f"wrote {args.out_dir}")


def write(args: argparse.Namespace) -> None:
    source = read_pretrained(args.checkpoint)
    for part in ("mlm_head", "classifier"):
        if getattr(args, part) and part not in source.params:
            raise ValueError(f"{args.checkpoint} has no {part}; it has {', '.join(source.params)}")
    config = dataclasses.replace(
        source.config,
        layer_norm=source.config.layer_norm or args.layer_norm,
        dim=args.truncate_dim or source.config.dim,
    )
    wanted = ("encoder", *(part for part in ("mlm_head", "classifier") if getattr(args, part)))
    write_checkpoint(
        args.out_dir,
        dataclasses.replace(
            source,
            config=config,
            params={name: params for name, params in source.params.items() if name in wanted},
            max_length=args.max_length or source.max_length,
        ),
        naming=args.format,
        dtype=args.dtype,
        overwrite=args.overwrite,
        evaluations={name: read_report(file) for name, file in names_of(args.evaluation).items()},
    )


def names_of(files: list[str]) -> dict[str, Path]:
    """Returns the shortest ends of the paths that tell the reports apart: model, or first/model and second/model."""
    paths = list(dict.fromkeys(Path(file).resolve().with_suffix("") for file in files))
    named = {}
    for path in paths:
        parts = path.parts
        length = next(
            n for n in range(1, len(parts) + 1) if all(p == path or p.parts[-n:] != parts[-n:] for p in paths)
        )
        named["/".join(parts[-length:])] = path
    by_path = {Path(file).resolve().with_suffix(""): Path(file) for file in files}
    return {name: by_path[path] for name, path in named.items()}


def read_report(file: Path) -> dict[str, Any]:
    """Returns a report of launch.evaluate: tasks: name -> figures, and average: metric -> figure.

    Raises:
      ValueError: the file is not such a report; the message names the field.
    """
    report = read_json(file)
    if not isinstance(report, dict) or not {"tasks", "average"} <= report.keys():
        raise ValueError(f"{file}: this is not a report of launch.evaluate, which has the fields tasks and average")
    average, tasks = report["average"], report["tasks"]
    if not isinstance(average, dict) or not all(type(value) in (int, float) for value in average.values()):
        raise ValueError(f"{file}: average should map metrics to numbers")
    if not isinstance(tasks, dict) or not all(isinstance(figures, dict) for figures in tasks.values()):
        raise ValueError(f"{file}: tasks should map the names of tasks to their figures")
    for task, figures in tasks.items():
        for metric in average.keys() & figures.keys():
            if type(figures[metric]) not in (int, float):
                raise ValueError(f"{file}: tasks: {task!r}: {metric} is {figures[metric]!r:.100}; expected a number")
    return report


if __name__ == "__main__":
    main()
