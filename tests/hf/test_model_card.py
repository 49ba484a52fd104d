"""The model card holds what the files say, and nothing in it becomes markup."""

import pytest
import yaml
from huggingface_hub import ModelCard

from convert.to_hf import read_report, read_widget
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.files.printable import printable
from nomic_jax.hf import CardData
from nomic_jax.hf.front_matter import read_card_data
from nomic_jax.hf.model_card import model_card
from nomic_jax.model import EmbeddingConfig, EncoderConfig

HOSTILE = "a\n# b\n<img src=x onerror=alert(1)> | ![c](http://d) `e` \x1b[31m [f](javascript:g)"


def test_names_are_no_markup():
    stage = {"config": {"stage": HOSTILE, "init_from": HOSTILE}, "step": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    stage["sources"] = [{"name": HOSTILE, "query_prefix": HOSTILE, "document_prefix": "", "rows": HOSTILE}]
    card = model_card(
        HOSTILE,
        EmbeddingConfig(EncoderConfig(num_layers=1)),
        prompts={HOSTILE: HOSTILE, "query": HOSTILE},
        max_length=512,
        training=[stage],
        evaluations={HOSTILE: {"average": {HOSTILE: 0.5}, "tasks": {HOSTILE: {HOSTILE: 0.5}}}},
    )
    data = ModelCard(card).data  # one result, whose texts end no line
    assert [result.dataset_type for result in data.eval_results] == [printable(HOSTILE)]
    card = card.split("\n---\n", 1)[1]
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert [line.split()[1] for line in headings] == ["a\\\\n\\#", "Usage", "Training", "Evaluation:"]
    in_code = 0
    for line in card.splitlines():
        in_code ^= line.startswith("```")
        assert line.isprintable()
        if not in_code and not line.startswith("- `") and "from_pretrained" not in line and "prepends" not in line:
            assert "<img" not in line and "![c]" not in line and "](javascript" not in line.replace("\\](", "")
    # The rows of each table have the cells of its header.
    rows = [line for line in card.splitlines() if line.startswith("|")]
    cells = [len(line.replace("\\|", "").split("|")) - 2 for line in rows]
    assert cells == [9, 9, 9, 5, 5, 5, 2, 2, 2, 2]


def test_prompts_are_shown_to_the_letter():
    config = EmbeddingConfig(EncoderConfig(num_layers=1))
    card = model_card("m", config, prompts={"query": "<|q|>\nfind: ", "document": ""}, max_length=512)
    assert '- `query`: `"<|q|>\\nfind: "`\n- `document`: nothing\n' in card
    assert "Texts need no prefix." in model_card("m", config, prompts={"query": "", "document": ""}, max_length=512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"tasks": [], "average": {}}', "tasks should map"),
        ('{"tasks": {"a": 1}, "average": {}}', "tasks should map"),
        ('{"tasks": {"a": {"m": "high"}}, "average": {"m": 1}}', "tasks: 'a': m is 'high'; expected a number"),
        ('{"tasks": {}, "average": {"m": null}}', "average should map metrics to numbers"),
        ('{"tasks": {}, "average": [1]}', "average should map metrics to numbers"),
        ('{"tasks": {}}', "not a report"),
        ("[1", "not valid JSON"),
    ],
)
def test_a_report_of_other_types_is_refused(tmp_path, text, message):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=rf"report\.json: .*{message}"):
        read_report(tmp_path / "report.json")


CONFIG = EmbeddingConfig(EncoderConfig(num_layers=1))
REPORT = {
    "suite": "mteb",
    "average": {"score": 0.7},
    "tasks": {"SciFact@512 dim 64": {"task": "SciFact", "type": "Retrieval", "metric": "ndcg_at_10", "score": 0.703}},
}
LOCAL = {
    "suite": "local",
    "average": {"ndcg@10": 0.25},
    "tasks": {"faq": {"task": "faq", "type": "Retrieval", "metric": "ndcg@10", "ndcg@10": 0.25, "queries": 200}},
}


