"""The files of a task: NAME.jsonl, or rows in another format that ``nomic_jax.data.formats`` reads."""

from pathlib import Path

from nomic_jax.data.formats.paths import ALL_SUFFIXES
from nomic_jax.evals.tasks.contract import TaskError

RETRIEVAL, LABELLED = ("queries", "corpus", "qrels"), ("train", "test")
_ENDINGS = [ending for ending in ALL_SUFFIXES if ending != ".zip"]
QRELS = "qrels"  # BEIR's folder of judgements; a model is evaluated on those of test.tsv


def find_file(folder: str | Path, name: str) -> Path | None:
    """Returns the file of a task, such as "corpus"; None if the folder has none.

    Raises:
      TaskError: there are two.
    """
    folder = Path(folder)
    places = [*(f"{name}{ending}" for ending in _ENDINGS), *([f"{QRELS}/test.tsv"] if name == QRELS else [])]
    found = [folder / place for place in places if (folder / place).is_file()]
    if len(found) > 1:
        raise TaskError(f"{folder} has {found[0].relative_to(folder)} and {found[1].relative_to(folder)}; keep one")
    return found[0] if found else None
