"""The kernels of a program: bytes, FLOPs and times of each form, counted by hand; and against XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from nomic_jax.train.planning.kernels import (
    Loops,
    Rates,
    UnknownTurns,
    kernels_of,
    repeating_scatters,
    totals,
)
from nomic_jax.train.planning.targets import GPUS, MissingCompiler, absent_gpus, gpu_of
from nomic_jax.train.watch.hlo import read_program

# Powers of ten, so that each part of a time shows in its own digits.
RATES = Rates(
    bytes=1e9,
    copied_bytes=1e8,
    flops=1e12,
    attention_flops=1e11,
    link_bytes=1e6,
    launch=1e-3,
    forward_block=1.0,
    backward_block=10.0,
)
# In the form that XLA prints for a GPU, without what nobody reads.
HLO = """
HloModule jit_step

%fused_update (p.0: f32[5,4,8], p.1: f32[4,8], p.2: s32[]) -> f32[5,4,8] {
  %p.0 = f32[5,4,8]{2,1,0} parameter(0)
  %p.1 = f32[4,8]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %b.1 = f32[1,4,8]{2,1,0} bitcast(%p.1)
  %z.1 = s32[] constant(0)
  ROOT %u.1 = f32[5,4,8]{2,1,0} dynamic-update-slice(%p.0, %b.1, %p.2, %z.1, %z.1)
}

