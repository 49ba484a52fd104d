"""Models of the Hugging Face hub as local directories."""

from pathlib import Path


def download(hub_id: str, revision: str | None = None) -> Path:
    """The local copy of a model of the hub: configuration, tokenizer and weights, safetensors where there are any.

    Raises:
      FileNotFoundError: the hub has no model of that name, or cannot be reached.
    """
    # huggingface_hub takes a while to import, and local directories do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*wanted: str) -> Path:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(wanted)))

    try:
        directory = fetch("*.json", "*.safetensors", "vocab.txt")
        if not any(directory.glob("*.safetensors")):
            directory = fetch("*.json", "pytorch_model.bin", "vocab.txt")
        return directory
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{hub_id} is neither a directory nor could it be fetched from the hub ({type(error).__name__}: {error})"
        ) from error
