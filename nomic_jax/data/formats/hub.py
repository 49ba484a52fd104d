"""Finds the local files of data sets that are given by name. The files have random access.

    hf:sentence-transformers/all-nli?config=triplet&split=train     Hugging Face hub, or hf:A_LOCAL_FOLDER
    tfds:wiki40b/en:1.3.0?split=train&data_dir=DIR                  TensorFlow Datasets

Data sets of the hub are downloaded once, to the cache of ``datasets``. Those of TensorFlow Datasets must be prepared.
"""

import json
import os
import re
import urllib.parse
from pathlib import Path
from typing import Any

from nomic_jax.data.formats.array_record import ArrayRecordRows, is_array_record, read_features
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.extras import needs
from nomic_jax.files.folders import walk_files
from nomic_jax.files.reading import FileRefused

PREFIXES = ("hf:", "tfds:")
# The hub's own conversion of data sets whose authors wrote a loading script; `datasets` no longer runs scripts.
CONVERTED = "refs/convert/parquet"
# NAMESPACE:NAME is rejected: TensorFlow Datasets would download and execute third-party code.
_TFDS_NAME = re.compile(r"\w+(/[\w.+=-]+)?(:[\d.*]+)?")


def is_dataset_name(pattern: str) -> bool:
    return pattern.startswith(PREFIXES) and "://" not in pattern


def files_of(name: str) -> list[str]:
    """Returns the files of a data set's split, in order.

    Raises:
      FileNotFoundError: the data set is not available locally and cannot be downloaded.
      ValueError: the name, an option, the configuration or the split is invalid, or the split has no random access.
    """
    scheme, _, rest = name.partition(":")
    path, _, query = rest.partition("?")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    allowed = {"hf": {"config", "split", "revision"}, "tfds": {"split", "data_dir"}}[scheme]
    if not path or (unknown := sorted(options.keys() - allowed)):
        what = f"unknown option {unknown[0]!r}" if path else "no data set is named"
        raise ValueError(f"{name}: {what}; write {scheme}:NAME?split=train, options are {', '.join(sorted(allowed))}")
    split = options.setdefault("split", "train")
    if "[" in split:
        raise ValueError(f"{name}: parts of a split are not supported; name whole splits (train, or train+test)")
    return _hub_files(name, path, options) if scheme == "hf" else _tfds_files(name, path, options)


def load_split(path: str, config: str | None, split: str, revision: str | None = None) -> Any:
    """Loads a split with ``datasets``; uses the hub's own conversion if the authors published a loading script."""
    datasets = _datasets()
    try:
        return datasets.load_dataset(path, config, split=split, revision=revision)
    except RuntimeError as error:
        if "script" not in str(error) or revision:
            raise
        try:
            return datasets.load_dataset(path, config, split=split, revision=CONVERTED)
        except Exception as of_conversion:
            raise error from of_conversion


def _hub_files(name: str, path: str, options: dict[str, str]) -> list[str]:
    datasets = _datasets()
    datasets.disable_progress_bars()
    if not os.path.exists(path):
        _check_reachable(name, path)
    try:
        found = load_split(path, options.get("config"), options["split"], options.get("revision"))
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(f"{name}: cannot be loaded ({_first_line(error)})") from error
    except ValueError as error:
        raise ValueError(f"{name}: {_first_line(error)}") from error
    finally:
        datasets.enable_progress_bars()
    files = [file["filename"] for file in found.cache_files]
    if not files:
        raise ValueError(f"{name}: `datasets` keeps it in memory only; save it with save_to_disk and name the folder")
    return files


def _datasets() -> Any:
    with needs("reading data sets of the hub", "nomic_jax[data]"):
        import datasets
    return datasets


def _check_reachable(name: str, path: str) -> None:
    """Raises FileNotFoundError at once if the data set cannot be reached; `datasets` would retry for half a minute."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return  # `datasets` only reads its cache
    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=10)
    except Exception as error:  # network errors, hub errors and malformed names
        raise FileNotFoundError(
            f"{name}: there is no folder {path!r}, and the data set could not be reached on the hub "
            f"({type(error).__name__}: {_first_line(error)}); set HF_HUB_OFFLINE=1 to use an earlier download"
        ) from error


def _tfds_files(name: str, path: str, options: dict[str, str]) -> list[str]:
    with needs(name, "nomic_jax[data]"):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.data_sources.base import file_instructions
    if not _TFDS_NAME.fullmatch(path):
        raise ValueError(f"{name}: not the name of a prepared data set; write tfds:NAME[/CONFIG][:VERSION]")
    data_dir = Path(options.get("data_dir") or tfds.core.constants.DATA_DIR).expanduser()
    # The folder may be a link: its place is the user's choice. What is in it is the author's.
    folder = (data_dir / re.split("[/:]", path)[0]).resolve()
    if folder.is_dir():
        _check_features(folder, name)
    try:
        source: Any = tfds.data_source(path, split=options["split"], data_dir=str(data_dir), download=False)
        instructions = file_instructions(source.dataset_info, options["split"])
    except json.JSONDecodeError as error:
        raise _broken(name, error) from error
    except (ImportError, AssertionError, NotImplementedError, OSError, ValueError) as error:
        # If the data set is not prepared, the error is a long request to install TensorFlow.
        raise FileNotFoundError(
            f"{name}: {_first_line(error)} (looked for it in {data_dir}; "
            f'it must be prepared there, with file_format="array_record" or "parquet")'
        ) from error
    files = [os.fspath(instruction.filename) for instruction in instructions]
    for file, instruction in zip(files, instructions):
        expected = instruction.examples_in_shard
        if is_array_record(file) and (found := len(ArrayRecordRows(file, {}, ()))) != expected:
            raise BadRow(f"{file}: has {found} rows, but dataset_info.json says {expected}; prepare the data set again")
    return files


def _broken(name: str, error: Exception) -> BadRow:
    return BadRow(
        f"{name}: features.json or dataset_info.json of the prepared data set is broken ({error}); prepare it again"
    )


def _check_features(folder: Path, name: str) -> None:
    """Checks everything that TensorFlow Datasets may open below the folder of a data set.

    Raises:
      BadRow: a features.json cannot be used; see ``read_features``. Something below the folder is a link or no file.
    """
    try:
        files = list(walk_files(folder))
    except FileRefused as error:
        raise BadRow(f"{name}: {error}") from error
    for file in files:
        if file.name == "features.json":
            try:
                read_features(folder / file)
            except (OSError, FileRefused) as error:
                raise _broken(name, error) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
