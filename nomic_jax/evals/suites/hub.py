"""Data sets of the Hugging Face hub: reached or not, gated, of another form: said at once and in plain words."""

import sys
from collections.abc import Mapping
from typing import Any

from nomic_jax.data.formats.hub import load_split
from nomic_jax.evals.tasks.contract import TaskError

TIMEOUT_SECONDS = 10.0


def is_reachable() -> bool:
    """Whether the hub answers. If not, the libraries are told so: they then take what is cached and do not retry."""
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
            return True
        except Exception as error:  # of whichever HTTP library the installed version uses
            print(
                f"warning: the hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}); only data sets "
                f"in the cache of Hugging Face will be found",
                file=sys.stderr,
            )
    import datasets

    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    return False


def load(path: str, name: str | None, split: str) -> Any:
    """A split of a data set of the hub, or of the cache.

    Raises:
      TaskError: it cannot be had; the message says why and what to do.
    """
    try:
        return load_split(path, name, split)
    except Exception as error:
        raise TaskError(explain(error, path)) from error


def download(path: str, file: str) -> str:
    """A file of a data set of the hub, or of the cache: where it lies. Raises TaskError as ``load`` does."""
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(path, file, repo_type="dataset")
    except Exception as error:
        raise TaskError(explain(error, path)) from error


def explain(error: Exception, path: str = "") -> str:
    """What a person can do about an error of a data set; ``path`` is its name on the hub, if known."""
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
            f"{of} cannot be reached and is not in the cache: go online and run the same command again, or fetch it on "
            f"another machine and copy the cache (HF_HOME), or name local files with --data where the suite takes them"
        )
    if "scripts are no longer supported" in text:
        return (
            f"{of} is published as a loading script, which `datasets` no longer runs, and the hub has no conversion of "
            f"it; fetch the data elsewhere and name them with --data, or install datasets<4"
        )
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError", "EntryNotFoundError"}:
        return f"{of} does not exist on the hub, or is private: {text[:300]}"
    if isinstance(error, KeyError) or "column" in text.lower() or names & {"CastError", "DatasetGenerationCastError"}:
        return f"{of} has another form than this task expects ({type(error).__name__}: {text[:300]})"
    return f"{type(error).__name__}: {text[:500]}"


def column(row: Mapping[str, Any], name: str, path: str) -> Any:
    if name not in row:
        raise TaskError(f"{path} has another form than expected: no column {name!r}, but {', '.join(map(repr, row))}")
    return row[name]
