"""Training speed of the three stages beside a plain torch loop: the same model, weights, batch, loss and optimizer.

    python -m benchmarks.train [--stages=mlm,contrastive,finetune] [--steps=3] [--layers=12] [--dtype=float32]

On a CPU in float32; on a GPU in bfloat16 with float32 master weights (torch: autocast, SDPA). Texts are random tokens,
their lengths log-normal as those of real pairs. Both sides take turns, step by step, in one process; the table has
medians. The losses of the first step must agree, or nothing is printed.

torch pads every batch to its longest text, and makes the masked-LM head's logits where something is predicted, as ours
does. `--layout` is that of our contrastive and finetune batches.
"""

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import NomicBertForMaskedLM

from benchmarks.encode import bert_tokenizer
from configs import contrastive, finetune, mlm
from nomic_jax.data.packing import fill_chunks, packed_layout, plan_chunks
from nomic_jax.hf import Checkpoint, write_checkpoint
from nomic_jax.model import EmbeddingConfig
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.sharding import make_mesh, put_rows
from nomic_jax.train.stages import make_stage
from nomic_jax.train.state import init_state, make_train_step

CONFIGS = {"mlm": mlm, "contrastive": contrastive, "finetune": finetune}
# (rows, negatives, median tokens of a query, of a document, longest) of a batch.
ON_CPU = {"mlm": (4, 0, 0, 0, 512), "contrastive": (16, 0, 12, 60, 256), "finetune": (4, 7, 12, 60, 128)}
ON_GPU = {"mlm": (64, 0, 0, 0, 2048), "contrastive": (256, 0, 20, 150, 512), "finetune": (32, 7, 20, 120, 512)}


class Load:
    """One batch: the texts, and the arrays that our stage takes of them."""

    def __init__(self, stage: str, rows: int, negatives: int, query: int, document: int, longest: int, layout: str):
        rng = np.random.default_rng(0)
        self.stage, self.C, self.layout = stage, 1 + negatives, None
        if stage == "mlm":
            ids = rng.integers(1000, 30000, (rows, longest)).astype(np.int32)
            count = round(0.3 * longest)
            position = np.sort(np.stack([rng.permutation(longest)[:count] for _ in range(rows)]), axis=1)
            target = np.take_along_axis(ids, position, 1)
            np.put_along_axis(ids, position, 103, 1)
            self.arrays = {"ids": ids, "position": position.astype(np.int32), "target": target.astype(np.int32)}
            self.real_tokens = ids.size
            return

        def texts(count: int, median: int) -> list[np.ndarray]:
            lengths = np.clip(np.round(median * np.exp(0.7 * rng.standard_normal(count))), 4, longest).astype(int)
            return [rng.integers(1000, 30000, length).astype(np.int32) for length in lengths]

        self.queries, self.documents = texts(rows, query), texts(rows * self.C, document)
        hashes = rng.integers(0, 1 << 32, (rows * (1 + self.C), 2), dtype=np.uint32)
        self.arrays = {
            "query_hash": hashes[:rows],
            "document_hash": hashes[rows:].reshape(rows, self.C, 2),
            "in_batch_negatives": np.ones(rows, bool),
        }
        query_length, document_length = (np.array([len(x) for x in them]) for them in (self.queries, self.documents))
        self.real_tokens = int(query_length.sum() + document_length.sum())
        if layout == "padded":
            self.arrays |= {
                "query_ids": padded(self.queries),
                "query_length": query_length.astype(np.int32),
                "document_ids": padded(self.documents).reshape(rows, self.C, -1),
                "document_length": document_length.reshape(rows, self.C).astype(np.int32),
            }
            return
        self.layout = packed_layout(longest, max(longest, self.real_tokens // 8))
        plan = plan_chunks(query_length, document_length.reshape(rows, self.C), self.layout, 1)
        # On one device the rows keep their order.
        ids, lengths = np.concatenate(self.queries + self.documents), np.concatenate([query_length, document_length])
        self.arrays |= fill_chunks(plan, self.layout, slice(0, 1), ids, lengths, 0)


def padded(texts: list[np.ndarray]) -> np.ndarray:
    ids = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(ids, texts):
        row[: len(text)] = text
    return ids


def ours(config: TrainConfig, load: Load) -> tuple[Callable[[], float], dict]:
    """(a step on the batch that returns its loss, the parameters it starts from)"""
    mesh = make_mesh(jax.devices()[:1])
    stage = make_stage(config, EmbeddingConfig(config.model), load.layout)
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, 1000))
    state = init_state(jax.random.key(0), stage, optimizer, mesh, {})
    params = jax.device_get(state.params)
    train_step = make_train_step(stage, optimizer, mesh)
    rows = put_rows(load.arrays, mesh)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, rows)
        return float(metrics["loss"])

    return step, params


