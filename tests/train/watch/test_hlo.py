"""Reading compiled HLO; a step moves the number of bytes that the formula of benchmarks/collectives.py gives."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.collectives import counted
from nomic_jax.train.sharding import DATA, make_mesh
from nomic_jax.train.watch.hlo import (
    Collective,
    MissingKernel,
    collectives,
    fused_attention_calls,
    require_fused_attention,
)

# Lines in the form that XLA prints for a GPU.
FORWARD = (
    '%c.1 = (bf16[2,12,256,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax"'
)
BACKWARD = FORWARD.replace("fmhaSoftmax", "fmhaSoftmaxBackward")
DENSE = '%d.1 = f32[2,12,256,256]{3,2,1,0} custom-call(%q, %k), custom_call_target="__cublas$gemm"'


def test_a_step_without_the_fused_kernel_is_refused():
    assert fused_attention_calls("\n".join([FORWARD, FORWARD, BACKWARD, DENSE])) == {
        "__cudnn$fmhaSoftmax": 2,
        "__cudnn$fmhaSoftmaxBackward": 1,
    }
    require_fused_attention("\n".join([FORWARD, BACKWARD]))
    for text, missing in ((DENSE, "forward"), (BACKWARD, "forward"), (FORWARD, "backward")):
        with pytest.raises(MissingKernel, match=missing):
            require_fused_attention(text)


def test_collectives_are_those_of_the_whole_arrays():
    hlo = """
HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (x: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} all-reduce(%x), replica_groups={}, to_apply=%add
}

%body (x: f32[4]) -> f32[4] {
  ROOT %w = f32[4]{0} while(%x), condition=%always, body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}
}

%branch (x: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1}}
}

%endless (x: f32[4]) -> f32[4] {
  ROOT %e = f32[4]{0} all-reduce(%x), to_apply=%add
}

ENTRY %main (a: f32[2,8]) -> f32[4] {
  %g = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%a), dimensions={0}
  %s = bf16[2,8]{1,0} reduce-scatter(%b), dimensions={0}
  %d = f32[16,8]{1,0} all-gather-done(%g)
  %t = ((bf16[16,8]{1,0}), bf16[2,8]{1,0}) reduce-scatter-start(%b), dimensions={0}
  %w = f32[4]{0} while(%x), condition=%always, body=%body, backend_config={"known_trip_count":{"n":"5"},"x":{}}
  %u = f32[4]{0} while(%w), condition=%always, body=%endless
  ROOT %c = f32[4]{0} conditional(%i, %u, %u), branch_computations={%nothing, %branch}
}
"""
    assert collectives(hlo, 8) == [
        Collective("all-reduce", 16, 15),
        Collective("collective-permute", 16, 1),
        Collective("all-reduce", 16, None),
        Collective("all-gather", 512, 1),
        Collective("reduce-scatter", 256, 1),
        Collective("reduce-scatter", 256, 1),
    ]


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_goes_round():
    mesh = make_mesh()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA))
    def step(x):
        def body(x, _):
            return x + jax.lax.psum(x, DATA), None

        return jax.lax.scan(body, x, None, length=7)[0]

    text = jax.jit(step).lower(jax.ShapeDtypeStruct((16, 4), jnp.float32)).compile().as_text()
    assert collectives(text, 8) == [Collective("all-reduce", 2 * 4 * 4, 7)]


SMALL = dict(hidden_size=64, num_heads=2, intermediate_size=256, vocab_size=512, dtype="float32")


DEFAULT = {("mlm", "replicated"), ("contrastive", "zero1"), ("finetune", "fsdp")}
OTHERS = pytest.mark.exhaustive(reason="the pairs of the default suite cover each stage and each sharding")


@pytest.mark.parametrize(
    ("stage", "sharding"),
    [
        pytest.param(*pair, marks=() if pair in DEFAULT else OTHERS)
        for pair in itertools.product(("mlm", "contrastive", "finetune"), ("replicated", "zero1", "fsdp"))
    ],
)
def test_a_step_moves_what_the_formula_says(stage, sharding):
    count = counted(stage, sharding, layers=1, rows=16, **SMALL)
    assert count["devices"] == 8 and not count["in_loops"]
    assert count["bytes"] == count["expected"]
