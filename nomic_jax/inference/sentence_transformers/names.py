"""The names of sentence-transformers' SentenceTransformer: what ``Embedder`` does under each, or why it has none.

``python -m nomic_jax.inference.sentence_transformers.names docs/sentence_transformers.md`` writes the tables of the
page anew.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

# Method or attribute -> what differs from sentence-transformers; "" if nothing does.
SUPPORTED = {
    "encode": "",
    "encode_query": "",
    "encode_document": "",
    "encode_multi_process": "",
    "similarity": "numpy for numpy, torch for torch",
    "similarity_pairwise": "numpy for numpy, torch for torch",
    "similarity_fn_name": "",
    "SUPPORTED_SIMILARITY_FN_NAMES": "",
    "prompts": "",
    "default_prompt_name": "",
    "truncate_dim": "at most the width of the model",
    "truncate_embeddings": "",
    "truncate_sentence_embeddings": "",
    "get_embedding_dimension": "",
    "get_sentence_embedding_dimension": "",
    "max_seq_length": "from 2 to the positions of the model",
    "get_max_seq_length": "",
    "tokenize": "numpy arrays; the names are input_ids and attention_mask",
    "preprocess": "numpy arrays; the names are input_ids and attention_mask",
    "tokenizer": "this package's Tokenizer; `tokenizer.backend` is that of the tokenizers package",
    "config": "this package's EmbeddingConfig: the encoder and its pooling",
    "device": "a string, the first of `devices`",
    "to": "another device; a type is refused",
    "cpu": "",
    "cuda": "",
    "dtype": "numpy's, of the computation; parameters are float32",
    "eval": "nothing to do",
    "evaluate": "",
    "model_card_data": "holds what evaluators report; the generated model card shows it",
    "save_pretrained": "an export, which sentence-transformers opens; `overwrite` as in nomic-jax to-hf",
    "save": "as `save_pretrained`",
    "push_to_hub": "",
    "save_to_hub": "",
    "load": "",
    "start_multi_process_pool": "devices of this process; no other process is started",
    "stop_multi_process_pool": "",
    "get_backend": '"jax"',
    "modalities": "",
    "supports": "",
    "is_singular_input": "",
    "get_model_kwargs": "",
    "set_pooling_include_prompt": "True only",
    "model_type": "",
    "default_huggingface_organization": "",
}
# Method -> parameter -> what differs.
PARAMETERS = {
    "Embedder": {
        "model_name_or_path": "a name on the hub, a directory, or a training run",
        "device": "None: all devices of JAX's default backend; a name without a number: all of its kind",
        "prompts": "added to those of the model",
        "default_prompt_name": "",
        "cache_folder": "",
        "revision": "",
        "local_files_only": "",
        "token": "",
        "use_auth_token": "",
        "model_kwargs": "`dtype` and `torch_dtype`; `attn_implementation` eager or sdpa",
        "processor_kwargs": "`model_max_length`; also under the old name `tokenizer_kwargs`",
        "similarity_fn_name": "",
        "truncate_dim": "",
        "backend": 'the default is "jax"; "torch" is taken for it',
    },
    "encode": {
        "inputs": "also under the old name `sentences`; no texts give [0, dim]",
        "prompt_name": "",
        "prompt": "",
        "batch_size": "of texts that are padded, over all devices; packed texts are limited by their tokens",
        "show_progress_bar": "None: a bar if the work takes more than 3 seconds",
        "output_value": "token embeddings are numpy arrays unless tensors are asked for",
        "precision": "",
        "convert_to_numpy": "",
        "convert_to_tensor": "torch must be installed",
        "device": "",
        "normalize_embeddings": "",
        "truncate_dim": "",
        "pool": "",
        "chunk_size": "texts that are sorted by length and computed together; None for all",
    },
}
# Parameter of the constructor or of encode -> what to use instead.
REFUSED_PARAMETERS = {
    "modules": "models are read from directories; Embedder.from_params wraps parameters",
    "trust_remote_code": (
        "no code of a model is executed, and the models that can be opened need none; leave it out. A model that needs "
        "code of its own is refused by name"
    ),
    "config_kwargs": "settings are those of the model's config.json; pass dtype, max_length, layer_norm or attention",
    "model_card_data": "nomic-jax to-hf writes the model card, with the fields that its flags give",
    "task": "routes of a Router are not implemented; use encode_query, encode_document or prompt_name",
    "processing_kwargs": "set max_seq_length, or give texts that are shorter",
}
# What to use instead -> names that are refused for this reason.
_REASONS: dict[str, str] = {
    "parameters are JAX arrays in `params`, and `nomic_jax.embed` is a pure function of them": """
        forward parameters named_parameters buffers named_buffers get_parameter get_buffer get_extra_state
        set_extra_state register_parameter register_buffer T_destination dump_patches call_super_init share_memory
        to_empty apply extra_repr type""",
    "`save_pretrained` writes the weights as safetensors, and `nomic_jax.hf.read_checkpoint` reads them": """
        state_dict load_state_dict register_state_dict_post_hook register_state_dict_pre_hook
        register_load_state_dict_post_hook register_load_state_dict_pre_hook""",
    'give the type of the computation when the model is opened: Embedder(..., dtype="bfloat16" or "float16")': """
        half bfloat16 float double""",
    "there is no such backend of JAX; `to` takes the name of a device that JAX has": "ipu xpu mtia",
    "JAX has no hooks; wrap `nomic_jax.embed` in a function of your own": """
        register_forward_hook register_forward_pre_hook register_backward_hook register_full_backward_hook
        register_full_backward_pre_hook""",
    "the modules are fixed: `config` names the encoder, pooling, modules, layer_norm and normalize": """
        modules named_modules children named_children get_submodule set_submodule add_module register_module append
        extend insert pop transformers_model processor get_sentence_features smart_batching_collate""",
    "train with `nomic_jax.fit`, which takes this model's directory or name": """
        fit old_fit train requires_grad_ zero_grad gradient_checkpointing_enable model_card_data_class""",
    "a folder with a LoRA adapter opens as the merged model; training one is config.lora.rank of nomic-jax train": """
        active_adapter active_adapters add_adapter check_peft_compatible_model delete_adapter disable_adapters
        enable_adapters get_adapter_state_dict has_peft_compatible_model load_adapter set_adapter""",
    "average the weights with sentence-transformers, save them and open the directory": "merge",
    "JAX compiles every model; remove the call": "compile clear_placement_cache",
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}
_BEGIN, _END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"


def refusal(name: str) -> str:
    """Returns the message for a method or attribute of SentenceTransformer that ``Embedder`` refuses."""
    return f"Embedder has no {name!r}, which SentenceTransformer has: {REFUSED[name]}"


def refused_parameter(name: str) -> str:
    return f"{name} is refused: {REFUSED_PARAMETERS[name]}"


def tables() -> str:
    """Returns the tables of the page on sentence-transformers, as Markdown."""
    parts = []
    for method, parameters in PARAMETERS.items():
        title = "the constructor" if method == "Embedder" else "`encode`, `encode_query`, `encode_document`"
        parts.append(f"### Parameters of {title}\n\n{_supported(parameters)}")
    parts.append(f"### Methods and attributes\n\n{_supported(SUPPORTED)}")
    parts.append(f"### Refused parameters\n\n{_table(('parameter', 'instead'), REFUSED_PARAMETERS)}")
    rows = [f"| {', '.join(f'`{name}`' for name in names.split())} | {reason} |" for reason, names in _REASONS.items()]
    parts.append("\n".join(["### Refused methods and attributes\n", "| names | instead |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def _supported(notes: Mapping[str, str]) -> str:
    same = ", ".join(f"`{name}`" for name, note in notes.items() if not note)
    different = {name: note for name, note in notes.items() if note}
    return f"The same: {same}.\n\n{_table(('with a difference', 'which'), different)}"


def _table(header: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---|---|", *(f"| `{name}` | {note} |" for name, note in rows.items())]
    return "\n".join(lines) + "\n"


def with_tables(page: str) -> str:
    """Returns a page with its tables as they are now.

    Raises:
      ValueError: the page has no place for them.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"the page has no lines {_BEGIN.strip()} and {_END.strip()}")
    return f"{before}{begin}\n{tables()}\n{end}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
