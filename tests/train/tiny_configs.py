"""Small configurations of each stage on the test corpus."""

import importlib

from nomic_jax.train.config import TrainConfig

# One layer: layers are not stacked, so each one is compiled. tests/model covers several layers.
TINY = dict(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_positions=2048, dtype="float32")
STAGES = ("mlm", "contrastive", "finetune")


def load_config(stage, corpus, minilm, **changes) -> TrainConfig:
    """Returns the :debug variant of a stage with an even smaller model, on the test corpus.

    The keys of ``changes`` may name fields of groups: {"data.layout": "packed"}.
    """
    config = importlib.import_module(f"configs.{stage}").get_config("debug")
    config.model.update(TINY)
    config.data.tokenizer = str(minilm)
    config.data.cache_dir = str(corpus / "token_cache")
    config.data.mixture = str(
        corpus / {"mlm": "text.jsonl", "contrastive": "pairs.yaml", "finetune": "triplets.jsonl"}[stage]
    )
    config.batch_size = 16
    config.steps = 3
    config.update({name: value for name, value in changes.items() if "." not in name})
    config.update_from_flattened_dict({name: value for name, value in changes.items() if "." in name})
    return TrainConfig.from_mapping(config.to_dict())
