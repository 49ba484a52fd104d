"""The training state and the one step that every stage takes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nomic_jax.cpu import compiler_options
from nomic_jax.train.objectives.stage import Stage
from nomic_jax.train.optim.ema import start_average, update_average
from nomic_jax.train.sharding import DATA, Sharding, divided, replicated, whole

# Options of XLA for the same bits in every run on a GPU: no atomic additions, cuDNN's deterministic backward pass of
# attention, and no choice of kernels by their time, which differs from process to process.
DETERMINISTIC = {"xla_gpu_deterministic_ops": True}


class TrainState(NamedTuple):
    """Attributes:
    step: number of steps, skipped ones included, int32.
    params, opt_state: float32.
    ema: the moving average of ``params``, float32; None without ``config.optim.ema``.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    ema: dict | None = None

    def to_checkpoint(self, base: dict | None = None) -> dict[str, Any]:
        """The trees that a checkpoint holds, see ``nomic_jax.run.checkpoints``; with an adapter, its ``base`` too."""
        params = self.params if base is None else self.params | {"encoder": base}
        trees = {"params": params, "training": {"step": self.step, "opt_state": self.opt_state}}
        return trees if self.ema is None else trees | {"ema": self.ema}

    @classmethod
    def from_checkpoint(cls, trees: dict[str, Any]) -> "TrainState":
        params, training = trees["params"], trees["training"]
        if "lora" in params:
            params = {name: part for name, part in params.items() if name != "encoder"}
        return cls(training["step"], params, training["opt_state"], trees.get("ema"))

    @property
    def to_use(self) -> dict:
        """The weights that are evaluated: the average if there is one."""
        return self.params if self.ema is None else self.ema


def init_state(
    key: jax.Array,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    pretrained: dict,
    sharding: Sharding = "replicated",
    ema: float = 0.0,
) -> TrainState:
    """A new state on the mesh. Top-level entries of ``pretrained`` replace the random values."""

    def init(key: jax.Array, pretrained: dict) -> TrainState:
        return _new_state(stage, optimizer, key, pretrained, ema)

    specs = state_specs(jax.eval_shape(init, key, pretrained), mesh, sharding)
    out_shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.jit(init, out_shardings=out_shardings)(key, jax.device_put(pretrained, replicated(mesh)))


def abstract_state(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    sharding: Sharding = "replicated",
    ema: float = 0.0,
) -> TrainState:
    """The state of ``init_state`` as ``jax.ShapeDtypeStruct``: the shapes, types and places of its arrays."""

    def init(key: jax.Array) -> TrainState:
        return _new_state(stage, optimizer, key, {}, ema)

    state = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        state,
        state_specs(state, mesh, sharding),
    )


def _new_state(
    stage: Stage, optimizer: optax.GradientTransformation, key: jax.Array, pretrained: dict, ema: float
) -> TrainState:
    params = stage.init(key) | pretrained
    average = start_average(params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def state_specs(state: TrainState, mesh: Mesh, sharding: Sharding) -> Any:
    """The state with a PartitionSpec for every array."""
    params = divided(state.params, mesh) if sharding == "fsdp" else whole(state.params)
    opt_state, ema = (
        whole(tree) if sharding == "replicated" else divided(tree, mesh) for tree in (state.opt_state, state.ema)
    )
    return state._replace(step=P(), params=params, opt_state=opt_state, ema=ema)  # type: ignore[arg-type]


def make_train_step(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    accumulate: int = 1,
    sharding: Sharding = "replicated",
    deterministic: bool = False,
    ema: float = 0.0,
) -> jax.stages.Wrapped:
    """The jitted step (state, rows, the stage's frozen parameters if it has any) -> (state, metrics).

    The state is donated. Each device computes the gradient of the sums over its rows, micro-batch by micro-batch in
    float32. One reduction adds the gradients over devices, and one division gives the gradient of the global mean. A
    step whose loss or gradient is not finite changes neither parameters nor optimizer state (metric "skipped").
    With ``deterministic``, a GPU computes the same bits in every run (``DETERMINISTIC``). ``ema`` is the decay rate of
    the average in the state.
    """
    options = compiler_options(mesh.devices.flat[0].platform) | (DETERMINISTIC if deterministic else {})
    params = jax.eval_shape(stage.init, jax.random.key(0))
    param_specs = divided(params, mesh) if sharding == "fsdp" else whole(params)
    gradient_specs = whole(params) if sharding == "replicated" else divided(params, mesh)

    def value_and_gradient(params: dict, frozen: dict, rows: dict[str, jax.Array]):
        def loss(params):
            sums = stage.loss(params | frozen, rows)
            return sums.loss, sums

        gradient, sums = jax.grad(loss, has_aux=True)(params)
        return sums, gradient

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(param_specs, P(), P(DATA)), out_specs=(P(), gradient_specs))
    def global_sums(params: dict, frozen: dict, rows: dict[str, jax.Array]):
        # Marked as varying over devices, the parameters get a local gradient, until the one reduction below.
        params = jax.tree.map(_gather, params, param_specs)
        # Not -1: an array may have no elements.
        micro_batches = jax.tree.map(lambda x: x.reshape(accumulate, len(x) // accumulate, *x.shape[1:]), rows)
        sums, gradient = value_and_gradient(params, frozen, jax.tree.map(lambda x: x[0], micro_batches))
        if accumulate > 1:

            def add(total, micro_batch):
                return jax.tree.map(jnp.add, total, value_and_gradient(params, frozen, micro_batch)), None

            rest = jax.tree.map(lambda x: x[1:], micro_batches)
            (sums, gradient), _ = jax.lax.scan(add, (sums, gradient), rest)
        return jax.lax.psum(sums, DATA), _reduce(gradient, gradient_specs)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options or None)
    def train_step(state: TrainState, rows: dict[str, jax.Array], frozen: dict | None = None):
        state_before = state
        sums, gradient = global_sums(state.params, frozen or {}, rows)
        gradient = jax.tree.map(lambda x: x / sums.weight, gradient)
        loss, grad_norm = sums.loss / sums.weight, optax.tree.norm(gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params, average = optax.apply_updates(state.params, updates), state.ema
        if average is not None:
            average = update_average(average, params, _updates_before(state) + 1, ema)
        updated = TrainState(state.step, params, opt_state, average)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, state)
        specs = state_specs(state, mesh, sharding)
        state = jax.tree.map(
            lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)), state, specs
        )
        metrics = {"loss": loss, "grad_norm": grad_norm, "skipped": 1.0 - is_finite.astype(jnp.float32)}
        metrics["updates"] = _updates_before(state_before)
        metrics |= {name: value / sums.weight for name, value in sums.metrics.items()}
        return state._replace(step=state.step + 1), metrics

    return train_step


def _updates_before(state: TrainState) -> jax.Array:
    """The number of updates so far, at which the schedule gives the learning rate; skipped steps do not count."""
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    return counts[-1][1] if counts else state.step


def _gather(x: jax.Array, spec: P) -> jax.Array:
    if DATA in spec:
        return jax.lax.all_gather(x, DATA, axis=spec.index(DATA), tiled=True)
    return jax.lax.pcast(x, DATA, to="varying")


def _reduce(gradient: dict, specs: Any) -> dict:
    """Sums over devices: the whole sum on every device, or a part on each."""

    def reduce(x: jax.Array, spec: P) -> jax.Array:
        if DATA in spec:
            return jax.lax.psum_scatter(x, DATA, scatter_dimension=spec.index(DATA), tiled=True)
        return jax.lax.psum(x, DATA)

    return jax.tree.map(reduce, gradient, specs)
