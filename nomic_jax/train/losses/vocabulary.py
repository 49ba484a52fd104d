"""The cross-entropy of masked-LM over the whole vocabulary, without holding all logits.

With 39,000 predictions and 30,528 words, the logits are the largest arrays of a masked-LM step: reading and writing
them takes longer than computing them. Therefore predictions are taken in parts, and each part computes its logits once.
The loss is a number, so its gradient is computed together with it, and the backward pass only multiplies.
"""

import jax
import jax.numpy as jnp

from nomic_jax.model.varying import varying_as

PREDICTIONS_AT_A_TIME = 8192


def vocabulary_cross_entropy(
    hidden_TD: jax.Array, table_VD: jax.Array, target_T: jax.Array, bias_V: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of the cross-entropy and of correct predictions over tokens, float32.

    A prediction is correct if no logit is larger than the target's, and no equal one comes first.

    Args:
      hidden_TD: what the decoder multiplies, in the computation dtype. The logits have this dtype; sums are float32.
      table_VD: the decoder, float32.
      target_T: the token to predict; targets of -1 are ignored.
      bias_V: the decoder's bias, float32, if it has one.
    """
    bias_V = None if bias_V is None else varying_as(bias_V, target_T)
    return _sums(varying_as(hidden_TD, target_T), varying_as(table_VD, target_T), bias_V, target_T)


@jax.custom_vjp
def _sums(
    hidden_TD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None, target_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def part(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        loss, correct, _ = _part(*inputs, decoder_VD, bias_V)
        return loss, correct

    decoder_VD = table_VD.astype(hidden_TD.dtype)
    loss_N, correct_N = jax.lax.map(part, _in_parts(hidden_TD, target_T))
    return jnp.sum(loss_N), jnp.sum(correct_N)


def _forward(hidden_TD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None, target_T: jax.Array):
    decoder_VD = table_VD.astype(hidden_TD.dtype)

    def part(of_decoder: tuple[jax.Array, jax.Array | None], inputs: tuple[jax.Array, jax.Array]):
        of_table_VD, of_bias_V = of_decoder
        loss, correct, gradient_PV = _part(*inputs, decoder_VD, bias_V)
        of_table_VD += jnp.einsum("pv,pd->vd", gradient_PV, inputs[0], preferred_element_type=jnp.float32)
        if of_bias_V is not None:
            of_bias_V += jnp.sum(gradient_PV, axis=0, dtype=jnp.float32)
        return (of_table_VD, of_bias_V), (loss, correct, gradient_PV @ decoder_VD)

    parts = _in_parts(hidden_TD, target_T)
    zeros = jax.tree.map(lambda x: varying_as(jnp.zeros(x.shape, jnp.float32), hidden_TD), (table_VD, bias_V))
    if len(parts[1]) == 1:
        (of_table_VD, of_bias_V), sums = part(zeros, jax.tree.map(lambda x: x[0], parts))
        loss_N, correct_N, gradient_NPD = jax.tree.map(lambda x: x[None], sums)
    else:
        (of_table_VD, of_bias_V), (loss_N, correct_N, gradient_NPD) = jax.lax.scan(part, zeros, parts)
    gradient_TD = gradient_NPD.reshape(-1, hidden_TD.shape[1])[: len(hidden_TD)]
    gradients = gradient_TD, of_table_VD.astype(table_VD.dtype), of_bias_V
    return (jnp.sum(loss_N), jnp.sum(correct_N)), gradients


def _backward(residuals: tuple[jax.Array, jax.Array, jax.Array | None], cotangents: tuple[jax.Array, jax.Array]):
    gradient_TD, of_table_VD, of_bias_V = residuals
    of_loss, _ = cotangents
    of_bias_V = None if of_bias_V is None else of_bias_V * of_loss
    return (gradient_TD * of_loss).astype(gradient_TD.dtype), of_table_VD * of_loss, of_bias_V, None


_sums.defvjp(_forward, _backward)


def _in_parts(hidden_TD: jax.Array, target_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns hidden states [N, P, D] and targets [N, P] of parts of equal size, filled with targets of -1."""
    T, D = hidden_TD.shape
    count = max(1, -(-T // PREDICTIONS_AT_A_TIME))
    fill = -T % count
    hidden_TD = jnp.pad(hidden_TD, ((0, fill), (0, 0)))
    target_T = jnp.pad(target_T, (0, fill), constant_values=-1)
    return hidden_TD.reshape(count, -1, D), target_T.reshape(count, -1)


def _part(
    hidden_PD: jax.Array, target_P: jax.Array, decoder_VD: jax.Array, bias_V: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (loss, correct predictions, gradient of the loss by the logits [P, V])."""
    # XLA merges the kernels of sums over the logits only if they do not share the result of a product.
    logits_PV = jax.lax.optimization_barrier(jnp.einsum("pd,vd->pv", hidden_PD, decoder_VD)).astype(jnp.float32)
    if bias_V is not None:
        logits_PV += bias_V
    used_P = target_P >= 0
    word_V = jnp.arange(logits_PV.shape[1])
    # A comparison, not a gather, whose gradient would be a scatter.
    is_target_PV = word_V == target_P[:, None]
    best_P = jnp.max(logits_PV, axis=1)
    exp_PV = jnp.exp(logits_PV - best_P[:, None])
    sum_P = jnp.sum(exp_PV, axis=1)
    target_logit_P = jnp.sum(jnp.where(is_target_PV, logits_PV, 0), axis=1)
    loss_P = best_P + jnp.log(sum_P) - target_logit_P
    first_best_P = jnp.min(jnp.where(logits_PV == best_P[:, None], word_V, len(word_V)), axis=1)
    gradient_PV = jnp.where(used_P[:, None], exp_PV / sum_P[:, None] - is_target_PV, 0)
    loss, correct = jnp.sum(jnp.where(used_P, loss_P, 0)), jnp.sum(first_best_P == target_P)
    return loss, correct.astype(jnp.float32), gradient_PV.astype(hidden_PD.dtype)