def theirs(config: TrainConfig, load: Load, directory: Path) -> Callable[[], float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = NomicBertForMaskedLM.from_pretrained(directory, attn_implementation="sdpa").train().to(device)
    encoder = getattr(model, model.base_model_prefix)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    options = config.optim
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(options.b1, options.b2), eps=options.eps, fused=True)
    if load.stage == "mlm":
        ids, position, target = (
            torch.tensor(load.arrays[name]).long().to(device) for name in ("ids", "position", "target")
        )
    else:
        texts = [padded(load.queries), padded(load.documents)]
        given = [
            (torch.tensor(ids).long().to(device), torch.tensor(ids > 0).long().to(device)) for ids in texts
        ]  # no token of a text is 0

    def embed(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean.float(), dim=-1)

    def loss() -> torch.Tensor:
        if load.stage == "mlm":
            hidden = encoder(input_ids=ids).last_hidden_state
            chosen = torch.gather(hidden, 1, position[..., None].expand(-1, -1, hidden.shape[-1]))
            return torch.nn.functional.cross_entropy(model.cls(chosen).flatten(0, 1).float(), target.flatten())
        query, document = (embed(*them) for them in given)
        logits = query @ document.T / config.loss.temperature
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(query), device=device) * load.C)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=config.model.dtype == "bfloat16"):
            value = loss()
        value.backward()
        if options.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm, foreach=True)
        optimizer.step()
        return float(value)

    return step


def measure(name: str, args: argparse.Namespace) -> str:
    """A line of the table; the models of one stage are gone before the next one's are made."""
    on_gpu = jax.default_backend() == "gpu"
    layout = args.layout
    config = CONFIGS[name].get_config("paper")
    config.model.num_layers = args.layers
    config.model.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    config.model.recompute = "attention" if on_gpu else "none"
    # Small enough that the steps before the last do not matter for what is compared.
    config.optim.lr = 1e-6
    config.kept_chunks = 1.0 if name != "mlm" and layout == "packed" else 0.0
    config.data.update(dict(layout=layout) if name != "mlm" else {})
    settings = TrainConfig.from_mapping(config.to_dict())
    load = Load(name, *(ON_GPU if on_gpu else ON_CPU)[name], layout)
    our_step, params = ours(settings, load)
    with tempfile.TemporaryDirectory() as directory:
        model = EmbeddingConfig(dataclasses.replace(settings.model, dtype="float32"))
        write_checkpoint(Path(directory), Checkpoint(model, params, bert_tokenizer()))
        their_step = theirs(settings, load, Path(directory))
    started = time.perf_counter()
    losses = our_step(), their_step()
    first = time.perf_counter() - started
    np.testing.assert_allclose(*losses, rtol=2e-2 if settings.model.dtype == "bfloat16" else 1e-4)
    seconds: dict[Callable, list[float]] = {our_step: [], their_step: []}
    for _ in range(args.steps):
        for step, times in seconds.items():
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
    us, them = (statistics.median(times) for times in seconds.values())
    return (
        f"| {name} | {load.real_tokens:,} | {us:.2f} | {them:.2f} | {them / us:.2f} | {load.real_tokens / us:,.0f} "
        f"| {first:.0f} | {losses[0]:.5f} {losses[1]:.5f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="mlm,contrastive,finetune")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="[float32 on a CPU, bfloat16 on a GPU]")
    parser.add_argument("--layout", choices=["packed", "padded"], default="packed")
    args = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__}, {args.layers} layers\n")
    print("| stage | real tokens a step | nomic_jax s | torch s | ratio | nomic_jax tokens/s | first call s | losses |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.stages.split(","):
        print(measure(name, args), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
