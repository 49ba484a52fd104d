"""Converts a checkpoint to a Hugging Face directory: nomic-jax to-hf CHECKPOINT OUT_DIR

CHECKPOINT is the working directory of a run (its best checkpoint if it was evaluated, else the latest; see --step), one
of its checkpoints, or another Hugging Face directory or a name on the hub (ORGANISATION/NAME[@REVISION]), to change its
format or dtype.

OUT_DIR may be the clone of a repository: only files of an export are written, all or none of them, and everything else
stays. --push_to_hub uploads these files too, in one commit, with the token of `hf auth login` or HF_TOKEN.

Converting a Hugging Face directory keeps language, license, base model and data sets of its model card. For a trained
model, the flags name them: they are not guessed.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from nomic_jax.arguments import STEP, Parser, fail
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.files.reading import read_json
from nomic_jax.hf import CardData, push_to_hub, write_checkpoint
from nomic_jax.hf.files import MAIN_FILE
from nomic_jax.hf.front_matter import read_card_data
from nomic_jax.run.pretrained import at_step, read_pretrained


def main() -> None:
    parser = Parser("nomic-jax to-hf", __doc__)
    parser.add_argument(
        "checkpoint", help="the checkpoint to convert: a folder, or a name on the hub (ORGANISATION/NAME[@REVISION])"
    )
    parser.add_argument(
        "out_dir", help="directory to write; sentence-transformers, transformers and others can load it"
    )
    parser.add_argument("--step", default="", help=STEP)
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="of a run with config.optim.ema: the moving average of its weights, the default, or the last weights",
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
    parser.add_argument(
        "--adapter",
        nargs="?",
        const="",
        metavar="BASE",
        help="of a run with config.lora.rank: write its adapter for peft, not merged weights. BASE: folder or hub name "
        "of the model it belongs to; by default that of config.init_from",
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
    card = parser.add_argument_group("front matter of the model card")
    card.add_argument("--language", action="append", help="code of ISO 639-1, such as en; repeatable")
    card.add_argument("--license", help="identifier of the hub, such as apache-2.0; other needs --license_name")
    card.add_argument("--license_name", help="name of a license that has no identifier")
    card.add_argument("--license_link", help="where that license is")
    card.add_argument("--base_model", help="hub name of the model that training started from")
    card.add_argument("--dataset", action="append", help="hub name of training data; repeatable")
    card.add_argument(
        "--widget", type=Path, help='jsonl with examples {"source_sentence": TEXT, "sentences": [TEXT, ...]}'
    )
    hub = parser.add_argument_group("upload")
    hub.add_argument("--push_to_hub", metavar="OWNER/NAME", help="repository; made if it is missing")
    hub.add_argument("--private", action="store_true", help="make a private one; an existing public one is refused")
    hub.add_argument("--revision", help="branch, made from the main branch if it is missing")
    hub.add_argument("--commit_message", help="message of the commit")
    hub.add_argument("--create_pr", action="store_true", help="open a pull request against the main branch")
    parser.add_argument(
        "--overwrite", action="store_true", help="also replace files in OUT_DIR that no export wrote, or changed ones"
    )
    args = parser.parse_args()
    try:
        write(args)
        print(f"wrote {args.out_dir}")
        if args.push_to_hub:
            print(f"uploaded: {push(args)}")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        fail(error)


def write(args: argparse.Namespace) -> None:
    card = card_data(args)
    for flag in ("private", "revision", "commit_message", "create_pr"):
        if getattr(args, flag) and not args.push_to_hub:
            raise ValueError(f"--{flag} needs --push_to_hub")
    if args.create_pr and args.revision:
        raise ValueError("--create_pr opens a pull request against the main branch; leave out --revision")
    source = read_pretrained(at_step(args.checkpoint, args.step), args.weights)
    for part in ("mlm_head", "classifier"):
        if getattr(args, part) and part not in source.params:
            raise ValueError(f"{args.checkpoint} has no {part}; it has {', '.join(source.params)}")
    config = dataclasses.replace(
        source.config,
        layer_norm=source.config.layer_norm or args.layer_norm,
        dim=args.truncate_dim or source.config.dim,
    )
    if args.adapter == "" and source.adapter and Path(source.adapter.base, "checkpoints").is_dir():
        raise ValueError(
            f"{args.checkpoint} was trained on the run {source.adapter.base}, which peft cannot open; export that run "
            f"too (nomic-jax to-hf {source.adapter.base} DIR), and write --adapter=DIR"
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
        name=args.push_to_hub,
        card=card,
        adapter_for=args.adapter,
    )


def push(args: argparse.Namespace) -> str:
    """Uploads the export and returns the URL of the commit or pull request."""
    return push_to_hub(
        args.out_dir,
        args.push_to_hub,
        private=True if args.private else None,
        revision=args.revision,
        commit_message=args.commit_message,
        create_pr=args.create_pr,
    )


def card_data(args: argparse.Namespace) -> CardData:
    """Returns what the flags say and, for a Hugging Face directory, what its model card says of the other fields."""
    card = (
        read_card_data(Path(args.checkpoint) / "README.md") if Path(args.checkpoint, MAIN_FILE).exists() else CardData()
    )
    given: dict[str, Any] = {"language": args.language, "base_model": args.base_model, "datasets": args.dataset}
    if args.license or args.license_name or args.license_link:
        given |= {name: getattr(args, name) for name in ("license", "license_name", "license_link")}
        card = dataclasses.replace(card, license=None, license_name=None, license_link=None)
    if args.widget:
        given["widget"] = read_widget(args.widget)
    fields: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in given.items() if x is not None
    }
    return dataclasses.replace(card, **fields)


def read_widget(file: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Returns the examples in a jsonl. Raises BadRow, with the line, if one is no example."""
    rows = read_rows(file, {"source_sentence": str, "sentences": list}, others=())
    return [(row["source_sentence"], tuple(row["sentences"])) for row in rows]


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