%fused_product (p.3: bf16[4,8], p.4: bf16[8,16]) -> bf16[4,16] {
  %p.3 = bf16[4,8]{1,0} parameter(0)
  %p.4 = bf16[8,16]{1,0} parameter(1)
  ROOT %d.1 = bf16[4,16]{1,0} dot(%p.3, %p.4), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_gather (p.5: f32[1000,8], p.6: s32[4,1]) -> f32[4,8] {
  %p.5 = f32[1000,8]{1,0} parameter(0)
  %p.6 = s32[4,1]{1,0} parameter(1)
  ROOT %g.1 = f32[4,8]{1,0} gather(%p.5, %p.6), offset_dims={1}, slice_sizes={1,8}
}

%fused_scatter (p.7: f32[1000,8], p.8: s32[4,1], p.9: f32[4,8]) -> f32[1000,8] {
  %p.7 = f32[1000,8]{1,0} parameter(0)
  %p.8 = s32[4,1]{1,0} parameter(1)
  %p.9 = f32[4,8]{1,0} parameter(2)
  ROOT %s.1 = f32[1000,8]{1,0} scatter(%p.7, %p.8, %p.9), unique_indices=UNIQUE, to_apply=%add
}

%large (x.1: f32[8]) -> f32[8] {
  ROOT %large.1 = f32[8]{0} negate(%x.1)
}

%small (x.2: f32[8]) -> f32[8] {
  ROOT %small.1 = f32[2]{0} negate(%x.2)
}

%body (t.1: f32[5,4,8]) -> f32[5,4,8] {
  %a.1 = f32[5,4,8]{2,1,0} parameter(0)
  %a.2 = f32[4,8]{1,0} constant({...})
  %a.3 = s32[] constant(0)
  ROOT %f.1 = f32[5,4,8]{2,1,0} fusion(%a.1, %a.2, %a.3), kind=kLoop, calls=%fused_update
}

ENTRY %main (x: f32[5,4,8]) -> f32[5,4,8] {
  %x = f32[5,4,8]{2,1,0} parameter(0)
  %i = s32[] constant(0)
  %q = bf16[4,8]{1,0} constant({...})
  %k = bf16[8,16]{1,0} constant({...})
  %e = f32[1000,8]{1,0} constant({...})
  %n = s32[4,1]{1,0} constant({...})
  %v = f32[4,8]{1,0} constant({...})
  %h = bf16[2,256,3,64]{3,2,1,0} constant({...})
  %o = s32[2,32]{1,0} constant({...})
  %w.1 = f32[5,4,8]{2,1,0} while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %w.2 = f32[5,4,8]{2,1,0} while(%w.1), condition=%c, body=%body, metadata={op_name="jit(step)/jvp(kept_chunks)/while"}
  %f.2 = bf16[4,16]{1,0} fusion(%q, %k), kind=kCustom, calls=%fused_product
  %f.3 = f32[4,8]{1,0} fusion(%e, %n), kind=kLoop, calls=%fused_gather
  %f.4 = f32[1000,8]{1,0} fusion(%e, %n, %v), kind=kInput, calls=%fused_scatter
  %m.1 = (bf16[2,3,256,64]{3,2,1,0}, u8[100]{0}) custom-call(%h, %h, %h), custom_call_target="__cudnn$fmhaSoftmax"
  %m.2 = (bf16[2,3,256,64]{3,2,1,0}, u8[0]{0}) custom-call(%h, %h, %h, %o), custom_call_target="__cudnn$fmhaSoftmax"
  %c.1 = f32[8]{0} conditional(%i, %v, %v), branch_computations={%large, %small}
  %r.1 = f32[16]{0} all-reduce-start(%v), replica_groups={}, to_apply=%add
  ROOT %r.2 = f32[16]{0} all-reduce-done(%r.1)
}
"""


def kernels(loops, unique="true", devices=1):
    found = kernels_of(read_program(HLO.replace("UNIQUE", unique)), RATES, loops, devices)
    return {f"{each.name} {each.shape}": each for each in found}


def test_each_form_of_a_kernel_is_charged_what_it_touches():
    found = kernels(Loops({"kept_chunks": 7.0}), devices=4)
    by_name = {name.split(" ")[0]: kernel for name, kernel in found.items()}
    # The last loop's: an update reads and writes 4 x 8 numbers, and reads the place.
    update = by_name["fused_update"]
    assert (update.kind, update.times, update.bytes) == ("copies", 7, 7 * (2 * 128 + 4))
    assert update.seconds == pytest.approx(7 * (260 / 1e8 + 1e-3))
    product = by_name["fused_product"]
    assert (product.kind, product.flops, product.bytes) == ("products", 2 * 4 * 16 * 8, 2 * (32 + 128 + 64))
    assert by_name["fused_gather"].bytes == 2 * 128 + 16
    assert by_name["fused_scatter"].bytes == 3 * 128 + 16  # what is there, what is added, and the sums
    reduction = by_name["all-reduce-start"]
    assert reduction.kind == "collectives"
    assert reduction.seconds == pytest.approx((64 + 128) / 1e9 + 2 * 64 * 3 / 4 / 1e6 + 1e-3)
    all_ = totals(list(found.values()))["all"]
    assert all_.seconds == pytest.approx(sum(kernel.seconds for kernel in found.values()))


def test_attention_is_charged_by_the_lengths_of_the_texts_where_rows_hold_several():
    dense = 4 * 2 * 256 * 256 * 3 * 64
    for loops, products in ((Loops({"": 1}), 0.0), (Loops({"": 1}, (), 50.0), 4 * 2 * 256 * 50 * 3 * 64)):
        one_text, packed = (kernel for kernel in kernels(loops).values() if kernel.kind == "attention")
        assert one_text.flops == dense and packed.flops == products
        size = 2 * 2 * 256 * 3 * 64
        assert one_text.bytes == 4 * size  # without the scratch memory
        # 2 rows, 32 texts each, 3 heads, 2 blocks of queries
        assert packed.seconds == pytest.approx((4 * size + 256) / 1e9 + 2 * 32 * 3 * 2 + 1e-3)


def test_branches_count_by_their_shares_or_the_dearest():
    assert "negate f32[2]{0}" not in kernels(Loops({"": 1}))
    both = kernels(Loops({"": 1}, (0.25, 0.75)))
    assert [both[f"negate f32[{size}]{{0}}"].times for size in (8, 2)] == [0.25, 0.75]


def test_a_loop_of_unknown_turns_is_an_error():
    with pytest.raises(UnknownTurns, match="kept_chunks"):
        kernels(Loops({"recomputed_chunks": 3}))


def test_scatters_of_floats_with_repeating_indices_are_found():
    assert not repeating_scatters(read_program(HLO.replace("UNIQUE", "true")))
    assert [each.name for each in repeating_scatters(read_program(HLO.replace("UNIQUE", "false")))] == ["s.1"]


def test_flops_of_products_are_those_that_xla_counts():
    def loss(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return jnp.sum(x)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (128, 256), (256, 32))]
    x = jax.ShapeDtypeStruct((512, 64), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(shapes, x).compile()
    flops = totals(kernels_of(read_program(compiled.as_text()), RATES, Loops()))["all"].flops
    assert flops == 2 * 512 * (3 * (64 * 128 + 128 * 256 + 256 * 32) - 64 * 128)
    assert flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)  # XLA adds tanh and sums


def test_without_the_compiler_the_error_says_what_to_install():
    try:
        devices = absent_gpus("h100", 2)
    except MissingCompiler as error:
        assert "pip install 'nomic_jax[cuda12]'" in str(error)
    else:
        assert len(devices) == 2 and gpu_of(devices[0].device_kind) == GPUS["h100"]


def test_every_gpu_has_rates_below_its_data_sheet():
    for gpu in GPUS.values():
        assert 0.5 * gpu.bandwidth < gpu.rates.copied_bytes < gpu.rates.bytes < gpu.bandwidth
        assert gpu.rates.attention_flops < gpu.rates.flops
