"""The training state and the one step that every stage takes."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nomic_jax.train.sharding import DATA, replicated
from nomic_jax.train.stages import Stage


class TrainState(NamedTuple):
    """Attributes: step: optimizer steps taken, int32; params and optimizer state: float32."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def init_state(
    key: jax.Array, stage: Stage, optimizer: optax.GradientTransformation, mesh: Mesh, pretrained: dict
) -> TrainState:
    """A fresh state on the mesh; ``pretrained`` replaces the random values of the top-level entries it has."""

    def init(key: jax.Array, pretrained: dict) -> TrainState:
        params = stage.init(key) | pretrained
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=replicated(mesh))(key, jax.device_put(pretrained, replicated(mesh)))


TrainStep = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    stage: Stage, optimizer: optax.GradientTransformation, mesh: Mesh, accumulate: int = 1
) -> TrainStep:
    """The jitted step (state, rows) -> (state, metrics); the state is donated.

    Each device computes the gradient of its own rows' sums, micro-batch by micro-batch in float32; one reduction adds
    them up over devices; one division makes them the global mean's.
    """

    def value_and_gradient(params: dict, rows: dict[str, jax.Array]):
        def loss(params):
            sums = stage.loss(params, rows)
            return sums.loss, sums

        gradient, sums = jax.grad(loss, has_aux=True)(params)
        return sums, gradient

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P())
    def global_sums(params: dict, rows: dict[str, jax.Array]):
        # Marked as varying over devices, the parameters' gradient stays local until the one psum below.
        params = jax.tree.map(lambda x: jax.lax.pcast(x, DATA, to="varying"), params)
        micro_batches = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), rows)
        first = value_and_gradient(params, jax.tree.map(lambda x: x[0], micro_batches))
        if accumulate == 1:
            return jax.lax.psum(first, DATA)

        def add(total, micro_batch):
            return jax.tree.map(jnp.add, total, value_and_gradient(params, micro_batch)), None

        total, _ = jax.lax.scan(add, first, jax.tree.map(lambda x: x[1:], micro_batches))
        return jax.lax.psum(total, DATA)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, rows: dict[str, jax.Array]):
        sums, gradient = global_sums(state.params, rows)
        gradient = jax.tree.map(lambda x: x / sums.weight, gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": sums.loss / sums.weight, "grad_norm": optax.tree.norm(gradient)}
        metrics |= {name: value / sums.weight for name, value in sums.metrics.items()}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step
