"""Converts between Hugging Face checkpoint directories and parameters, with safetensors and without torch."""

from nomic_jax.data.prompts import NOMIC_PROMPTS
from nomic_jax.hf.checkpoint import Checkpoint
from nomic_jax.hf.files import CheckpointError
from nomic_jax.hf.front_matter import CardData
from nomic_jax.hf.hub import push_to_hub
from nomic_jax.hf.read import read_checkpoint
from nomic_jax.hf.write import write_checkpoint

__all__ = [
    "NOMIC_PROMPTS",
    "CardData",
    "Checkpoint",
    "CheckpointError",
    "push_to_hub",
    "read_checkpoint",
    "write_checkpoint",
]
