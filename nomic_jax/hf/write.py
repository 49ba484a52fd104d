"""Writing a Hugging Face directory that sentence-transformers, transformers and others open as it is."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from nomic_jax.data.sources import write_json
from nomic_jax.data.tokenizer import Tokenizer
from nomic_jax.hf.config import config_json
from nomic_jax.hf.keymap import encoder_keymap, from_params, mlm_head_keymap
from nomic_jax.model import EmbeddingConfig

# "query" and "document" are what sentence-transformers' encode_query and encode_document look for.
PROMPTS = {
    "search_query": "search_query: ",
    "search_document": "search_document: ",
    "classification": "classification: ",
    "clustering": "clustering: ",
    "query": "search_query: ",
    "document": "search_document: ",
}
_SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_USAGE = """# {name}

A text embedder trained with nomic_jax, the JAX implementation of [Nomic Embed](https://arxiv.org/abs/2402.01613).
{dim} dimensions, texts up to {max_length} tokens.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode_query(["what is a text embedder?"])
documents = model.encode_document(["A text embedder maps texts to vectors."])
print(model.similarity(queries, documents))
```

Every text starts with its task: {prompts}; `encode_query` and `encode_document` put the first two there.
"""


def write_checkpoint(
    directory: str | Path,
    config: EmbeddingConfig,
    params: dict,
    tokenizer: Tokenizer,
    *,
    mlm_head: dict | None = None,
    prompts: dict[str, str] | None = None,
    max_length: int | None = None,
    model_card: str = "",
) -> None:
    """Writes model, tokenizer, pooling, prompts and model card; the directory appears complete or not at all.

    Tensors have the names of the published checkpoints and no prefix: transformers silently makes random weights of a
    prefixed file. With ``mlm_head`` the tensors of the head are there too (they need no sentence-transformers).

    Args:
      directory: replaced if it is such an export already.
      prompts: None for the prefixes of nomic-embed.
      model_card: text added to README.md: training data, recipe, figures.

    Raises:
      FileExistsError: the directory holds something else.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()) and not (directory / "modules.json").exists():
        raise FileExistsError(f"{directory} is not empty and no earlier export; choose another directory")
    if config.layer_norm:
        raise ValueError("the LayerNorm after pooling has no place in a sentence-transformers directory yet")
    part = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    encoder = config.encoder
    naming = "hub" if encoder.position == "rope" else "bert"
    tensors = from_params(params, encoder_keymap(encoder, naming))
    architecture = "NomicBertModel" if naming == "hub" else "BertModel"
    if mlm_head is not None:
        tensors |= from_params(mlm_head, mlm_head_keymap(encoder))
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    _write(part / "config.json", config_json(encoder, architecture))

    max_length = max_length or encoder.max_positions
    prompts = PROMPTS if prompts is None else prompts
    _write_tokenizer(part, tokenizer, max_length)
    _write_sentence_transformers(part, config, prompts, max_length)
    names = ", ".join(f"`{text}`" for text in dict.fromkeys(prompts.values())) or "none"
    card = _USAGE.format(name=directory.name, dim=config.output_dim, max_length=max_length, prompts=names)
    front_matter = "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n---\n"
    (part / "README.md").write_text(front_matter + card + model_card, encoding="utf-8")

    if directory.exists():
        shutil.rmtree(directory)
    part.rename(directory)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    write_json(path, content)


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, max_length: int) -> None:
    tokenizer.save(directory)
    definition = json.loads(tokenizer.backend.to_str())
    normalizer = definition.get("normalizer") or {}
    vocabulary = sorted(tokenizer.backend.get_vocab().items(), key=lambda item: item[1])
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocabulary), encoding="utf-8")
    _write(directory / "special_tokens_map.json", _SPECIAL_TOKENS)
    _write(
        directory / "tokenizer_config.json",
        _SPECIAL_TOKENS
        | {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer.get("lowercase", True),
            "strip_accents": normalizer.get("strip_accents"),
            "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
            "model_max_length": max_length,
        },
    )


def _write_sentence_transformers(
    directory: Path, config: EmbeddingConfig, prompts: dict[str, str], max_length: int
) -> None:
    # The old type names: every version of sentence-transformers reads them.
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    if config.normalize:
        modules.append(("Normalize", "2_Normalize"))
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules)
    ]
    _write(directory / "modules.json", listed)
    _write(
        directory / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": config.encoder.hidden_size,
            "pooling_mode_cls_token": config.pooling == "cls",
            "pooling_mode_mean_tokens": config.pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "include_prompt": True,
        },
    )
    _write(directory / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    _write(
        directory / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
