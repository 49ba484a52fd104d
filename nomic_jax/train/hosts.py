"""Several processes as one run: how they connect, and the messages they exchange besides the collectives.

Every process runs the same command and computes the same plan. Each process builds only its own rows of a batch. The
first process writes what is written once (metrics, configuration, messages). Messages go through the coordination
service of ``jax.distributed``, not through the devices: waiting there has no time limit, which hours of tokenising
need, and it can report which process failed.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

# There is no public way to the key-value store of jax.distributed.
from jax._src import distributed

import nomic_jax
from nomic_jax.train.interruption import EXIT_CODE

PATIENCE_SECONDS = 20
CONNECT_SECONDS = 900  # one host may take longer than another to pull a container image
POLL_SECONDS = 2
VISIBLE_SECONDS = 90  # an NFS client may notice new files of other hosts only after a minute
_FAILURES = "nomic_jax/failures"
_numbers = itertools.count()


class DistributedError(ValueError):
    """Processes that cannot run together; the message names the flag, variable or host."""


class OtherProcessFailed(ValueError):
    """Another process ended with an error; the message repeats it."""


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of one process in a run.

    Attributes:
      coordinator_address: host:port of the first process.
      num_processes, process_id: number of processes, and the index of this one, from 0.
      local_device_ids: the GPUs of this host that the process uses; None for all visible ones.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        host, _, port = self.coordinator_address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise DistributedError(
                f"--coordinator_address is {self.coordinator_address!r}; write host:port of the process with "
                f"--process_id=0, the same for all"
            )
        if not 0 <= self.process_id < self.num_processes:
            raise DistributedError(
                f"--process_id is {self.process_id} of --num_processes={self.num_processes}; the processes are "
                f"numbered 0 to {self.num_processes - 1}"
            )


def place_from_flags(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> Place | None:
    """The place that the flags describe; None if no flag is given.

    Raises:
      DistributedError: some flags are missing, or a value cannot be used.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if coordinator_address is None or num_processes is None or process_id is None:
        raise DistributedError(f"{', '.join(missing)} is missing; several processes need {', '.join(given)}")
    return Place(coordinator_address, num_processes, process_id)


