"""What the three stages share; the paper's model and the fields that no stage changes."""

from ml_collections import ConfigDict

# Tiny sizes for the :debug variants: seconds on a CPU.
DEBUG_MODEL = dict(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=256, max_positions=2048)


def base_config(stage: str) -> ConfigDict:
    config = ConfigDict()
    config.stage = stage
    config.seed = 0
    config.init_from = ""
    config.batch_size = 0
    config.accumulate = 1
    config.steps = -1
    config.epochs = 1.0
    config.kept_chunks = 0.0
    config.log_every = 1
    config.evaluation = ConfigDict(dict(every=0, tasks="", metric="ndcg@10"))
    config.wandb = ""
    config.trackio = ""
    config.peak_tflops = 0.0
    config.profile = ""
    # nomic-bert-2048, 137M parameters.
    config.model = ConfigDict(
        dict(
            vocab_size=30528,
            hidden_size=768,
            num_layers=12,
            num_heads=12,
            intermediate_size=3072,
            max_positions=8192,
            max_trained_positions=2048,
            rope_base=1000.0,
            rope_scaling_factor=2.0,
            dtype="bfloat16",
            attention="auto",
            recompute="none",
        )
    )
    config.loss = ConfigDict(
        dict(
            temperature=0.02,
            learn_temperature=False,
            bidirectional=False,
            matryoshka_dims=(),
            matryoshka_weights=(),
            layer_norm=False,
            column_tile=0,
            guide="",
            guide_margin=0.0,
        )
    )
    config.data = ConfigDict(dict(mixture="", tokenizer="", cache_dir="token_cache", on_bad_row="raise"))
    if stage in ("contrastive", "finetune"):
        config.data.update(dict(sampling="rows", sampling_temperature=1.0, remainder="drop"))
        config.data.update(dict(layout="bucketed", chunk_tokens=0))
    config.sharding = "replicated"
    config.checkpoint = ConfigDict(dict(every=500, keep=3, keep_every=0, allow_changed=""))
    return config


def choose_variant(variants: dict, name: str):
    if name not in variants:
        raise ValueError(f"unknown variant {name!r}; write one of :{', :'.join(variants)}")
    return variants[name]
