"""Says at once whether the Hugging Face hub can be reached; its client would retry for half a minute."""

TIMEOUT_SECONDS = 10.0


def is_reachable(hub_id: str, revision: str | None = None) -> bool:
    """Returns whether the hub answers for a model, also with an error. If not, only the local cache can be used."""
    # huggingface_hub is slow to import, and local directories do not need it.
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(hub_id, revision=revision, timeout=TIMEOUT_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return True  # the download says what is wrong
    except Exception:  # its type depends on the HTTP library of the installed version
        return False
    return True
