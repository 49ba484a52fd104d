"""Downloads models of the Hugging Face hub into local directories."""

from pathlib import Path

from nomic_jax.data.tokens.hub import is_reachable


def download(hub_id: str, revision: str | None = None) -> Path:
    """Returns the local copy of a hub model: configuration, tokenizer and weights (safetensors if available).

    Raises:
      FileNotFoundError: the hub has no model with that name, or cannot be reached.
    """
    # huggingface_hub is slow to import, and local directories do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns), local_files_only=cached)
        )

    try:
        cached = not is_reachable(hub_id, revision)
        directory = fetch("*.json", "*.safetensors", "vocab.txt")
        if not any(directory.glob("*.safetensors")):
            directory = fetch("*.json", "pytorch_model.bin", "vocab.txt")
        return directory
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{hub_id} is not a directory and could not be fetched from the hub ({type(error).__name__}: {error})"
        ) from error
