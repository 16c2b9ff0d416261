"""Runs of several processes: they compute what one does, stop together, survive a lost one, and go on elsewhere."""

import os
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import processes
from experiments.configs import smoke
from tests.experiments.runs import ROOT, call, rows, samples, state

# The training, in which one process gets a signal after a step; small arrays are split too.
PROGRAM = """
import os, runpy, signal, sys
import jax
from diffusion import sharding
from experiments import hooks

sharding.SMALLEST = 64
after, name, process = int(sys.argv.pop(1)), sys.argv.pop(1), int(sys.argv.pop(1))
check = hooks.check_finite

def signalled(done, *given):
    check(done, *given)
    if done == after and jax.process_index() == process:
        os.kill(os.getpid(), getattr(signal, name))

hooks.check_finite = signalled
from experiments import train
train.command.run(train.main, train.define_config)
"""


# What ends the first process: the broken connection, or JAX itself where that is not noticed.
LOST = "^\\nprocess 0 of 2: the others cannot be reached .* same commands|heartbeat"
SAMPLE = ("--num_samples=11", "--batch_size=6", "--steps=3")


def start(workdir, devices, *given, after=0, name="SIGTERM", process=0, sampled=False, program=None):
    """A process of the training, of sampling, or of another program, with so many devices."""
    config = ROOT / "experiments/configs/smoke.py"
    command = [sys.executable, "-c", PROGRAM, str(after), name, str(process), f"--config={config}",
               f"--workdir={workdir}", "--config.train.save_every=2", "--config.train.eval_every=3",
               "--config.train.eval_count=8", "--config.train.batch_size=8", "--config.sample.count=20",
               "--config.model.depth=1", "--config.train.sample_every=100", *given]  # fmt: skip
    if sampled:
        command = [sys.executable, "-m", "experiments.sample", f"--workdir={workdir}", *SAMPLE, *given]
    if program:
        command = [sys.executable, "-c", *program, *given]
    forced = f"--xla_force_host_platform_device_count={devices}"
    changed = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {forced}", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=os.environ | changed, cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def together(workdir, number, *given, **signalled):
    """So many processes of two devices each, until all have ended: (status, printed, errors) of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        start(workdir, 2, f"--coordinator=localhost:{port}", f"--num_processes={number}", f"--process_id={i}",
              "--process_timeout=20", *given, **signalled)
        for i in range(number)
    ]  # fmt: skip
    return [(p.returncode, *said) for p in started for said in [p.communicate(timeout=300)]]


def alone(workdir, devices, *given, **signalled):
    p = start(workdir, devices, *given, **signalled)
    said = p.communicate(timeout=300)
    return p.returncode, *said


@pytest.mark.slow
def test_a_run_goes_from_two_processes_to_one_to_eight_devices_and_is_the_same_run(tmp_path):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    status, printed, errors = alone(whole, 1)
    assert status == 0, errors

    # Two processes; the second gets a signal after step 2, and both stop at the next step after which anything is due.
    ended = together(moved, 2, "--config.mesh.fsdp=2", after=2, process=1)
    assert [status for status, *_ in ended] == [130, 130], ended
    assert "Stopped at step 3" in ended[0][2]
    assert "training from step 0" in ended[0][1]
    assert "step" not in ended[1][1], "only the first process prints"
    # One device, and then eight to the end.
    status, printed, errors = alone(moved, 1, after=4)
    assert status == 130, errors
    assert "continuing after step 3" in printed
    status, printed, errors = alone(moved, 8, "--config.mesh.fsdp=4")
    assert status == 0, errors
    assert "continuing after step 5" in printed

    for one, other in zip(rows(whole), rows(moved), strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=2e-5)
    assert sum("held_out_loss" in row for row in rows(moved)) == 3
    config = smoke.get_config()
    config.model.depth = 1
    a, b = (jax.tree.leaves(state(config, folder)) for folder in (whole, moved))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    (images, labels), (others, other_labels) = samples(whole), samples(moved)
    np.testing.assert_array_equal(labels, other_labels)
    assert np.abs(images.astype(int) - others).max() <= 1
    assert (images != others).mean() < 0.01

    # Samples of it on eight devices, in batches that they fill up, are those of one.
    status, printed, errors = alone(moved, 8, "--fsdp=4", f"--outdir={tmp_path}/eight", sampled=True)
    assert status == 0, errors
    call(moved, *SAMPLE, f"--outdir={tmp_path}/one")
    found = [samples(tmp_path / name)[0].astype(int) for name in ("one", "eight")]
    assert len(found[0]) == 11
    assert np.abs(found[0] - found[1]).max() <= 1


FAILING = """
import sys, time
import jax
from absl import flags
from experiments import processes

kind = sys.argv.pop(1)
flags.FLAGS(sys.argv)
with processes.joined():
    if kind == "differ":
        processes.check_same("the step", 3 + jax.process_index())
    elif jax.process_index():
        raise {"error": KeyError, "interrupt": KeyboardInterrupt, "value": ValueError}[kind]("of one")
    processes.wait("for a lost one")
"""


FAILURES = {  # status of the second process, and what the first and the second say
    "differ": (1, r"^\nprocess 0 of 2: error: the step is \[3, 4\] in the processes 0", r"the step is \[3, 4\]"),
    "error": (1, LOST, "Traceback(.|\n)*process 1 of 2: error: 'of one'$"),
    "value": (1, LOST, "^\nprocess 1 of 2: error: of one$"),
    "interrupt": (130, LOST, "^\nprocess 1 of 2: interrupted"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAILURES)
def test_an_error_of_one_process_ends_all_with_what_each_knows(kind):
    status, first, second = FAILURES[kind]
    ended = together(None, 2, program=(FAILING, kind))
    assert ended[0][0] in (1, -signal.SIGABRT), ended
    assert ended[1][0] == status, ended
    for (_, _, errors), wanted in zip(ended, (first, second), strict=True):
        assert re.search(wanted, errors.rstrip()), errors
    assert kind == "error" or "Traceback" not in ended[1][2]


@pytest.fixture
def given():
    """Parses flags of processes."""
    with flagsaver.flagsaver():
        yield lambda *arguments: flags.FLAGS(["train", *arguments])


def test_flags_that_connect_no_processes_are_refused(given):
    given("--coordinator=localhost:1")
    with pytest.raises(ValueError, match="--coordinator alone connects no processes: pass --num_processes and"):
        processes.join()
    given("--coordinator=localhost:1", "--num_processes=2", "--process_id=2")
    with pytest.raises(ValueError, match="--process_id=2 must be below --num_processes=2"):
        processes.join()


def test_without_a_cluster_the_flags_for_another_place_are_named(given, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "KUBERNETES", "TPU", "CLOUD_TPU")):
            monkeypatch.delenv(name)
    # As in a new process, in which JAX has not been asked for devices.
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    given("--distributed")
    with pytest.raises(ValueError, match="no cluster was found .*--coordinator=HOST:PORT --num_processes=N"):
        processes.join()


def test_an_error_of_one_process_alone_is_not_changed(given):
    given()
    with pytest.raises(ValueError, match="as it is"), processes.joined():
        raise ValueError("as it is")
    assert processes.anywhere(True)
    assert not processes.anywhere(False)


def test_sampling_on_a_mesh_that_devices_do_not_fill_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="--fsdp=3 must divide the number of devices, 1"):
        call(run.workdir, "--fsdp=3", f"--outdir={tmp_path}")