def place_from_slurm(environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place of a process that ``srun`` started with others; None for a single process, a shell or a batch script.

    JAX's own detection has two faults. It gives each process one GPU even if srun starts one process per node. It also
    counts the batch script itself as a process, because SLURM sets nearly the same variables there.
    """
    # SLURM_NTASKS describes the allocation; only this variable describes what srun started.
    count = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if count == 1:
        return None
    try:
        # node[001-004,7],other -> node001
        host = re.sub(r"\[(\d+)[^]]*\]", r"\1", environ["SLURM_STEP_NODELIST"]).partition(",")[0]
        job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
        process_id, nodes = int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_NODES"])
        local_id = int(environ["SLURM_LOCALID"])
    except (KeyError, ValueError) as error:
        raise DistributedError(
            f"srun started {count} processes, but {error} is missing or not what SLURM sets; give "
            f"--coordinator_address, --num_processes and --process_id instead, or --distributed=off"
        ) from error
    # An ephemeral port that differs between steps, so that two steps at a time do not collide.
    port = 61_440 + (job * 7 + step) % 4096
    # With several processes on a node, each uses one GPU, unless srun already shows each process one GPU only.
    alone = count == nodes or len(environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    return Place(f"{host}:{port}", count, process_id, None if alone else (local_id,))


def connect(place: Place) -> None:
    """Connects the processes; to be called before anything else of JAX. Returns once all processes have connected.

    After CONNECT_SECONDS without them, JAX ends the process with a stack trace. The message before it says what to
    check.

    Raises:
      DistributedError: the first process cannot listen at its address.
    """
    who = f"process {place.process_id} of {place.num_processes} on {socket.gethostname()}"
    message = (
        f"{who} is waiting for the others: are all running, can they reach {place.coordinator_address}, and is process "
        f"0 there? It waits for {CONNECT_SECONDS // 60} minutes"
    )
    patience = threading.Timer(PATIENCE_SECONDS, lambda: print(message, file=sys.stderr, flush=True))
    patience.start()
    try:
        jax.distributed.initialize(
            place.coordinator_address,
            place.num_processes,
            place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=CONNECT_SECONDS,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DistributedError(f"{who} cannot coordinate at {place.coordinator_address}: {reason}") from error
    finally:
        patience.cancel()


def connect_as_jax_finds() -> None:
    """Connects like ``connect``, by JAX's own detection of Open MPI, the Kubernetes API and TPU pods.

    Raises:
      DistributedError: JAX detects none of them.
    """
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise DistributedError(
            f"--distributed=jax: JAX finds no Open MPI, Kubernetes or TPU pod here ({error}); "
            f"give --coordinator_address, --num_processes and --process_id instead"
        ) from error


def _client() -> Any:
    client = distributed.global_state.client
    assert client is not None, "several processes, and jax.distributed.initialize was not called"
    return client


def is_first_process() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def exchange(text: str) -> list[str]:
    """Returns the texts of all processes, in process order. Every process must make the same calls.

    Raises:
      OtherProcessFailed: a process ended with an error instead.
    """
    if jax.process_count() == 1:
        return [text]
    call = f"nomic_jax/exchange/{next(_numbers)}"
    _client().key_value_set(f"{call}/{jax.process_index()}", text)
    return [_wait_for(f"{call}/{i}") for i in range(jax.process_count())]


def on_first_process(value: Callable[[], Any]) -> Any:
    """Returns ``value()``, which the first process computes while the others wait. The value must be JSON.

    Raises:
      OtherProcessFailed: the first process failed.
    """
    if jax.process_count() == 1:
        return value()
    key = f"nomic_jax/on_first_process/{next(_numbers)}"
    if is_first_process():
        _client().key_value_set(key, json.dumps(value()))
    return json.loads(_wait_for(key))


def _wait_for(key: str) -> str:
    client = _client()
    while True:
        try:
            return client.blocking_key_value_get(key, POLL_SECONDS * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        for _, failure in client.key_value_dir_get(_FAILURES):
            raise OtherProcessFailed(failure)


def check_agreement(config: Mapping[str, Any], data: str) -> None:
    """Checks that all processes have the same configuration, data fingerprint, versions and number of devices.

    Raises:
      DistributedError: in all processes, if one differs.
    """
    own: dict[str, Any] = {"host": socket.gethostname()}
    fields = jax.tree.leaves_with_path(config)
    own |= {f"config.{jax.tree_util.keystr(path, simple=True, separator='.')}": value for path, value in fields}
    own |= {"data fingerprint": data, "number of devices": jax.local_device_count()}
    own["version of nomic_jax"] = nomic_jax.__version__
    own |= {f"version of {name}": importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    first, *others = [json.loads(text) for text in exchange(json.dumps(own))]
    for i, other in enumerate(others, 1):
        for name, value in first.items():
            if name != "host" and other.get(name) != value:
                raise DistributedError(
                    f"process {i} on {other['host']} has the {name} {other.get(name)!r}, process 0 on {first['host']} "
                    f"has {value!r}; all processes need the same command, files, versions and devices"
                )


def check_shared(directory: Path) -> None:
    """Checks that all processes see the same directory.

    Raises:
      DistributedError: in all processes, if one does not see a file of the first process.
    """
    if jax.process_count() == 1:
        return
    name = on_first_process(lambda: f".shared-{secrets.token_hex(8)}")
    if is_first_process():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    exchange("")
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (sees := (directory / name).exists()) and time.monotonic() < deadline:
        time.sleep(1)
    blind = [host for host in exchange("" if sees else socket.gethostname()) if host]
    if is_first_process():
        (directory / name).unlink()
    if blind:
        raise DistributedError(
            f"{directory.absolute()} is not the same directory on {', '.join(blind)} as on the host of the first "
            f"process; --workdir must be on a file system that all hosts share"
        )


@contextlib.contextmanager
def leave_on_error() -> Iterator[None]:
    """Wraps a whole command: a process that ends with an error tells the others, and exits without waiting for them.

    JAX's exit handler would wait for all processes, which in turn wait for this one.
    """
    try:
        yield
    except SystemExit as end:
        if end.code in (None, 0, EXIT_CODE):
            raise  # all processes are ending
        code, cause = end.code if isinstance(end.code, int) else 1, end.__context__
        if not jax.distributed.is_initialized():
            raise
    except BaseException as error:
        code, cause = 1, error
        if not jax.distributed.is_initialized():
            raise
        # stderr may be closed, as stdout after `... | head`. The other processes must hear of the error all the same.
        with contextlib.suppress(OSError, ValueError):
            if isinstance(error, KeyboardInterrupt):
                print("interrupted", file=sys.stderr)
            else:
                traceback.print_exc()
    else:
        return
    state = distributed.global_state
    # A process that fails because another one failed has no new error to report.
    if not isinstance(cause, OtherProcessFailed):
        reason = f"process {state.process_id} on {socket.gethostname()} failed: {cause or f'exit code {code}'}"
        with contextlib.suppress(Exception):
            _client().key_value_set(f"{_FAILURES}/{state.process_id}", reason, allow_overwrite=True)
    if state.process_id == 0:
        # The service ends with the first process, and the others with the service. They need time to read the error.
        time.sleep(3 * POLL_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
