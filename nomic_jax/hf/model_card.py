"""Writes the README.md of an export: model description, usage, training data and evaluation results.

Names and values come from files: they are escaped, so that none of them is markup or adds a line.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from nomic_jax.data.prompts import prompt_for, prompt_text
from nomic_jax.files import printable
from nomic_jax.hf.front_matter import HUB_ID, CardData, front_matter
from nomic_jax.model import EmbeddingConfig, EncoderConfig

_HEAD = """{front}
# {title}

A text embedder {made} with nomic_jax, the JAX implementation of [Nomic Embed](https://arxiv.org/abs/2402.01613): an
encoder of {layers} layers and width {width} ({position}), {pooling} pooling, {dim} dimensions, texts of up to
{max_length} tokens.{cut}

## Usage

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({name})
queries = model.encode_query(["what is a text embedder?"])
documents = model.encode_document(["A text embedder maps texts to vectors."])
print(model.similarity(queries, documents))
```

In JAX, use {in_jax}, which has the same methods.
{precision}
{prompts}
"""


def model_card(
    name: str,
    config: EmbeddingConfig,
    *,
    prompts: Mapping[str, str],
    max_length: int,
    dtype: str = "float32",
    default_prompt_name: str | None = None,
    matryoshka_dims: Sequence[int] = (),
    is_classifier: bool = False,
    training: Sequence[Mapping[str, Any]] = (),
    evaluations: Mapping[str, Mapping[str, Any]] | None = None,
    data: CardData | None = None,
) -> str:
    """Returns the card as Markdown, with the front matter of the hub.

    Args:
      dtype: type of the tensors in the file.
      name: what a client opens: a directory, or "owner/name" on the hub. The title is its last part.
      matryoshka_dims: numbers of components that the model was trained to be cut to.
      is_classifier: whether the directory opens as a sequence classifier.
      training: the records of the stages, first to last (``nomic_jax.run.record.make_record``).
      evaluations: suite -> report of ``launch.evaluate``.
      data: language, license and others that no file of the model knows.
    """
    encoder = config.encoder
    quoted = json.dumps(printable.printable(name), ensure_ascii=False)
    title = name.rpartition("/")[2] if HUB_ID.fullmatch(name) else name
    head = _HEAD.format(
        front=front_matter(
            title,
            data or CardData(),
            prompts=prompts,
            default_prompt_name=default_prompt_name,
            is_classifier=is_classifier,
            training=training,
            evaluations=evaluations or {},
        ),
        title=printable.markdown(title),
        name=quoted,
        in_jax=printable.code(f"nomic_jax.Embedder.from_pretrained({quoted})"),
        made="trained" if training else "converted",
        layers=encoder.num_layers,
        width=encoder.hidden_size,
        position=_position(encoder),
        pooling=config.pooling,
        dim=config.output_dim,
        max_length=max_length,
        cut=_cut(config) + _matryoshka(matryoshka_dims),
        precision=_precision(dtype, quoted),
        prompts=_prompts(prompts),
    )
    sections = [head, _training(training), *(_evaluation(suite, x) for suite, x in (evaluations or {}).items())]
    return "\n".join(section for section in sections if section)


def _position(encoder: EncoderConfig) -> str:
    if encoder.position == "absolute":
        return "absolute positions" + (" and relative biases" if encoder.relative_attention_num_buckets else "")
    if encoder.rope_scaling_factor is None:
        return "RoPE"
    return f"RoPE, dynamic NTK beyond {encoder.max_trained_positions} tokens"


def _cut(config: EmbeddingConfig) -> str:
    if config.dim is None:
        return ""
    width = config.width
    if not config.normalize:
        return f" Vectors are the first {config.dim} of {width} components."
    return (
        f" Vectors are cut to the first {config.dim} of {width} components after they are normalised, so they are "
        f"shorter than 1: where a client takes dot products, use `normalize_embeddings=True`."
    )


def _precision(dtype: str, name: str) -> str:
    """Says what clients compute from 16-bit weights; tests/hf/test_roundtrip.py has the figures."""
    if dtype == "float32":
        return ""
    returned, off = (" and returns float16", "0.0003") if dtype == "float16" else ("", "0.002")
    in_float32 = printable.code(f'SentenceTransformer({name}, model_kwargs={{"dtype": "float32"}})')
    return (
        f"\nThe weights are {dtype}. sentence-transformers computes in that type{returned}: components differ by about "
        f"{off} from those of float32, and lengths by as much from 1. {in_float32} computes in float32, as `Embedder` "
        f"does by default.\n"
    )


def _matryoshka(dims: Sequence[int]) -> str:
    if not dims:
        return ""
    return f" It was trained with Matryoshka at {', '.join(map(str, dims))} components: `truncate_dim` cuts to them."


def _prompts(prompts: Mapping[str, str]) -> str:
    if not any(prompts.values()):
        return "Texts need no prefix."
    query, document = (prompt_for(prompts, role) for role in ("query", "document"))
    lines = "".join(f"- {_code(name)}: {_quoted(text)}\n" for name, text in prompts.items())
    return (
        f"The model was trained with prompts, texts that go before an input. `encode_query` prepends {_quoted(query)}, "
        f"`encode_document` {_quoted(document)}, and `encode` the prompt that `prompt_name` names:\n\n{lines}"
    )


def _quoted(text: str) -> str:
    return _code(json.dumps(text, ensure_ascii=False)) if text else "nothing"


def _code(text: str) -> str:
    # Only in a table does "|" need its backslash.
    return printable.code(text).replace("\\|", "|")


def _training(stages: Sequence[Mapping[str, Any]]) -> str:
    if not stages:
        return ""
    rows, data = [], []
    members = _field(stages[-1], "average")
    averaged = f"\nThe weights are the average of {len(members)} checkpoints.\n" if isinstance(members, list) else ""
    # The members' own last stages differ; training.json has them all.
    stages = [stage for stage in stages if "average" not in stage]
    if not stages:
        return f"## Training\n{averaged}\nEvery setting of every stage is in `training.json`.\n"
    for stage in stages:
        name, started = _field(stage, "config", "stage"), _field(stage, "config", "init_from")
        rows.append(
            [
                name,
                PurePath(str(started)).name if started else "random weights" if started == "" else None,
                _field(stage, "step"),
                _field(stage, "config", "batch_size"),
                _field(stage, "config", "optim", "lr"),
                _field(stage, "config", "loss", "temperature") if name != "mlm" else None,
                _field(stage, "config", "seed"),
                _field(stage, "config", "model", "dtype"),
                _joined(" x ", _field(stage, "device_count"), _field(stage, "device_kind")),
            ]
        )
        sources = _field(stage, "sources")
        for source in sources if isinstance(sources, list | tuple) else ():
            count, fingerprint = _field(source, "rows"), _field(source, "fingerprint")
            data.append(
                [
                    name,
                    _field(source, "name"),
                    f"{count:,}" if isinstance(count, int) else count,
                    _prefixes(source),
                    None if fingerprint is None else str(fingerprint)[:16],
                ]
            )
    header = [
        "stage",
        "started from",
        "steps",
        "batch",
        "peak learning rate",
        "temperature",
        "seed",
        "dtype",
        "devices",
    ]
    text = f"## Training\n\n{_table(header, rows)}"
    if data:
        text += f"\nData:\n\n{_table(['stage', 'source', 'rows', 'prefixes', 'fingerprint'], data)}"
    packages = _field(stages[-1], "versions")
    if isinstance(packages, Mapping) and packages:
        versions = ", ".join(_cell(f"{package} {version}") for package, version in packages.items())
        text += f"\nVersions of the last stage: {versions}."
    if _field(stages[-1], "weights") == "ema":
        decay = _cell(_field(stages[-1], "config", "optim", "ema"))
        text += f"\nThe weights are their moving average over the updates of the last stage, with a decay of {decay}.\n"
    return f"{text}{averaged}\nEvery setting of every stage is in `training.json`.\n"


def _prefixes(source: Any) -> str | None:
    """Returns the texts in front of a source's queries and documents; None if there are none."""
    texts = [_field(source, f"{role}_prefix") for role in ("query", "document")]
    if not any(texts):
        return None
    shown = [json.dumps(prompt_text(str(text)), ensure_ascii=False) if text else "none" for text in texts]
    return " / ".join(dict.fromkeys(shown))


def _field(record: Any, *path: str) -> Any:
    """Returns a nested value, or None if it is missing: the record may come from another version or program."""
    for name in path:
        record = record.get(name) if isinstance(record, Mapping) else None
    return record


def _joined(separator: str, *values: Any) -> str:
    return separator.join(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def _evaluation(suite: str, report: Mapping[str, Any]) -> str:
    """Returns the section of a report, which has ``tasks``: name -> figures, and ``average``: metric -> figure."""
    average = report["average"]
    names = dict.fromkeys(name for figures in report["tasks"].values() for name in figures)
    # Averages of other lengths or numbers of components are named "<metric> @<length> dim <n>": a row each.
    of = {
        key: max((name for name in names if f"{key} ".startswith(f"{name} ")), key=len, default=key) for key in average
    }
    metrics = list(dict.fromkeys(of.values()))
    rows = [
        [task, *(f"{figures[metric]:.4f}" if metric in figures else "" for metric in metrics)]
        for task, figures in report["tasks"].items()
    ]
    settings: dict[str, dict[str, float]] = {}
    for key, metric in of.items():
        settings.setdefault(key.removeprefix(metric).strip(), {})[metric] = average[key]
    for setting, means in settings.items():
        name = f"average {setting}".strip()
        rows.append([name, *(f"{means[metric]:.4f}" if metric in means else "" for metric in metrics)])
    return f"## Evaluation: {printable.markdown(suite)}\n\n{_table(['task', *metrics], rows)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [
        [_cell(name) for name in header],
        ["---"] * len(header),
        *([_cell(value) for value in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    """Returns any value as one line of text that contains no markup and does not end the cell."""
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())
    return printable.markdown(text[:200])
