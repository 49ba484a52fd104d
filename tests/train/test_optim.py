"""The optimizer against torch's AdamW, and the schedules against their definitions."""

import dataclasses

import jax
import numpy as np
import pytest

from nomic_jax.train.config import ConfigurationError, OptimConfig
from nomic_jax.train.optim import decay_mask, learning_rate, make_optimizer
from nomic_jax.train.optim.adamw import DECAYED

CONFIG = OptimConfig(lr=1e-2, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.1, clip_norm=1.0, warmup=4.0, decay="linear")


@pytest.mark.parametrize(
    ("decay", "at_30"), [("linear", 0.5), ("cosine", 0.5), ("inverse_sqrt", (10 / (10 + 20)) ** 0.5)]
)
def test_schedules(decay, at_30):
    schedule = learning_rate(dataclasses.replace(CONFIG, warmup=10.0, decay=decay), 50)
    rates = np.array([float(schedule(step)) for step in range(51)])
    np.testing.assert_allclose(rates[:10], CONFIG.lr * np.arange(1, 11) / 10, rtol=1e-5)
    assert rates[10] == pytest.approx(CONFIG.lr, rel=1e-5)
    assert rates[30] == pytest.approx(CONFIG.lr * at_30, rel=1e-5)
    assert (np.diff(rates[10:]) < 0).all()
    if decay != "inverse_sqrt":
        assert rates[50] == pytest.approx(0, abs=1e-8)


def test_warm_up_may_be_a_share_of_the_steps():
    share, steps = (learning_rate(dataclasses.replace(CONFIG, warmup=w), 100) for w in (0.06, 6.0))
    assert [float(share(i)) for i in range(100)] == [float(steps(i)) for i in range(100)]


def test_only_matrices_and_embeddings_decay():
    params = {"a": {"kernel": 0, "bias": 0}, "norm": {"scale": 0, "bias": 0}, "word": {"embedding": 0}}
    assert decay_mask(params) == {
        "a": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
        "word": {"embedding": True},
    }


def assert_ten_steps_equal_torch(config, start, groups_of):
    """Compares with torch's AdamW: ``groups_of`` (name -> parameter) are its groups, each with a share "factor"."""
    torch = pytest.importorskip("torch", reason="the optimizer is compared with torch's; torch is not installed")
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten_with_path(start)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    gradients = [[3 * rng.normal(size=x.shape).astype(np.float32) for _, x in leaves] for _ in range(10)]
    schedule = learning_rate(config, 10)
    optimizer = make_optimizer(config, schedule)
    params, state = start, optimizer.init(start)
    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, (_, x) in zip(names, leaves)}
    adamw = torch.optim.AdamW(groups_of(theirs), betas=(config.b1, config.b2), eps=config.eps)
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update(jax.tree.unflatten(structure, gradient), state, params)
        params = jax.tree.map(np.add, params, updates)
        for group in adamw.param_groups:
            group["lr"] = group.get("factor", 1.0) * float(schedule(step))
        for parameter, own in zip(theirs.values(), gradient):
            parameter.grad = torch.tensor(own)
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), config.clip_norm)
        adamw.step()
    for parameter, ours in zip(theirs.values(), jax.tree.leaves(params)):
        np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_ten_steps_equal_torch_adamw_with_clipping():
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(4, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}
    assert_ten_steps_equal_torch(
        CONFIG,
        start,
        lambda theirs: [
            {"params": [theirs["kernel"]], "weight_decay": CONFIG.weight_decay},
            {"params": [theirs["bias"]], "weight_decay": 0.0},
        ],
    )


def test_layer_decay_equals_torch_adamw_with_a_group_for_each_layer():
    rng = np.random.default_rng(0)

    def linear():
        return {"kernel": rng.normal(size=(4, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}

    layers = {i: {"mlp": {"up": linear()}, "norm1": {"scale": np.ones(3, np.float32)}} for i in range(2)}
    start = {"encoder": {"embeddings": {"word": {"embedding": linear()["kernel"]}}, "layers": layers}}
    start |= {"classifier": {"out": linear()}, "temperature": {"log_scale": np.float32(3.0)}}
    factors = {"encoder.embeddings": 0.5**3, "encoder.layers.0": 0.5**2, "encoder.layers.1": 0.5}
    factors |= {"classifier": 1.0, "temperature": 1.0}

    def groups_of(theirs):
        return [
            {"params": [x], "factor": factor, "weight_decay": CONFIG.weight_decay if name.endswith(DECAYED) else 0.0}
            for name, x in theirs.items()
            for prefix, factor in factors.items()
            if name.startswith(prefix)
        ]

    assert_ten_steps_equal_torch(dataclasses.replace(CONFIG, layer_decay=0.5), start, groups_of)
    # Checkpoints of runs without it have the state that they always had.
    states = [make_optimizer(dataclasses.replace(CONFIG, layer_decay=d), lambda _: 0.0).init(start) for d in (1.0, 0.5)]
    assert len(states[0]) == 4 and jax.tree.leaves(states[1][4:]) == []


@pytest.mark.parametrize("factor", [0.0, 1.5])
def test_a_layer_decay_that_cannot_work(factor):
    with pytest.raises(ConfigurationError, match=f"config.optim.layer_decay is {factor:g}; write a factor above 0"):
        dataclasses.replace(CONFIG, layer_decay=factor).check()
