"""Several processes that work on one run, one for each machine or each accelerator.

All of them run the same command and the same program on one mesh of all their devices (`diffusion.sharding`). Each
reads its share of a batch; the first one prints, and writes every file, in a folder that all can read.

    python -m experiments.train --distributed                     under SLURM, Open MPI, Kubernetes, on TPU pods
    python -m experiments.train --coordinator=HOST:PORT --num_processes=2 --process_id=0       elsewhere, in each
"""

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from absl import flags

from experiments import signals

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Work with the other processes that the cluster started, as its environment variables say."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process, where no cluster tells.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which of them this is.", lower_bound=0)
_TIMEOUT = flags.DEFINE_integer(
    "process_timeout", 100, "Seconds without a sign of life after which a process counts as lost.", lower_bound=10
)
# What JAX and its communication say, in errors of several types, when a process is gone.
_UNREACHABLE = re.compile(r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]oordination ?[Ss]ervice")


@contextmanager
def joined() -> Iterator[None]:
    """What is done together with the other processes, if there are any.

    An error in one of several ends it at once, with a message, so that the others notice; they end in the same way.
    """
    join()
    try:
        yield
    except (Exception, KeyboardInterrupt) as e:
        if not several() or isinstance(e, signals.Stopped):
            raise
        interrupted = isinstance(e, KeyboardInterrupt)
        said = f"process {jax.process_index()} of {jax.process_count()}: "
        if interrupted:
            said += "interrupted; files saved before are complete."
        elif _UNREACHABLE.search(str(e)):
            said += (
                f"the others cannot be reached any more ({str(e).strip().splitlines()[0]:.300}). Start all processes "
                "again with the same commands: a training goes on from its newest checkpoint."
            )
        else:
            said += f"error: {e}"
            if not isinstance(e, ValueError | TypeError | OSError | FloatingPointError | ImportError):
                traceback.print_exc()
        if os.environ.get("PATCH_DIFFUSION_TRACEBACK"):
            traceback.print_exc()
        print(f"\n{said}", file=sys.stderr, flush=True)
        # Not sys.exit, which would wait for processes that wait for this one.
        os._exit(130 if interrupted else 1)


def join() -> None:
    """Connects this process to the others, if the flags say that there are any; before JAX is asked for devices.

    Raises:
      ValueError: flags are missing or malformed, or there is no cluster.
      OSError: the others did not appear within five minutes.
    """
    explicit = {"coordinator": _COORDINATOR, "num_processes": _NUM_PROCESSES, "process_id": _PROCESS_ID}
    given = {name: holder.value for name, holder in explicit.items() if holder.value is not None}
    if given and len(given) < len(explicit):
        missing = [f"--{name}" for name in explicit if name not in given]
        raise ValueError(f"--{next(iter(given))} alone connects no processes: pass {' and '.join(missing)} too")
    if not given and not _DISTRIBUTED.value:
        return
    if given:
        if not re.fullmatch(r".+:\d+", _COORDINATOR.value):
            raise ValueError(f"--coordinator={_COORDINATOR.value} must be HOST:PORT, such as {_COORDINATOR.value}:8476")
        if _PROCESS_ID.value >= _NUM_PROCESSES.value:
            raise ValueError(
                f"--process_id={_PROCESS_ID.value} must be below --num_processes={_NUM_PROCESSES.value}: they count "
                "from 0"
            )
    try:
        jax.distributed.initialize(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            heartbeat_timeout_seconds=_TIMEOUT.value,
        )
    except ValueError as e:
        if given:
            raise ValueError(f"--coordinator={_COORDINATOR.value} connects no processes: {e}") from e
        raise ValueError(
            f"--distributed: no cluster was found ({e}); pass --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from e
    except RuntimeError as e:
        raise OSError(f"not all processes appeared ({str(e).splitlines()[0]:.300}): start every one of them") from e
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    # Their communication is set up here, where all of them are: it gives up where one comes half a minute later.
    wait("joined")


def first() -> bool:
    """Whether this process prints and writes files."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether there are others."""
    return jax.process_count() > 1


def wait(name: str) -> None:
    """Until all processes are here; `name` says where, and must be the same in all of them."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


@contextmanager
def first_alone(name: str) -> Iterator[None]:
    """The first process does this before the others, which find what it wrote."""
    if not first():
        wait(name)
    yield
    if first():
        wait(name)


def check_same(what: str, value: int) -> None:
    """Raises OSError unless all processes have the same value; all call it together."""
    if not several():
        return
    from jax.experimental import multihost_utils

    values = multihost_utils.process_allgather(np.int32(value)).tolist()
    if len(set(values)) > 1:
        raise OSError(
            f"{what} is {values} in the processes 0 to {len(values) - 1}: one of them could not read what the others "
            "did. Make sure that all of them can read the work directory, and start them again"
        )


def anywhere(asked: bool) -> bool:
    """Whether it holds in any process; all call it together."""
    if not several():
        return asked
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(asked).any())