def test_the_hub_reads_the_front_matter(tmp_path):
    """huggingface_hub's own classes validate it, and find each figure."""
    data = CardData(language=("en", "de"), license="apache-2.0", base_model="me/base", datasets=("me/pairs", "squad"))
    card = model_card(
        "me/m", CONFIG, prompts={"query": "q: "}, max_length=512, evaluations={"a": REPORT, "b": LOCAL}, data=data
    )
    read = ModelCard(card).data
    assert (read.language, read.license, read.base_model, read.datasets) == (
        ["en", "de"],
        "apache-2.0",
        "me/base",
        ["me/pairs", "squad"],
    )
    assert (read.library_name, read.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert {"sentence-transformers", "sentence-similarity", "feature-extraction"} <= set(read.tags)
    assert read.model_name == "m"
    found = [(r.task_type, r.dataset_name, r.dataset_config, r.metric_type, r.metric_value) for r in read.eval_results]
    assert found == [
        ("Retrieval", "mteb: SciFact@512 dim 64", "@512 dim 64", "ndcg_at_10", 0.703),
        ("Retrieval", "local: faq", None, "ndcg@10", 0.25),
    ]
    assert read.widget[0]["source_sentence"] == "q: What is a text embedder?"
    assert "# m\n" in card and 'SentenceTransformer("me/m")' in card
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert read_card_data(tmp_path / "README.md") == data


def test_what_is_not_known_is_left_out():
    front = model_card("m", CONFIG, prompts={}, max_length=512).split("---\n")[1]
    assert list(yaml.safe_load(front)) == ["library_name", "pipeline_tag", "tags", "widget"]
    german = model_card("m", CONFIG, prompts={}, max_length=512, data=CardData(language=("de",)))
    assert "widget" not in ModelCard(german).data.to_dict()
    classifier = ModelCard(model_card("m", CONFIG, prompts={}, max_length=512, is_classifier=True)).data
    assert (classifier.library_name, classifier.pipeline_tag) == ("transformers", "text-classification")


def test_where_a_run_came_from():
    """Hub names come from the caches of the hub's libraries, never from the name of a local folder."""
    cached = "/root/.cache/huggingface/hub/models--nomic-ai--nomic-embed-text-v1/snapshots/0123abc"
    stages = [
        {
            "parent": {"path": cached},
            "config": {"stage": "contrastive", "data": {"mixture": "hf:me/pairs?split=train"}},
        },
        {"parent": {"path": "runs/a"}, "config": {"stage": "finetune", "data": {"mixture": "hf:folder/of-mine"}}},
    ]
    stages[0]["sources"] = [
        {"name": "data", "files": [{"path": "/cache/me___pairs/default/0.0.0/a/pairs-train.arrow"}]}
    ]
    stages[1]["sources"] = [{"name": "data", "files": [{"path": "folder/of-mine/data-00000.arrow"}]}]
    data = ModelCard(model_card("m", CONFIG, prompts={}, max_length=512, training=stages)).data
    assert (data.base_model, data.datasets) == ("nomic-ai/nomic-embed-text-v1", ["me/pairs"])
    stages[0]["parent"]["path"] = "base"
    assert ModelCard(model_card("m", CONFIG, prompts={}, max_length=512, training=stages)).data.base_model is None


def test_widget_texts_have_the_prompts_that_the_widget_does_not_add(tmp_path):
    data = CardData(widget=(("a", ("b", "c")),))
    prompts = {"query": "q: ", "document": "d: "}
    card = ModelCard(model_card("m", CONFIG, prompts=prompts, max_length=512, data=data))
    assert card.data.widget == [{"source_sentence": "q: a", "sentences": ["d: b", "d: c"]}]
    card = ModelCard(model_card("m", CONFIG, prompts=prompts, default_prompt_name="query", max_length=512, data=data))
    assert card.data.widget == [{"source_sentence": "a", "sentences": ["b", "c"]}]
    (tmp_path / "w.jsonl").write_text('{"source_sentence": "a", "sentences": ["b", "c"]}\n{"source_sentence": "a"}\n')
    with pytest.raises(BadRow, match=r"w\.jsonl:2"):
        read_widget(tmp_path / "w.jsonl")
    (tmp_path / "w.jsonl").write_text('{"source_sentence": "a", "sentences": ["b", "c"]}\n')
    assert tuple(read_widget(tmp_path / "w.jsonl")) == data.widget


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"language": ("English",)}, "language: 'English' is no language code"),
        ({"license": "Apache 2.0"}, "license: 'Apache 2.0' is no identifier"),
        ({"license": "other"}, "license_name: is needed"),
        ({"license_link": "a"}, "license_link: needs"),
        ({"base_model": "../base"}, r"base_model: '\.\./base' is no name"),
        ({"datasets": ("a/b/c",)}, "datasets: 'a/b/c' is no name"),
    ],
)
def test_values_that_the_hub_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        CardData(**fields)


@pytest.mark.parametrize(
    "front",
    ["a: [", "- a", "license: [1]\nlanguage: 3", "license: Apache 2", "a: &a [*a]", "[" * 5000, "license: \x00"],
)
def test_the_card_of_a_converted_model_may_be_broken(tmp_path, front):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# m\n", encoding="utf-8")
    assert read_card_data(tmp_path / "README.md") == CardData()
    assert read_card_data(tmp_path / "missing") == CardData()
