"""Hugging Face checkpoint directories <-> parameters, through safetensors; no torch."""

from nomic_jax.hf.read import Checkpoint, CheckpointError, read_checkpoint
from nomic_jax.hf.write import PROMPTS, write_checkpoint

__all__ = ["PROMPTS", "Checkpoint", "CheckpointError", "read_checkpoint", "write_checkpoint"]
