"""Which runs may resume from a checkpoint."""

import dataclasses
import json
from pathlib import Path

import pytest

from nomic_jax.run.record import FORMAT, ResumeError, check_same_run, model_fields, parse_model
from nomic_jax.train.config import TrainConfig

PATH = Path("run/checkpoints/1")


def record(guide, allow_changed="", **more):
    config = {"loss": {"guide": "g"}, "checkpoint": {"allow_changed": allow_changed}}
    fields = {"format": FORMAT, "config": config, "model": {}, "tokenizer_sha256": "t", "data_fingerprint": "d"}
    return fields | {"guide": guide} | more


@pytest.mark.parametrize(("before", "now"), [({"sha256": "a"}, {"sha256": "b"}), ({"sha256": "a", "step": 3}, None)])
def test_a_guide_with_other_weights_at_the_same_path_is_refused(before, now):
    check_same_run(record(before, shuffle=2), record(before, shuffle=2), PATH)
    with pytest.raises(ResumeError, match=r"whose guide .* was 'a'; now it is .*allow_changed=loss"):
        check_same_run(record(before, shuffle=2), record(now, shuffle=2), PATH)
    check_same_run(record(before, shuffle=2), record(now, "loss", shuffle=2), PATH)
    # A record of an earlier version, whose identity of the guide covers fewer files.
    check_same_run(record(before), record(now, shuffle=2), PATH)


def test_a_run_without_a_guide_resumes():
    check_same_run(record(None, shuffle=2), record(None, shuffle=2), PATH)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_record_of_before_a_setting_resumes_without_it(ema):
    """Earlier versions had no moving average; their checkpoints have none to go on with."""
    before, now = record(None, shuffle=2), record(None, shuffle=2)
    before["config"]["optim"], now["config"]["optim"] = {"lr": 1.0}, {"lr": 1.0, "ema": ema}
    if not ema:
        check_same_run(before, now, PATH)
        return
    with pytest.raises(ResumeError, match=r"config.optim.ema was 0.0; now it is 0.9"):
        check_same_run(before, now, PATH)


def test_a_run_of_0_2_0_resumes():
    """A setting that was added since needs the value that does what that version did."""
    saved = json.loads((Path(__file__).parent / "record-0.2.0.json").read_text())
    config = dataclasses.asdict(TrainConfig.from_mapping(saved["config"]))
    now = saved | {"config": config, "model": model_fields(parse_model(saved))}
    assert now["config"].keys() > saved["config"].keys()
    check_same_run(saved, now, PATH)
    now["config"]["loss"]["dropout"] = 0.2
    with pytest.raises(ResumeError, match=r"config.loss.dropout was 0.1; now it is 0.2"):
        check_same_run(saved, now, PATH)
