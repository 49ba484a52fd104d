"""Published scores for comparison, each with its source. Scores are in per cent; those of GLUE are fractions."""

from typing import NamedTuple

PAPER = "Nomic Embed paper (arXiv 2402.01613)"
V1_CARD = "model card of nomic-embed-text-v1"
V15_CARD = "model card of nomic-embed-text-v1.5"
GTE_CARD = "model card of gte-base"
GTE_MLM_CARD = "model card of gte-multilingual-mlm-base"

# mteb's task types, in the order of the paper's table
MTEB_TYPES = (
    "Classification",
    "Clustering",
    "PairClassification",
    "Reranking",
    "Retrieval",
    "STS",
    "Summarization",
)


class Published(NamedTuple):
    """Attributes:
    average: average score over all tasks.
    by: task type, task or length -> score, if known.
    """

    model: str
    average: float
    by: dict[str, float]
    source: str


def _types(*scores: float) -> dict[str, float]:
    return dict(zip(MTEB_TYPES, scores))


MTEB = (
    Published("nomic-embed-text-v1", 62.39, _types(74.1, 43.9, 85.2, 55.7, 52.8, 82.1, 30.1), PAPER),
    Published("nomic-embed-text-v1.5", 62.28, {}, V15_CARD),
    Published("gte-base", 62.39, _types(73.01, 46.2, 84.57, 58.61, 51.14, 82.3, 31.17), GTE_CARD),
    Published("e5-base-v2", 61.5, _types(73.84, 43.8, 85.73, 55.91, 50.29, 81.05, 30.28), GTE_CARD),
    Published("text-embedding-3-small", 62.26, {}, V1_CARD),
    Published("text-embedding-ada-002", 60.99, _types(70.93, 45.9, 84.89, 56.32, 49.25, 80.97, 30.8), GTE_CARD),
    Published("jina-embeddings-v2-base-en", 60.39, {}, V1_CARD),
)
# ``by``: number of tokens -> average over the tasks
JINA_LONG = (
    Published("nomic-embed-text-v1", 54.2, {"128": 48.5, "512": 52.1, "8191": 54.2}, PAPER),
    Published("jina-embeddings-v2-base-en", 51.9, {"8191": 51.9}, V1_CARD),
    Published("text-embedding-3-small", 58.2, {"8191": 58.2}, V1_CARD),
    Published("text-embedding-ada-002", 55.25, {"8191": 55.25}, V1_CARD),
)
LOCO = (
    Published("nomic-embed-text-v1", 85.5, {"2048": 85.3, "4096": 85.6, "8192": 85.5}, PAPER),
    Published("jina-embeddings-v2-base-en", 85.45, {"8192": 85.45}, V1_CARD),
    Published("text-embedding-3-small", 82.4, {"8192": 82.4}, V1_CARD),
    Published("text-embedding-ada-002", 52.7, {"8192": 52.7}, V1_CARD),
)
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
GLUE = (
    Published("nomic-bert-2048", 0.84, dict(zip(GLUE_TASKS, (0.50, 0.93, 0.88, 0.90, 0.92, 0.86, 0.92, 0.82))), PAPER),
    Published("MosaicBERT-base", 0.854, {}, GTE_MLM_CARD),
    Published("JinaBERT-base", 0.85, {}, GTE_MLM_CARD),
)
# Number of components kept -> MTEB average of nomic-embed-text-v1.5
MATRYOSHKA = {"768": 62.28, "512": 61.96, "256": 61.04, "128": 59.34, "64": 56.10}
