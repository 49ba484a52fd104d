"""AdamW with the decay mask and the schedules of the recipe."""

import jax
import jax.numpy as jnp
import optax

from nomic_jax.train.optim.settings import OptimConfig

# No decay on norms, biases and scalars; embeddings are decayed.
DECAYED = ("kernel", "embedding")


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then the decay, by optimizer steps (not micro-batches)."""
    warmup = round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)
    warmup = min(warmup, steps)
    rest = max(steps - warmup, 1)
    if config.decay == "linear":
        decay = optax.linear_schedule(config.lr, 0.0, rest)
    elif config.decay == "cosine":
        decay = optax.cosine_decay_schedule(config.lr, rest)
    else:
        start = max(warmup, 1)

        def decay(step):
            # join_schedules evaluates every part at every step, so this one at negative steps too.
            return config.lr * (start / (start + jnp.maximum(step, 0))) ** 0.5

    # The first step has a positive rate: a warm-up from exactly 0 would discard its gradient.
    return optax.join_schedules([lambda step: config.lr * (step + 1) / max(warmup, 1), decay], [warmup])


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    adamw = (
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    if config.layer_decay == 1:
        return optax.chain(*adamw)

    def scaled(updates: dict, params: dict | None) -> dict:
        return jax.tree.map(lambda update, factor: factor * update, updates, rate_factors(updates, config.layer_decay))

    return optax.chain(*adamw, optax.stateless(scaled))


def rate_factors(params: dict, layer_decay: float) -> dict:
    """Returns the factor of the learning rate of every leaf: layer-wise decay (ELECTRA, arXiv:2003.10555; BEiT).

    Of N layers, the embeddings (and MPNet's table of relative positions) get ``layer_decay ** (N + 1)``, layer i of
    0 ... N - 1 gets ``layer_decay ** (N - i)``, and heads, a learnt temperature and all else 1. The weight decay
    shrinks with the rate, as in groups of torch's AdamW.
    """

    def depth(path: tuple) -> int | None:
        names = [key.key for key in path]
        if "layers" in names:
            return int(names[names.index("layers") + 1]) + 1
        return None if {"embeddings", "relative"}.isdisjoint(names) else 0

    depths = jax.tree.map_with_path(lambda path, _: depth(path), params)
    top = 1 + max(jax.tree.leaves(depths), default=0)  # None is no leaf
    return jax.tree.map(
        lambda depth: 1.0 if depth is None else layer_decay ** (top - depth), depths, is_leaf=lambda x: x is None
    )


def decay_mask(params: dict) -> dict:
    """True for every leaf that weight decay acts on."""
    return jax.tree.map_with_path(lambda path, _: str(path[-1].key) in DECAYED, params)
