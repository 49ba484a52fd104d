"""Compares the gathered contrastive loss and its gradients with the dense formula in float64, on 1 to 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nomic_jax.train.losses.contrastive import contrastive_loss, init_temperature, masked_cross_entropy, temperature_of
from nomic_jax.train.sharding import DATA, make_mesh

B, E, G, TEMPERATURE = 16, 12, 5, 0.05

# Name -> (negatives per row, options of the loss). example() replaces "guide" with the embeddings of a guide, and
# in_batch_negatives=None with one value per row.
CASES = {
    "pairs": (0, {}),
    "hard negatives": (3, {}),
    "bidirectional": (3, {"bidirectional": True}),
    "own row only": (3, {"in_batch_negatives": False}),
    "own row only for some": (3, {"in_batch_negatives": None}),
    "guide": (3, {"guide": True}),
    "matryoshka": (3, {"matryoshka_dims": (12, 7, 2), "matryoshka_weights": (1.0, 0.5, 2.0)}),
    "tiles that divide": (3, {"column_tile": 16}),
    "tiles that do not": (0, {"column_tile": 13}),
    "all": (
        3,
        {"bidirectional": True, "guide": True, "guide_margin": -0.1, "in_batch_negatives": None}
        | {"matryoshka_dims": (3, 9), "column_tile": 10},
    ),
}


def texts_with_duplicates(C):
    """Returns numbers that stand for texts. Some documents and queries occur twice; a negative repeats a positive."""
    query = np.arange(B)
    query[5] = query[11]
    document = 100 + np.arange(B * C).reshape(B, C)
    document[3, 0] = document[9, 0]
    if C > 1:
        document[2, 1] = document[14, 0]
        document[6, 2] = document[6, 0]
        document[11, 1] = 999
    return query, document


def dense(query_BE, document_BCE, query_text, document_text, options=None, temperature=TEMPERATURE):
    """Computes the loss from its definition: one query (then one positive) at a time, over its unmasked candidates.

    Returns the mean loss, the gradients to queries, documents and log(1 / temperature), and the accuracy.
    """
    torch = pytest.importorskip("torch", reason="the reference is torch's autograd in float64; torch is not installed")
    options = dict(options or {})
    options.pop("column_tile", None)  # tiles do not change the loss
    guide, margin = options.pop("guide", None), options.pop("guide_margin", 0.0)
    in_batch = np.broadcast_to(options.pop("in_batch_negatives", True), B)
    bidirectional = options.pop("bidirectional", False)
    dims = options.pop("matryoshka_dims", (E,))
    weights = options.pop("matryoshka_weights", [1.0] * len(dims))
    assert not options
    q_full = torch.tensor(query_BE, dtype=torch.float64, requires_grad=True)
    d_full = torch.tensor(document_BCE, dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(-np.log(temperature), dtype=torch.float64, requires_grad=True)
    rows, columns = range(B), range(d_full.shape[1])

    def found_by_guide(i, j, c, back):
        if guide is None:
            return False
        guide_query, guide_document = guide
        similarity = guide_document[i, 0] @ guide_query[j] if back else guide_query[i] @ guide_document[j, c]
        return similarity > guide_query[i] @ guide_document[i, 0] + margin

    total, correct = 0.0, 0
    for dim, weight in zip(dims, weights):
        q = torch.nn.functional.normalize(q_full[:, :dim], dim=-1)
        d = torch.nn.functional.normalize(d_full[:, :, :dim], dim=-1)
        if dim == E:
            q, d = q_full, d_full
        for i in rows:
            positive = q[i] @ d[i, 0] * log_scale.exp()
            kept = [(i, 0)]
            for j in rows:
                for c in columns:
                    same_document = document_text[j, c] == document_text[i, 0]
                    same_query = c == 0 and query_text[j] == query_text[i]
                    if (in_batch[i] or j == i) and not (same_document or same_query or found_by_guide(i, j, c, False)):
                        kept.append((j, c))
            logits = d[[j for j, _ in kept], [c for _, c in kept]] @ q[i] * log_scale.exp()
            forth = torch.logsumexp(logits, 0) - positive
            correct += dim == max(dims) and bool((logits[1:] < positive).all())
            kept = [i]
            for j in rows:
                same = document_text[j, 0] == document_text[i, 0] or query_text[j] == query_text[i]
                if in_batch[i] and not (same or found_by_guide(i, j, 0, True)):
                    kept.append(j)
            back = torch.logsumexp(q[kept] @ d[i, 0] * log_scale.exp(), 0) - positive
            total = total + weight * ((forth + back) / 2 if bidirectional else forth)
    loss = total / B
    loss.backward()
    return loss.item(), q_full.grad.numpy(), d_full.grad.numpy(), log_scale.grad.numpy(), correct / B


def unit_vectors(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def as_hash(texts):
    return np.stack([texts * 7 + 1, texts ^ 5], -1).astype(np.uint32)


def example(negatives, options):
    """Returns embeddings, texts and options (placeholders replaced) of a case. Equal texts have equal embeddings."""
    rng = np.random.default_rng(0)
    C = 1 + negatives
    query_text, document_text = texts_with_duplicates(C)
    options = dict(options)

    def embeddings(width):
        of_query, of_document = unit_vectors(rng, 2000, width), unit_vectors(rng, 2000, width)
        # Positives resemble their queries; otherwise the few duplicates would hardly change the loss.
        of_document[document_text[:, 0]] += of_query[query_text]
        of_document /= np.linalg.norm(of_document, axis=-1, keepdims=True)
        return of_query[query_text], of_document[document_text]

    query, document = embeddings(E)
    if "guide" in options:
        options["guide"] = embeddings(G)
    if options.get("in_batch_negatives", True) is None:
        options["in_batch_negatives"] = rng.random(B) < 0.7
    return query, document, (query_text, document_text), options


def mean_and_gradients(devices, query, document, texts, options, temperature=TEMPERATURE, learnable=True):
    """Computes as the training step does: local sums and their gradients on each device, one psum, one division.

    Returns the loss, the gradients to queries, documents and the temperature's parameter (None if the temperature is
    fixed), and the accuracy.
    """
    rows = {"query": query, "document": document}
    rows = {name: x if x.dtype == jnp.bfloat16 else x.astype(np.float32) for name, x in rows.items()}
    rows |= {"query_hash": as_hash(texts[0]), "document_hash": as_hash(texts[1])}
    options = dict(options)
    if "guide" in options:
        rows["guide_query"], rows["guide_document"] = (x.astype(np.float32) for x in options.pop("guide"))
    if np.ndim(options.get("in_batch_negatives", True)):
        rows["in_batch"] = options.pop("in_batch_negatives")
    sums = compiled_sums(devices, None if learnable else temperature, tuple(options.items()))
    (dq, dd), dt, (total, correct) = sums(init_temperature(temperature), rows)
    return total / B, dq / B, dd / B, dt["log_scale"] / B if learnable else None, correct / B


@functools.cache
def compiled_sums(devices, fixed_temperature, options):
    def local_sum(learnt, temperature_params, rows):
        traced = {"in_batch_negatives": rows["in_batch"]} if "in_batch" in rows else {}
        total, metrics = contrastive_loss(
            *learnt,
            rows["query_hash"],
            rows["document_hash"],
            temperature=fixed_temperature or temperature_of(temperature_params),
            axis_name=DATA,
            guide_query_bG=rows.get("guide_query"),
            guide_document_bCG=rows.get("guide_document"),
            **traced,
            **dict(options),
        )
        return total, (total, metrics["accuracy"])

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=make_mesh(jax.devices()[:devices]),
        in_specs=(P(), P(DATA)),
        out_specs=((P(DATA), P(DATA)), P(), P()),
    )
    def sums(temperature_params, rows):
        varying = jax.tree.map(lambda x: jax.lax.pcast(x, DATA, to="varying"), temperature_params)
        learnt = rows["query"], rows["document"]
        (of_rows, of_temperature), aux = jax.grad(local_sum, (0, 1), has_aux=True)(learnt, varying, rows)
        return of_rows, jax.lax.psum(of_temperature, DATA), jax.lax.psum(aux, DATA)

    return sums


def assert_close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@functools.cache
def expected_of(case):
    query, document, texts, options = example(*CASES[case])
    return dense(query, document, *texts, options)


# Each case runs on one number of devices, since the communication is the same in all cases. "all" runs on all three.
DEVICES = {case: (8, 2)[number % 2] for number, case in enumerate(CASES)} | {"pairs": 1}
OTHER_DEVICES = pytest.mark.exhaustive(reason="the case runs on another number of devices; 'all' runs on this one")


@pytest.mark.parametrize(
    ("case", "devices"),
    [
        pytest.param(case, devices, marks=() if case == "all" or devices == DEVICES[case] else OTHER_DEVICES)
        for case in CASES
        for devices in (1, 2, 8)
    ],
)
def test_equals_dense_float64(case, devices):
    # "hard negatives" has a fixed temperature, a Python number.
    learnable = case != "hard negatives"
    loss, dq, dd, dt, accuracy = mean_and_gradients(devices, *example(*CASES[case]), learnable=learnable)
    expected_loss, expected_dq, expected_dd, expected_dt, expected_accuracy = expected_of(case)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(dq, expected_dq)
    assert_close(dd, expected_dd)
    if learnable:
        assert dt == pytest.approx(expected_dt, rel=1e-4)
    else:
        assert dt is None
    assert accuracy == expected_accuracy


@pytest.mark.parametrize("case", ["bidirectional", "own row only for some", "guide", "matryoshka", "all"])
def test_option_matters_in_its_test(case):
    """Each option changes the formula; otherwise the comparison above would pass even if the loss ignored it."""
    negatives, options = CASES[case]
    query, document, texts, options = example(negatives, options)
    assert abs(expected_of(case)[0] - dense(query, document, *texts)[0]) > 1e-2
    for left_out in options.keys() - {"column_tile"}:
        fewer = {name: value for name, value in options.items() if name != left_out}
        if left_out == "matryoshka_dims":
            fewer.pop("matryoshka_weights", None)
        assert abs(expected_of(case)[0] - dense(query, document, *texts, fewer)[0]) > 1e-3, left_out


@pytest.mark.parametrize("bidirectional", [False, True])
def test_duplicates_matter_in_this_test(bidirectional):
    """The duplicates change the formula. Otherwise the comparison above would also pass without masking."""
    query, document, texts, _ = example(0, {})
    options = {"bidirectional": bidirectional}
    masked = dense(query, document, *texts, options)[0]
    assert masked < dense(query, document, np.arange(B), np.arange(B)[:, None], options)[0] - 1e-3
    of_queries = dense(query, document, texts[0], np.arange(B)[:, None], options)[0]
    of_documents = dense(query, document, np.arange(B), texts[1], options)[0]
    assert masked < min(of_queries, of_documents) - 1e-3


def test_bfloat16_embeddings_have_float32_logits():
    """The loss equals the formula on the rounded embeddings; bfloat16 logits would change it by several percent."""
    query, document, texts, options = example(3, {"bidirectional": True})
    query, document = query.astype(jnp.bfloat16), document.astype(jnp.bfloat16)
    expected = dense(query.astype(float), document.astype(float), *texts, options)
    loss, dq, dd, _, _ = mean_and_gradients(2, query, document, texts, options)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert dq.dtype == dd.dtype == jnp.bfloat16  # only the final gradient to the embeddings is rounded
    assert_close(dq.astype(np.float32), expected[1], 1e-2)
    assert_close(dd.astype(np.float32), expected[2], 1e-2)


def test_small_losses_keep_their_digits():
    """At temperature 0.02, the loss of a well separated batch is far below the rounding error of its logits of 50."""
    query, document = np.eye(B), 0.4 * np.eye(B)[:, None] + 0.1
    texts = np.arange(B), np.arange(B)[:, None]
    loss, _, dd, _, _ = mean_and_gradients(1, query, document, texts, {}, temperature=0.02)
    expected = dense(query, document, *texts, temperature=0.02)
    assert 0 < expected[0] < 1e-7
    assert loss == pytest.approx(expected[0], rel=1e-4)
    assert_close(dd, expected[2], 1e-4)


@pytest.mark.parametrize(
    "column_tile",
    [pytest.param(0, marks=pytest.mark.exhaustive(reason="tile 7 masks the same candidates, and empty tiles too")), 7],
)
@pytest.mark.parametrize("case", ["equal texts", "guide takes out all", "equal texts of a row", "zero embeddings"])
def test_no_nan_where_nothing_is_left_to_compare_with(case, column_tile):
    C = 3
    query_text, document_text = np.arange(B), np.arange(B * C).reshape(B, C)
    query, document, _, _ = example(C - 1, {})
    guide_query, guide_document = np.zeros((B, B)), np.zeros((B, C, B))
    in_batch = np.ones(B, bool)
    if case == "equal texts":
        query_text, document_text = 0 * query_text, 0 * document_text
    elif case == "guide takes out all":  # the guide's similarity is -1 for a pair, otherwise 0
        guide_query, guide_document[:, 0] = np.eye(B), -np.eye(B)
    elif case == "equal texts of a row":
        in_batch, document_text = ~in_batch, np.repeat(document_text[:, :1], C, axis=1)
    else:
        query, document = 0 * query, 0 * document
    options = {"bidirectional": True, "matryoshka_dims": (4, E), "column_tile": column_tile}
    options |= {"guide": (guide_query, guide_document), "in_batch_negatives": in_batch}
    loss, *gradients, accuracy = mean_and_gradients(2, query, document, (query_text, document_text), options)
    assert all(np.isfinite(x).all() for x in gradients)
    if case == "zero embeddings":
        # All scores are equal. The loss per dim is the log of the candidate count: B * C per query, B per positive.
        assert loss == pytest.approx(np.log(B * C) + np.log(B), rel=1e-5)
        assert accuracy == 0
    else:
        assert loss == 0 and accuracy == 1
        assert all((np.asarray(x) == 0).all() for x in gradients)


def test_accuracy_counts_the_positive_scored_highest():
    query = np.eye(4, dtype=np.float32)
    document = np.eye(4, dtype=np.float32)[[0, 1, 3, 2]][:, None]
    mesh = make_mesh(jax.devices()[:2])
    hashes = as_hash(np.arange(4)), as_hash(np.arange(4)[:, None])

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(DATA), out_specs=P())
    def accuracy(*arguments):
        return jax.lax.psum(contrastive_loss(*arguments, temperature=1.0, axis_name=DATA)[1]["accuracy"], DATA)

    assert accuracy(query, document, *hashes) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matryoshka_dims": (4, 13)}, "1..12"),
        ({"matryoshka_dims": (4, 8), "matryoshka_weights": (1.0,)}, "1 matryoshka_weights for 2"),
        ({"guide_query_bG": np.zeros((B, G), np.float32)}, "both"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    query, document, texts, _ = example(0, {})
    with pytest.raises(ValueError, match=message):
        contrastive_loss(
            query, document, as_hash(texts[0]), as_hash(texts[1]), temperature=1.0, axis_name=DATA, **options
        )


def test_learnable_temperature_is_clamped_and_can_come_back():
    params = init_temperature(0.02)
    assert temperature_of(params) == pytest.approx(0.02, rel=1e-6)
    assert jax.grad(temperature_of)(params)["log_scale"] == pytest.approx(-0.02, rel=1e-6)
    beyond = {"log_scale": jnp.log(250.0)}
    assert temperature_of(beyond) == pytest.approx(0.01, rel=1e-6)
    assert jax.grad(temperature_of)(beyond)["log_scale"] == pytest.approx(-0.01, rel=1e-6)
    with pytest.raises(ValueError, match=r"0\.01"):
        init_temperature(0.005)


def test_masked_cross_entropy_is_torch_s():
    torch = pytest.importorskip("torch", reason="cross-entropy is compared with torch's; torch is not installed")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(10, 7)).astype(np.float32)
    target = np.array([0, 6, -1, 3, 2, -1, 5, 1, 1, 4])
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).double(), torch.tensor(target), ignore_index=-1, reduction="sum"
    )
    loss, correct = masked_cross_entropy(logits, target)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    assert float(correct) == (logits.argmax(1) == target).sum()
