"""Data sets of the Hugging Face hub, with clear errors for unreachable, gated and unexpected data."""

import sys
from collections.abc import Mapping
from typing import Any

from nomic_jax.data.formats.hub import load_split
from nomic_jax.evals.tasks.contract import TaskError
from nomic_jax.extras import needs

TIMEOUT_SECONDS = 10.0


def is_reachable() -> bool:
    """Returns whether the hub answers. If not, makes the libraries use the cache, without retries."""
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
            return True
        except Exception as error:  # its type depends on the HTTP library of the installed version
            print(
                f"warning: the hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}); only data sets "
                f"in the cache of Hugging Face are available",
                file=sys.stderr,
            )
    with needs("this suite", "nomic_jax[eval]"):
        import datasets

    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    return False


def load(path: str, name: str | None, split: str) -> Any:
    """Returns a split of a data set from the hub or the cache.

    Raises:
      TaskError: the split cannot be loaded; the message says why and what to do.
    """
    try:
        return load_split(path, name, split)
    except Exception as error:
        raise TaskError(explain(error, path)) from error


def download(path: str, file: str) -> str:
    """Returns the local path of a data set's file, from the hub or the cache. Raises TaskError as ``load`` does."""
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(path, file, repo_type="dataset")
    except Exception as error:
        raise TaskError(explain(error, path)) from error


def explain(error: Exception, path: str = "") -> str:
    """Returns what the user can do about an error of a data set; ``path`` is its name on the hub, if known."""
    text = " ".join(str(error).split())
    names: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        names |= {kind.__name__ for kind in type(cause).__mro__}
        reason = " ".join(str(cause).split())
        text += "" if reason in text else f" {reason}"
        cause = cause.__cause__ or cause.__context__
    of = f"the data set {path}" if path else "the data set"
    if "GatedRepoError" in names or "is a gated dataset" in text:
        return (
            f"{of} is gated: accept its terms on the hub, then log in (`hf auth login`, or HF_TOKEN), "
            f"and run the same command again"
        )
    unreachable = {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "Timeout"}
    if names & unreachable or "reach the Hugging Face Hub" in text:
        return (
            f"{of} cannot be reached and is not in the cache: go online and run the command again, or download it "
            f"on another machine and copy the cache (HF_HOME), or name local files with --data if the suite takes them"
        )
    if "scripts are no longer supported" in text:
        return (
            f"{of} is published as a loading script, which `datasets` no longer runs, and the hub has no conversion of "
            f"it; get the data elsewhere and name them with --data, or install datasets<4"
        )
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError", "EntryNotFoundError"}:
        return f"{of} does not exist on the hub, or is private: {text[:300]}"
    if isinstance(error, KeyError) or "column" in text.lower() or names & {"CastError", "DatasetGenerationCastError"}:
        return f"{of} has a different format than this task expects ({type(error).__name__}: {text[:300]})"
    return f"{type(error).__name__}: {text[:500]}"


def column(row: Mapping[str, Any], name: str, path: str) -> Any:
    if name not in row:
        raise TaskError(f"{path} has an unexpected format: no column {name!r}, but {', '.join(map(repr, row))}")
    return row[name]
