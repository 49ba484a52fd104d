"""Models on the Hugging Face hub: downloads them into local directories, and uploads exports."""

import re
from pathlib import Path

from nomic_jax.data.tokens.hub import is_reachable
from nomic_jax.files.merging import finish_merge, read_hashes
from nomic_jax.hf.files import MAIN_FILE, CheckpointError, check_file, is_exported

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


def is_hub_name(path: str | Path) -> bool:
    """Returns whether a path names a model of the hub, ORGANISATION/NAME or ORGANISATION/NAME@REVISION, and no file.

    A path whose first folder exists is a mistyped path.
    """
    return _NAME.fullmatch(str(path)) is not None and not Path(path).parts[0].startswith(".") and not _exists(path)


def _exists(path: str | Path) -> bool:
    return Path(path).exists() or Path(Path(path).parts[0]).exists()


def split_revision(name: str) -> tuple[str, str | None]:
    """Returns the name and the revision of ORGANISATION/NAME@REVISION; None without one."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2]) if found else (name, None)


def pinned(name: str) -> str:
    """Returns ORGANISATION/NAME@COMMIT for the commit that a name stands for now; downloads the model.

    Raises:
      FileNotFoundError: see ``download``.
    """
    return f"{split_revision(name)[0]}@{download(name).name}"


def download(
    hub_id: str,
    revision: str | None = None,
    *,
    token: bool | str | None = None,
    cache_folder: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Returns the local copy of a hub model: configuration, tokenizer, card and weights (safetensors if available).

    Args:
      hub_id: "organisation/name".
      revision: branch, tag or commit; None for the main branch.
      token: of ``hf auth login``, for private and gated models; None for the one that is stored, False for none.
      cache_folder: where copies are kept; None for huggingface_hub's own folder.
      local_files_only: take the copy that is there and do not ask the hub.

    Args:
      hub_id: ORGANISATION/NAME, or ORGANISATION/NAME@REVISION.
      revision: branch, tag or commit.

    Raises:
      FileNotFoundError: the hub has no model with that name, or cannot be reached.
    """
    if revision is None:
        hub_id, revision = split_revision(hub_id)
    # huggingface_hub is slow to import, and local directories do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=cached,
                token=token,
                cache_dir=cache_folder,
            )
        )

    try:
        cached = local_files_only or not is_reachable(hub_id, revision)
        directory = fetch("*.json", "*.safetensors", "vocab.txt", "README.md")
        if not any(directory.glob("*.safetensors")):
            directory = fetch("*.json", "pytorch_model.bin", "vocab.txt", "README.md")
        return directory
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{hub_id} is not a directory and could not be fetched from the hub ({type(error).__name__}: {error})"
        ) from error


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads an export in one commit. The repository is made if it is missing; its other files stay.

    Only files that the export wrote leave the machine, as they are now: an edited model card is uploaded. The
    environment variable HF_ENDPOINT names another hub.

    Args:
      directory: written by ``write_checkpoint`` (``convert.to_hf``, ``Embedder.save_pretrained``).
      repo_id: "name" or "organisation/name".
      token: with write access; by default that of ``hf auth login`` or HF_TOKEN.
      private: visibility of the repository; None for the default of its owner. An existing repository of the other
        visibility is refused, and nothing is uploaded.
      revision: the branch to commit to, made from the main branch if it is missing; None for the main branch.
      commit_message: "Upload a nomic_jax model" by default.
      create_pr: open a pull request against the main branch, which needs no write access.

    Returns:
      The URL of the commit, or of the pull request.

    Raises:
      CheckpointError: the directory is no export, or misses a file of one.
      ValueError: ``repo_id`` or the model card is invalid, the visibility is the other one, or both ``revision`` and
        ``create_pr`` are given.
      OSError: the hub refuses, or cannot be reached.
    """
    if create_pr and revision is not None:
        raise ValueError("a pull request is opened against the main branch; leave out revision or create_pr")
    files = _export_files(Path(directory))

    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token, library_name="nomic_jax")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with its owner
        if private is not None and (is_private := api.model_info(repo_id).private) != private:
            now, wanted = ("private", "public") if is_private else ("public", "private")
            raise ValueError(
                f"{repo_id} exists and is {now}, not {wanted}; nothing was uploaded. Change the visibility in its "
                f"settings, or choose another name"
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, str(path)) for name, path in files.items()],
            commit_message=commit_message or "Upload a nomic_jax model",
            revision=revision,
            create_pr=create_pr,
        )
    except HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        advice = ". Log in with `hf auth login`, or give a token with write access" if refused else ""
        raise OSError(f"{repo_id}: the hub refused the upload ({' '.join(str(error).split())}){advice}") from error
    except (ValueError, OSError):
        raise
    except Exception as error:  # its type depends on the HTTP library of the installed version
        reason = f"{type(error).__name__}: {error.__cause__ or error}"
        raise OSError(f"{repo_id}: the upload failed ({reason}); run it again when the hub can be reached") from error
    return (commit.pr_url if create_pr else None) or commit.commit_url


def _export_files(directory: Path) -> dict[str, Path]:
    """Returns the files of an export, by their names in it."""
    finish_merge(directory, main=MAIN_FILE, is_ours=is_exported)
    names = [name for name in read_hashes(directory) if is_exported(name)]
    if MAIN_FILE not in names:
        raise CheckpointError(f"{directory}: is no export; write one with nomic-jax to-hf")
    for name in names:
        check_file(directory / name)
    return {name: directory / name for name in sorted(names)}
