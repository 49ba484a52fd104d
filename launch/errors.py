"""Runs a command: a user error prints one line on stderr and exits with code 2; a preemption exits with code 75."""

import difflib
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from tqdm import tqdm

from nomic_jax.data.formats import file_systems
from nomic_jax.data.formats.file_format import MAX_ROW_MIB, set_max_row_mib
from nomic_jax.files.printable import printable
from nomic_jax.jobs.shards import ShardEnded
from nomic_jax.train.interruption import EXIT_CODE, Preempted, say

from . import config_files
from .gpu import prepare_gpus

_ALLOW = flags.DEFINE_list(
    "allow_protocols",
    [],
    "Further file systems of fsspec that URLs may name, such as sftp,abfs. A few can run code: you trust the URLs.",
)
_MAX_ROW = flags.DEFINE_integer("max_row_mib", MAX_ROW_MIB, "Size of the largest row that is read, in MiB.", 1, 1 << 16)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "On an error, print the traceback.")


def run(main: Callable[[list[str]], None], arguments: tuple[str, ...] = (), *, shares_gpu_memory: bool = False) -> None:
    """Runs ``main`` with ``app.run``, after ``launch.gpu.prepare_gpus``.

    ValueError, OSError and ModuleNotFoundError are user errors and print one line. Other exceptions are defects and
    keep their traceback.

    Args:
      main: gets the positional arguments, those that are not flags.
      arguments: names of the positional arguments that ``main`` requires, for error messages.
      shares_gpu_memory: another library than jax may use a GPU in this process.
    """

    def guarded(argv: list[str]) -> None:
        # Orbax logs every renamed file at level INFO. It also logs an error at length from each of its threads before
        # it raises the error.
        logging.set_verbosity(logging.FATAL)
        _show_warnings_once()
        prepare_gpus(share_memory=shares_gpu_memory)
        sys.unraisablehook = _ignore_closed_event_loop
        try:
            file_systems.allow_protocols(_ALLOW.value)
            if _MAX_ROW.present:
                set_max_row_mib(_MAX_ROW.value)
            given = argv[1:]
            if len(given) > len(arguments):
                unexpected = given[len(arguments)]
                raise ValueError(
                    f"unexpected argument {unexpected!r}; quote patterns (--input='*.jsonl'), and see --help"
                )
            if len(given) < len(arguments):
                raise ValueError(f"the argument {arguments[len(given)]} is missing; see --help")
            main(given)
        except Preempted as stop:
            say(str(stop))
            sys.exit(EXIT_CODE)
        except ShardEnded as end:
            print(end)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            if _TRACEBACK.value:
                raise
            _exit(error)

    app.run(guarded, flags_parser=_parse_flags)


def refer(module: str, doc: str | None, command: str) -> NoReturn:
    """Ends a module of this folder that is not a command: names the command whose part it is."""
    print(f"{doc}\nlaunch.{module} is a part of other commands: see nomic-jax {command} --help")
    sys.exit(0 if {"--help", "-h", "--helpfull", "--helpshort"} & set(sys.argv) else 2)


def _show_warnings_once() -> None:
    """Prints a warning in one line, and warnings that differ only in numbers once.

    For example, every batch warns about the number of texts that it cut.
    """
    shown = set()

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        kind = re.sub(r"\d+", "", str(message))
        if kind not in shown:
            shown.add(kind)
            tqdm.write(printable(f"warning: {message}"), file=sys.stderr)

    warnings.showwarning = show


def _ignore_closed_event_loop(unraisable: Any) -> None:
    # When a save fails, tensorstore reports each file to orbax, even after orbax has stopped waiting.
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except SystemExit:
        if "config" in flags.FLAGS:
            print("\n" + config_files.explain_fields())
        sys.exit(0)  # only --help and its like end here; absl would exit with 1
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # absl raises flags.Error; ml_collections raises the others for an unknown field of --config.
        _exit(error)


# Names of fields in other libraries.
_SYNONYMS = {
    "learning_rate": "optim.lr",
    "optimizer": "optim",
    "warmup_steps": "optim.warmup",
    "warmup_ratio": "optim.warmup",
    "adam_beta1": "optim.b1",
    "adam_beta2": "optim.b2",
    "max_grad_norm": "optim.clip_norm",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "gradient_accumulation_steps": "accumulate",
    "per_device_train_batch_size": "batch_size",
    "max_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "save_steps": "checkpoint.every",
    "eval_steps": "evaluation.every",
    "logging_steps": "log_every",
    "model_name_or_path": "init_from",
}


def _meant(name: str) -> str:
    """Returns ", did you mean ...?" for the field that a name probably stands for; "" if there is none."""
    from nomic_jax.train.config import TrainConfig
    from nomic_jax.train.typed_fields import paths_of

    paths = paths_of(TrainConfig)
    by_last = {path.rpartition(".")[2]: path for path in reversed(paths)}
    close = difflib.get_close_matches(name, by_last, n=1)
    found = _SYNONYMS.get(name) or (by_last[close[0]] if close else None)
    return f" there; did you mean --config.{found}?" if found else ""


def _exit(error: Exception) -> NoReturn:
    message = str(error)
    if isinstance(error, (AttributeError, KeyError)):
        # The text of a KeyError is quoted and escaped.
        name = message.strip("'\"")
        if name.isidentifier():
            message = f"there is no field {name!r}{_meant(name)}; --help explains the fields"
        message = "--config: " + message.strip("'").replace("\\n", ". ").replace("\\'", "'")
    print(printable(f"error: {' '.join(message.split())}"), file=sys.stderr)
    sys.exit(2)
