"""What is read off compiled HLO, and that a step moves the bytes that the formula of benchmarks/collectives.py says."""

import pytest

from benchmarks.collectives import counted
from nomic_jax.train.hlo import Collective, MissingKernel, collectives, fused_attention_calls, require_fused_attention

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
%body (x: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%x), replica_groups={}
}

ENTRY %main {
  %g = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%a), dimensions={0}
  %s = bf16[2,8]{1,0} reduce-scatter(%b), dimensions={0}
  %d = f32[16,8]{1,0} all-gather-done(%g)
}
"""
    assert collectives(hlo, 8) == [
        Collective("all-reduce", 16, False),
        Collective("all-gather", 512, True),
        Collective("reduce-scatter", 256, True),
    ]


SMALL = dict(hidden_size=64, num_heads=2, intermediate_size=256, vocab_size=512, dtype="float32")


@pytest.mark.parametrize("stage", ["mlm", "contrastive", "finetune"])
@pytest.mark.parametrize("sharding", ["replicated", "zero1", "fsdp"])
def test_a_step_moves_what_the_formula_says(stage, sharding):
    count = counted(stage, sharding, layers=1, rows=16, **SMALL)
    assert count["devices"] == 8 and not count["in_loops"]
    assert count["bytes"] == count["expected"]
