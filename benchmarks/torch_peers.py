"""Reference implementations in torch: a training step with the same model, weights, texts, loss and optimizer as in
nomic_jax, and inference.

The models are those of transformers, attention is SDPA, and autocast computes in bfloat16.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, NomicBertForMaskedLM

from benchmarks.loads import Load, padded
from nomic_jax.train.config import TrainConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class TorchStep:
    """A training step: each call does a step and returns the loss.

    Texts are padded to the longest of their batch. With ``mini_batch_tokens``, pairs are computed in mini-batches by
    GradCache (arXiv:2101.06983; CachedMultipleNegativesRankingLoss in sentence-transformers): first all embeddings
    without a gradient, then each mini-batch again with the gradient of the loss in its embeddings. Texts are sorted by
    length first, so that mini-batches have little padding.
    """

    def __init__(self, settings: TrainConfig, load: Load, directory: Path, mini_batch_tokens: int = 0):
        model = NomicBertForMaskedLM.from_pretrained(directory, attn_implementation="sdpa").train().to(DEVICE)
        self.model, self.encoder = model, getattr(model, model.base_model_prefix)
        self.settings, self.load, self.mini_batch_tokens = settings, load, mini_batch_tokens
        options = settings.optim
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(options.b1, options.b2), eps=options.eps, fused=True)
        if load.stage == "mlm":
            names = ("ids", "position", "target")
            self.rows = [torch.tensor(load.arrays[name]).long().to(DEVICE) for name in names]
        elif mini_batch_tokens:
            self.order, self.texts = _mini_batches([*load.queries, *load.documents], mini_batch_tokens)
        else:
            self.texts = [_on_device(load.queries), _on_device(load.documents)]

    def __call__(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        if self.mini_batch_tokens:
            loss = self._backward_in_mini_batches()
        else:
            with self._autocast():
                loss = self._mlm_loss() if self.load.stage == "mlm" else self._loss(*map(self._embed, self.texts))
            loss.backward()
        if self.settings.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optim.clip_norm, foreach=True)
        self.optimizer.step()
        return float(loss)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE, torch.bfloat16, enabled=self.settings.model.dtype == "bfloat16")

    def _embed(self, text: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, mask = text
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean.float(), dim=-1)

    def _loss(self, query: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
        logits = query @ document.T / self.settings.loss.temperature
        positive = torch.arange(len(query), device=DEVICE) * (len(document) // len(query))
        return torch.nn.functional.cross_entropy(logits, positive)

    def _mlm_loss(self) -> torch.Tensor:
        ids, position, target = self.rows
        hidden = self.encoder(input_ids=ids).last_hidden_state
        chosen = torch.gather(hidden, 1, position[..., None].expand(-1, -1, hidden.shape[-1]))
        return torch.nn.functional.cross_entropy(self.model.cls(chosen).flatten(0, 1).float(), target.flatten())

    def _backward_in_mini_batches(self) -> torch.Tensor:
        with torch.no_grad(), self._autocast():
            embeddings = torch.cat([self._embed(text) for text in self.texts])
        embeddings.requires_grad_()
        in_order = embeddings[self.order]
        loss = self._loss(*in_order.split([len(self.load.queries), len(self.load.documents)]))
        loss.backward()
        start = 0
        for text in self.texts:
            with self._autocast():
                again = self._embed(text)
            again.backward(embeddings.grad[start : start + len(again)])
            start += len(again)
        return loss.detach()


def _on_device(texts: tuple[np.ndarray, ...] | list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask. Real tokens are never 0."""
    ids = padded(texts)
    return torch.tensor(ids).long().to(DEVICE), torch.tensor(ids > 0).long().to(DEVICE)


def _mini_batches(texts: list[np.ndarray], tokens: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """(position of each text in the mini-batches, mini-batches of at most ``tokens`` tokens)."""
    order = np.argsort([-len(text) for text in texts], kind="stable")
    batches, start = [], 0
    while start < len(order):
        rows = order[start : start + max(1, tokens // len(texts[order[start]]))]
        batches.append(_on_device([texts[row] for row in rows]))
        start += len(rows)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return torch.tensor(place).to(DEVICE), batches


class TorchEmbedder:
    """Mean-pooled, normalised embeddings of texts of one common length, in bfloat16, without a mask."""

    def __init__(self, directory: Path, compiled: bool = False):
        model = AutoModel.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.bfloat16)
        self.model = model.eval().to(DEVICE)
        self.embed = torch.compile(self._embed, dynamic=False) if compiled else self._embed

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        mean = self.model(input_ids=ids).last_hidden_state.float().mean(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> np.ndarray:
        return self.embed(ids).cpu().numpy()
