"""The front matter of a model card: the YAML from which the hub makes a model's page, its filters and its widget.

Fields: https://huggingface.co/docs/hub/model-cards. What is not known is left out.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nomic_jax.data.prompts import prompt_for
from nomic_jax.files import printable
from nomic_jax.files.reading import read_text

LARGEST_CARD = 1 << 22  # bytes; cards with all figures of MTEB have 200,000
_FRONT = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*\n", re.DOTALL)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# The folder of a model in the hub's cache, and below it that of a data set in the cache of `datasets`.
_CACHED_MODEL = re.compile(r"(?:^|/)models--(.+?)--([^/]+)(?:/|$)")
_DATASET = re.compile(r"hf:([A-Za-z0-9][\w.-]*)/([\w.-]+)(?:\?.*)?")
_EXAMPLE = (
    "What is a text embedder?",
    ("A text embedder maps texts to vectors.", "Yeast makes the dough rise.", "The train leaves at noon."),
)


@dataclasses.dataclass(frozen=True)
class CardData:
    """What a card says that the files of a model do not. Empty fields are left out.

    Attributes:
      language: codes of ISO 639-1 ("en"), or "multilingual".
      license: the hub's identifier, such as "apache-2.0"; "other" needs ``license_name``.
      license_name, license_link: of a license that has no identifier.
      base_model: hub name of the model that training started from; known without it if that came from the hub's cache.
      datasets: hub names of the training data; known without it if a stage names one as its only source.
      widget: examples of the hub's widget, (source sentence, sentences to compare). () for a general English one, if
        the language is English or not given.

    Raises:
      ValueError: the hub would refuse a value; the message names the field.
    """

    language: tuple[str, ...] = ()
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    widget: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        for code in self.language:
            if not _LANGUAGE.fullmatch(code):
                raise ValueError(f"language: {code!r} is no language code; write one of ISO 639-1, such as en")
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise ValueError(
                f"license: {self.license!r} is no identifier of the hub; write one such as apache-2.0, or other with a "
                f"license_name"
            )
        if (self.license == "other") != (self.license_name is not None):
            raise ValueError("license_name: is needed for the license other, and only for that")
        if self.license_link is not None and self.license_name is None:
            raise ValueError("license_link: needs a license_name")
        for field, names in (("base_model", [self.base_model] if self.base_model else []), ("datasets", self.datasets)):
            for name in names:
                if not HUB_ID.fullmatch(name):
                    raise ValueError(f"{field}: {name!r} is no name on the hub; write owner/name")


def read_card_data(readme: Path) -> CardData:
    """Returns what the front matter of a model's card says; a field that is missing or of another type is left out.

    It describes the same model in another format. It does not describe a model that is trained from this one.
    """
    try:
        text = read_text(readme, limit=LARGEST_CARD)
        found = _FRONT.match(text)
        content = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return CardData()
    if not isinstance(content, dict):
        return CardData()
    data = CardData()
    for field, value in (
        ("language", _texts(content.get("language"))),
        ("base_model", next(iter(_texts(content.get("base_model"))), None)),
        ("datasets", _texts(content.get("datasets"))),
    ):
        data = _with(data, {field: value})
    licenses = {name: content.get(name) for name in ("license", "license_name", "license_link")}
    return _with(data, licenses) if all(isinstance(x, str | None) for x in licenses.values()) else data


def _with(data: CardData, values: dict[str, Any]) -> CardData:
    try:
        return dataclasses.replace(data, **values)
    except ValueError:
        return data


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in values if isinstance(text, str))


def front_matter(
    name: str,
    data: CardData,
    *,
    prompts: Mapping[str, str],
    default_prompt_name: str | None,
    is_classifier: bool,
    training: Sequence[Mapping[str, Any]],
    evaluations: Mapping[str, Mapping[str, Any]],
) -> str:
    """Returns the front matter, with its lines of dashes. Texts are escaped, so that none of them adds a line.

    Args: see ``nomic_jax.hf.model_card.model_card``.
    """
    base_model = data.base_model or _base_model(training)
    similarity = not is_classifier
    results = [result for suite, report in evaluations.items() for result in _results(suite, report)]
    fields = {
        "language": list(data.language),
        "license": data.license,
        "license_name": data.license_name,
        "license_link": data.license_link,
        "library_name": "sentence-transformers" if similarity else "transformers",
        "pipeline_tag": "sentence-similarity" if similarity else "text-classification",
        "tags": [
            *(("sentence-transformers", "feature-extraction", "sentence-similarity") if similarity else ()),
            "nomic_jax",
        ],
        "base_model": base_model,
        "datasets": list(dict.fromkeys([*data.datasets, *_datasets(training)])),
        "widget": _widget(data, prompts, default_prompt_name) if similarity else [],
        "model-index": [{"name": name, "results": results}] if results else [],
    }
    known = {field: _printable(value) for field, value in fields.items() if value}
    content = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=math.inf)
    return f"---\n{content}---\n"


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _printable(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_printable(x) for x in value]
    return printable.printable(value) if isinstance(value, str) else value


def _base_model(training: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns the hub name of the model that the first stage started from, if it came from the hub's cache."""
    for path in _values(training[:1], ("parent", "path"), ("config", "init_from")):
        if isinstance(path, str) and (found := _CACHED_MODEL.search(path)):
            return f"{found[1]}/{found[2]}"
    return None


def _datasets(training: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the hub names of stages whose only source has one, and whose files are in the cache of `datasets`."""
    for stage in training:
        for mixture in _values([stage], ("config", "data", "mixture")):
            found = _DATASET.fullmatch(mixture) if isinstance(mixture, str) else None
            if found and f"{found[1]}___" in str(stage.get("sources")):
                yield f"{found[1]}/{found[2]}"


def _values(records: Sequence[Mapping[str, Any]], *paths: tuple[str, ...]) -> Iterator[Any]:
    for record in records:
        for path in paths:
            value: Any = record
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            yield value


def _widget(data: CardData, prompts: Mapping[str, str], default_prompt_name: str | None) -> list[dict[str, Any]]:
    """Returns the examples with the prompts in their texts: the widget adds only the default prompt."""
    english = not data.language or "en" in data.language
    examples = data.widget or ((_EXAMPLE,) if english else ())
    query, document = ("", "") if default_prompt_name else (prompt_for(prompts, x) for x in ("query", "document"))
    return [
        {"source_sentence": query + source, "sentences": [document + sentence for sentence in sentences]}
        for source, sentences in examples
    ]


def _results(suite: str, report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the results of a report for the model index: each task with its figures. Counts are not figures."""
    for label, figures in report["tasks"].items():
        task = str(figures.get("task", label))
        values = {name: x for name, x in figures.items() if type(x) is float and math.isfinite(x)}
        # mteb's only figure is the score, whose metric is named beside it.
        metrics = [
            {"type": str(figures.get("metric", name)) if name == "score" else name, "value": round(value, 5)}
            for name, value in values.items()
        ]
        if not metrics:
            continue
        dataset = {"type": task, "name": f"{report.get('suite', suite)}: {label}"}
        setting = label.removeprefix(task).strip()
        yield {
            "task": {"type": str(figures.get("type", "sentence-similarity"))},
            "dataset": dataset | ({"config": setting} if setting else {}),
            "metrics": metrics,
        }
