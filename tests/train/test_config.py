"""Misspelt fields and invalid values fail before compilation; the error says what to write instead."""

import importlib

import pytest

from nomic_jax.train.config import ConfigurationError, TrainConfig
from nomic_jax.train.defaults import apply_variant, base_config

STAGES = ("mlm", "contrastive", "finetune")


def values(stage="mlm", variant="debug"):
    return importlib.import_module(f"configs.{stage}").get_config(variant).to_dict()


@pytest.mark.parametrize(
    ("stage", "variant"),
    [(stage, variant) for stage in STAGES for variant in importlib.import_module(f"configs.{stage}").VARIANTS],
)
def test_every_variant_is_a_configuration(stage, variant):
    config = TrainConfig.from_mapping(values(stage, variant))
    config.check(8 if variant == "paper" else 1)
    config.check_lengths(config.model)


@pytest.mark.parametrize("variant", importlib.import_module("configs.distillation").VARIANTS)
def test_every_variant_of_distillation_is_a_configuration(variant):
    config = TrainConfig.from_mapping(values("distillation", variant))
    config.check(1)
    config.check_lengths(config.model)


def test_paper_variants_are_the_recipe():
    mlm, contrastive, finetune = (TrainConfig.from_mapping(values(stage, "paper")) for stage in STAGES)
    assert (mlm.batch_size, mlm.steps, mlm.optim.lr, mlm.data.mask_rate) == (4096, 100_000, 5e-4, 0.3)
    assert (mlm.optim.b2, mlm.optim.eps, mlm.optim.warmup, mlm.optim.clip_norm) == (0.98, 1e-6, 0.06, 0)
    assert (contrastive.batch_size, contrastive.epochs, contrastive.optim.lr) == (16_384, 1.0, 2e-4)
    assert (contrastive.loss.temperature, contrastive.optim.warmup) == (0.02, 700)
    assert (contrastive.optim.decay, contrastive.loss.bidirectional) == ("inverse_sqrt", False)
    assert (finetune.batch_size, finetune.data.num_negatives, finetune.optim.lr) == (256, 7, 2e-5)
    assert {config.model.dtype for config in (mlm, contrastive, finetune)} == {"bfloat16"}
    assert {config.model.hidden_size for config in (mlm, contrastive, finetune)} == {768}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["optim"].update(learning_rat=1.0), "config.optim has no field 'learning_rat'"),
        (lambda v: v["model"].update(hiden_size=1), "did you mean config.model.hidden_size"),
        (lambda v: v["data"].pop("seq_len"), "config.data.seq_len is missing"),
        (lambda v: v["optim"].update(decay="cosin"), "config.optim.decay is 'cosin'; write one of linear"),
        (lambda v: v.update(batch_size="16"), "config.batch_size is '16'; it should be of type int"),
        (lambda v: v["model"].update(num_heads=3), "num_heads 3; choose num_heads among the divisors"),
        (lambda v: v["model"].update(dtype="float8"), "model.dtype is 'float8'; write one of auto, float32"),
        (lambda v: v.update(stage="pretrain"), "config.stage is 'pretrain'"),
    ],
)
def test_a_field_that_cannot_be_read(change, message):
    fields = values()
    change(fields)
    with pytest.raises(ConfigurationError, match=message):
        TrainConfig.from_mapping(fields)


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("mlm", {"batch_size": 20}, "cannot be dealt to 8 devices; write 16 or 24"),
        ("mlm", {"batch_size": 20, "accumulate": 4}, "8 devices x 4 micro-batches; write 32"),
        ("mlm", {"log_every": 0}, "log_every must be at least 1"),
        ("contrastive", {"accumulate": 2}, "write config.data.layout=bucketed"),
    ],
)
def test_values_that_cannot_work_together(stage, change, message):
    with pytest.raises(ConfigurationError, match=message):
        TrainConfig.from_mapping(values(stage) | change).check(8)


def test_rows_longer_than_the_model():
    fields = values()
    fields["data"]["seq_len"] = 4096
    config = TrainConfig.from_mapping(fields)
    with pytest.raises(ConfigurationError, match=r"config\.data\.seq_len is 4096; the model trains on 3 to 2048"):
        config.check_lengths(config.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"temperature": 0.001, "learn_temperature": True}, "a learnt one starts at 0.01 or above"),
        ({"matryoshka_dims": (64, 1024)}, "matryoshka_dims holds 1024; write 1 to 64"),
        ({"matryoshka_dims": (64,), "matryoshka_weights": (1.0, 1.0)}, "2 values for 1 dims"),
        ({"column_tile": -1}, "column_tile is -1"),
    ],
)
def test_loss_options_that_cannot_work(change, message):
    fields = values("contrastive")
    fields["loss"].update(change)
    config = TrainConfig.from_mapping(fields)
    with pytest.raises(ConfigurationError, match=message):
        config.check_lengths(config.model)


def test_an_unknown_variant_names_the_others():
    with pytest.raises(ValueError, match=":paper, :debug, :quickstart"):
        values("mlm", "papr")


@pytest.mark.parametrize("field", ["optim.learning_rat", "optimizer.lr", "steps.all", "lr"])
def test_a_variant_cannot_add_a_field(field):
    with pytest.raises(ValueError, match=f"variant :mine changes config.{field}, but there is no such field"):
        apply_variant(base_config("mlm"), {"mine": {field: 1e-3}}, "mine")


def test_a_variant_changes_only_its_own_fields():
    config = base_config("mlm").to_dict()
    changed = apply_variant(base_config("mlm"), {"mine": {"steps": 7, "model.num_layers": 3}}, "mine").to_dict()
    assert changed == config | {"steps": 7, "model": config["model"] | {"num_layers": 3}}
