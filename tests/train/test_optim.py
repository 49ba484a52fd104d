"""The optimizer against torch's AdamW, and the schedules against their definitions."""

import dataclasses

import numpy as np
import pytest

from nomic_jax.train.config import OptimConfig
from nomic_jax.train.optim import decay_mask, learning_rate, make_optimizer

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


def test_ten_steps_equal_torch_adamw_with_clipping():
    torch = pytest.importorskip("torch", reason="the optimizer is compared with torch's; torch is not installed")
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(4, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}
    gradients = [
        {name: 3 * rng.normal(size=x.shape).astype(np.float32) for name, x in start.items()} for _ in range(10)
    ]
    schedule = learning_rate(CONFIG, 10)
    optimizer = make_optimizer(CONFIG, schedule)
    params, state = dict(start), optimizer.init(start)
    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    groups = [
        {"params": [theirs["kernel"]], "weight_decay": CONFIG.weight_decay},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(CONFIG.b1, CONFIG.b2), eps=CONFIG.eps)
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update(gradient, state, params)
        params = {name: params[name] + updates[name] for name in params}
        for group in adamw.param_groups:
            group["lr"] = float(schedule(step))
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), CONFIG.clip_norm)
        adamw.step()
    for name in start:
        np.testing.assert_allclose(params[name], theirs[name].detach().numpy(), rtol=2e-5, atol=1e-6)
