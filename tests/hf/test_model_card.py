"""The model card holds what the files say, and nothing in it becomes markup."""

import pytest

from convert.to_hf import read_report
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
