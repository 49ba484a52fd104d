"""What a run chooses for "auto": from the settings and the device, once, and by hand where it is set."""

import pytest

from nomic_jax.fitting.named_configs import get_config
from nomic_jax.model import EmbeddingConfig, EncoderConfig
from nomic_jax.train import choices
from nomic_jax.train.config import TrainConfig


def settings(name="contrastive:own", **changes):
    values = get_config(name)
    values.update_from_flattened_dict(changes)
    return TrainConfig.from_mapping(values.to_dict())


def chosen(config, record=None, devices=1):
    said = []
    config = choices.make_choices(config, record, devices, said.append)
    return config.model.dtype, getattr(config.data, "layout", None), said


@pytest.mark.parametrize(
    ("backend", "kernel", "changes", "want"),
    [
        ("gpu", "cudnn_packed", {}, ("bfloat16", "packed")),
        ("gpu", "xla", {}, ("bfloat16", "bucketed")),  # a GPU without packed flash attention
        ("gpu", "cudnn_packed", {"batch_size": 16}, ("bfloat16", "padded")),
        ("cpu", "cpu", {"batch_size": 16}, ("float32", "packed")),
        ("cpu", "cpu", {}, ("float32", "packed")),
        ("cpu", "cpu", {"data.document_length": 2048}, ("float32", "bucketed")),
        ("cpu", "cpu", {"data.layout": "padded", "model.dtype": "bfloat16"}, ("bfloat16", "padded")),
    ],
)
def test_the_choice_follows_from_settings_and_device(monkeypatch, backend, kernel, changes, want):
    asked = []
    monkeypatch.setattr(choices, "traced_platform", lambda: backend)
    monkeypatch.setattr(choices, "choose", lambda dtype, **options: asked.append(dtype) or kernel)
    dtype, layout, said = chosen(settings(**changes))
    assert (dtype, layout) == want
    assert all(each == dtype for each in asked)  # of the dtype that is computed in
    assert len(said) == ("data.layout" not in changes)
    assert not said or said[0] == f"contrastive: model.dtype={dtype}, data.layout={layout} (for {backend})"


def test_a_batch_over_more_devices_is_smaller(monkeypatch):
    monkeypatch.setattr(choices, "choose", lambda dtype, **options: "cudnn_packed")
    assert chosen(settings(batch_size=64))[1] == "packed"
    assert chosen(settings(batch_size=64), devices=4)[1] == "padded"


def test_a_resumed_run_keeps_what_it_chose(monkeypatch):
    record = {"config": {"model": {"dtype": "bfloat16"}, "data": {"layout": "bucketed"}}}
    dtype, layout, said = chosen(settings(), record)
    assert (dtype, layout) == ("bfloat16", "bucketed") and said[0].endswith("(as the run began)")
    assert chosen(settings(**{"data.layout": "packed"}), record)[1] == "packed"
    # A masked-LM has no layout.
    assert chosen(settings("mlm:own"))[:2] == ("float32", None)


def test_a_resumed_run_keeps_its_norm_kernel(monkeypatch):
    def chosen(record=None, kernel="auto", others=()):
        model = EmbeddingConfig(EncoderConfig(norm_kernel=kernel))
        return choices.choose_norm_kernel(model, record, lambda text: [text, *others]).encoder.norm_kernel

    assert chosen() == "xla" and chosen(kernel="triton") == "triton"
    monkeypatch.setattr(choices.norm, "choose", lambda encoder: "triton")
    assert chosen() == "triton"
    assert chosen({"model": {"encoder": {"norm_kernel": "xla"}}}) == "xla"
    assert chosen({"model": {"encoder": {"hidden_size": 768}}}) == "xla"  # of before the kernel
    assert chosen(others=["triton"]) == "triton"
    assert chosen(others=["xla"]) == "xla"  # another process has another GPU
