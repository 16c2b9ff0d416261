"""Checkpoints: bit-exact round trips, detection of damage, no loss if the process is killed at any moment."""

import asyncio
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.io import checkpoint

OPTIMISER = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10))
)


class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    opt: Any


@cache
def state_of(seed: int) -> State:
    """A small training state in which every leaf depends on `seed`; from NumPy, so equal in all processes."""
    r = np.random.default_rng(seed)
    params = {
        "embed": {"kernel": jnp.asarray(r.normal(size=(3, 5)), jnp.float32)},
        "head": {"kernel": jnp.asarray(r.normal(size=(5, 2)), jnp.bfloat16), "scale": jnp.float32(r.normal())},
    }
    opt = jax.tree.map(lambda x: x + jnp.asarray(seed, x.dtype), OPTIMISER.init(params))
    return State(jnp.uint32(seed), params, jax.tree.map(lambda x: x * 2, params), opt)


def bits(tree: Any) -> list:
    """Structure, types, shapes, dtypes and bytes."""
    rows = [jax.tree.structure(tree)]
    for leaf in jax.tree.leaves(tree):
        words = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        rows.append((isinstance(leaf, jax.Array), leaf.shape, str(leaf.dtype), np.asarray(words).tobytes()))
    return rows


def files_of(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


def flip(path: Path, position: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def saved_two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        checkpoint.save(directory, step, state_of(step))
    return directory


@pytest.fixture
def two(saved_two, tmp_path):
    """A directory with checkpoints 1 and 2."""
    return shutil.copytree(saved_two, tmp_path / "two")


# Round trips


@pytest.mark.slow
def test_optimiser_state_is_restored_bit_for_bit(tmp_path):
    state = state_of(7)
    checkpoint.save(tmp_path, 7, state)
    restored, step = checkpoint.restore(tmp_path, state_of(0))
    assert step == 7
    assert bits(restored) == bits(state)
    abstract, _ = checkpoint.restore(tmp_path, jax.eval_shape(lambda: state_of(0)))
    assert bits(abstract) == bits(state)


@pytest.mark.parametrize(
    "leaf",
    [
        np.uint32(3),
        np.array(2.5),
        np.float32([[np.nan, -0.0], [np.inf, 1e-45]]),
        np.arange(12).reshape(3, 4).T,
        np.array([True, False]),
        np.array([1 + 2j], np.complex64),
        np.zeros((0, 4), np.float16),
        jnp.float32([-0.0]),
        jnp.zeros((2, 0), jnp.bfloat16),
        jnp.array([0.1, 3], jnp.float8_e4m3fn),
        jnp.array([-8, 7], jnp.int4),
        jax.random.key(3),
        jax.random.split(jax.random.key(4, impl="rbg"), 2),
    ],
    ids=lambda x: f"{type(x).__name__}-{x.dtype}-{x.shape}",
)
def test_every_kind_of_leaf_is_restored_bit_for_bit(tmp_path, leaf):
    state = State(np.uint32(0), {"leaf": leaf}, {"leaf": leaf, "list": [leaf, jnp.ones(1)]}, ())
    checkpoint.save(tmp_path, 0, state)
    restored, _ = checkpoint.restore(tmp_path, state)
    assert bits(restored) == bits(state)
    assert type(restored.params["leaf"]) is type(leaf)


def test_other_byte_orders_keep_their_values(tmp_path):
    swapped = np.array([1.5, -2.0], np.dtype(np.float32).newbyteorder())
    checkpoint.save(tmp_path, 0, State(np.uint32(0), swapped, {}, ()))
    restored, _ = checkpoint.restore(tmp_path, State(np.uint32(0), np.zeros(2, np.float32), {}, ()))
    assert restored.params.tolist() == [1.5, -2.0]


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    @jax.jit
    def train_step(state):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), state.step))
        gradients = jax.tree.map(lambda x: x * noise.astype(x.dtype), state.params)
        updates, opt = OPTIMISER.update(gradients, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(lambda a, b: (a * 0.9 + b * 0.1).astype(a.dtype), state.ema, params)
        return State(state.step + 1, params, ema, opt)

    whole = state_of(0)
    for _ in range(4):
        whole = train_step(whole)
    half = train_step(train_step(state_of(0)))
    checkpoint.save(tmp_path, 2, half)
    resumed, _ = checkpoint.restore(tmp_path, state_of(9))
    assert bits(resumed) != bits(whole)
    assert bits(train_step(train_step(resumed))) == bits(whole)
    assert train_step._cache_size() == 1  # a resumed state does not compile again


def test_restored_leaves_have_the_sharding_of_like(tmp_path):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = State(np.uint32(0), jnp.arange(4.0), {}, ())
    checkpoint.save(tmp_path, 0, state)
    struct = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)
    for like in (struct, jax.device_put(jnp.zeros(4), sharding)):
        restored, _ = checkpoint.restore(tmp_path, state._replace(params=like))
        assert restored.params.sharding == sharding
        assert restored.params.tolist() == [0, 1, 2, 3]
    uncommitted, _ = checkpoint.restore(tmp_path, state)
    assert not uncommitted.params.committed


def test_float64_is_not_rounded_silently(tmp_path):
    wide = np.array([0.1])
    checkpoint.save(tmp_path, 0, State(np.uint32(0), {}, {"w": wide}, ()))
    with pytest.raises(ValueError, match=r"ema\.w is float64.*jax_enable_x64"):
        checkpoint.restore_ema(tmp_path)


def test_works_inside_a_running_event_loop_as_in_a_notebook(tmp_path):
    async def cell():
        checkpoint.save(tmp_path, 1, state_of(1))
        return checkpoint.restore(tmp_path, state_of(0))[0]

    assert bits(asyncio.run(cell())) == bits(state_of(1))


# Damage


def test_a_flipped_byte_in_any_file_is_detected_and_the_previous_step_restored(two):
    files = files_of(two / "2")
    assert {p.relative_to(two / "2").parts[0] for p in files} >= {"step", "params", "ema", "opt", "digests.json"}
    for path in files:
        original = path.read_bytes()
        flip(path)
        messages = []
        restored, step = checkpoint.restore(two, state_of(0), report=messages.append)
        assert (step, bits(restored)) == (1, bits(state_of(1))), path
        assert len(messages) == 1, path
        assert f"{two / '2'} cannot be read" in messages[0], path
        assert "going back to step 1" in messages[0], path
        path.write_bytes(original)
    assert checkpoint.restore(two, state_of(0))[1] == 2


@pytest.mark.slow
def test_a_flipped_byte_in_the_digests_never_gives_another_state(two):
    path = two / "2" / "digests.json"
    original = path.read_bytes()
    for i in range(0, len(original), 401):
        flip(path, i / (len(original) - 1))
        restored, step = checkpoint.restore(two, state_of(0), report=lambda message: None)
        assert bits(restored) == bits(state_of(step)), i
        path.write_bytes(original)


def test_truncated_and_missing_files_are_detected(two):
    arrays = max(files_of(two / "2" / "params"), key=lambda p: p.stat().st_size)
    paths = [arrays, two / "2" / "digests.json", two / "2" / "_CHECKPOINT_METADATA"]
    damages = [lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(b""), Path.unlink]
    for path, damage in product(paths, damages):
        original = path.read_bytes()
        damage(path)
        restored, step = checkpoint.restore(two, state_of(0), report=lambda message: None)
        assert (step, bits(restored)) == (1, bits(state_of(1))), path
        path.write_bytes(original)
    shutil.rmtree(two / "2" / "opt")
    assert checkpoint.restore(two, state_of(0), report=lambda message: None)[1] == 1


def test_arrays_of_another_state_are_detected_even_if_their_file_digests_are_right(two, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    checkpoint.save(other, 2, state_of(5))
    shutil.rmtree(two / "2" / "ema")
    shutil.copytree(other / "2" / "ema", two / "2" / "ema")
    mine, theirs = (json.loads((d / "2" / "digests.json").read_text()) for d in (two, other))
    mine["files"] = {name: digest for name, digest in mine["files"].items() if not name.startswith("ema/")}
    mine["files"] |= {name: digest for name, digest in theirs["files"].items() if name.startswith("ema/")}
    (two / "2" / "digests.json").write_text(json.dumps(mine))
    messages = []
    restored, step = checkpoint.restore(two, state_of(0), report=messages.append)
    assert (step, bits(restored)) == (1, bits(state_of(1)))
    assert "leaf ema." in messages[0]
    assert "does not match its digest" in messages[0]


def test_incomplete_directories_are_skipped(two):
    (two / "3").mkdir()
    shutil.copytree(two / "2", two / "4.saving.orbax-checkpoint-tmp")
    shutil.copytree(two / "2", two / "5.old")
    (two / "6").write_text("a file")
    (two / "007").mkdir()
    assert checkpoint.steps(two) == [1, 2, 3]
    assert checkpoint.latest(two) == 3
    with pytest.warns(UserWarning, match="going back to step 2"):
        assert checkpoint.restore(two, state_of(0))[1] == 2
    checkpoint.save(two, 3, state_of(3))
    assert sorted(p.name for p in two.iterdir()) == ["007", "1", "2", "3", "6"]
    assert checkpoint.restore(two, state_of(0))[1] == 3


def test_the_error_lists_all_checkpoints_that_were_tried(two):
    for step in (1, 2):
        flip(two / str(step) / "digests.json")
        flip(files_of(two / str(step) / "ema")[0])
    messages = []
    everything = r"(?s)no checkpoint in .* can be read; tried\n  2: .*\n  1: "
    with pytest.raises(OSError, match=everything):
        checkpoint.restore(two, state_of(0), report=messages.append)
    with pytest.raises(OSError, match=everything):
        checkpoint.restore_ema(two, report=messages.append)
    assert len(messages) == 2  # one per call, about going back from 2 to 1


def test_a_given_step_is_restored_or_an_error(two):
    restored, step = checkpoint.restore(two, state_of(0), step=1)
    assert (step, bits(restored)) == (1, bits(state_of(1)))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .*\[1, 2\]"):
        checkpoint.restore(two, state_of(0), step=5)
    flip(two / "2" / "_CHECKPOINT_METADATA")
    with pytest.raises(OSError, match=r"(?s)tried.*2: .*_CHECKPOINT_METADATA"):
        checkpoint.restore(two, state_of(0), step=2)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.restore(two / "nowhere", state_of(0))
    assert checkpoint.steps(two / "nowhere") == []
    assert checkpoint.latest(two / "nowhere") is None


@pytest.mark.parametrize("dtype", ["float32", "uint4"])  # the array format does not support uint4
def test_a_failed_save_raises_and_logs_nothing(two, caplog, dtype):
    state = State(np.uint32(3), {}, np.ones(2, jnp.dtype(dtype)), ())
    threads = set(threading.enumerate())
    with caplog.at_level(logging.INFO, "absl"):
        if dtype == "uint4":
            # Orbax may stop at a thread that had no time to start, and give that as the reason.
            with pytest.raises(OSError, match=r"could not write checkpoint .*3: .*(uint4|RuntimeError)"):
                checkpoint.save(two, 3, state)
        else:
            checkpoint.save(two, 3, state)
        assert logging.getLogger("absl").level == logging.INFO
    assert caplog.records == []
    assert set(threading.enumerate()) <= threads  # none remains that could log or write later
    assert checkpoint.latest(two) == (2 if dtype == "uint4" else 3)


# Killed processes

SAVER = """
import sys
from collections import namedtuple
import numpy as np
from diffusion.io import checkpoint
assert not {"orbax", "tensorstore"} & set(sys.modules)
State = namedtuple("State", "step params ema opt")
step = 1
while True:
    w = {"w": np.random.default_rng(step).normal(size=1000)}
    checkpoint.save(sys.argv[1], step, State(np.uint32(step), w, w, ()), keep=2)
    print(step, flush=True)
    step += 1
"""


def test_kill_9_while_saving_loses_nothing_that_was_saved(tmp_path):
    with subprocess.Popen([sys.executable, "-c", SAVER, tmp_path], stdout=subprocess.PIPE, text=True) as saver:
        saved = [int(saver.stdout.readline()) for _ in range(3)]
        time.sleep(random.Random(0).uniform(0, 0.1))
        saver.kill()
        saved += [int(line) for line in saver.stdout.read().split()]
    w = {"w": np.zeros(1000)}
    like, messages = State(np.uint32(0), w, w, ()), []
    restored, step = checkpoint.restore(tmp_path, like, report=messages.append)
    assert step in (saved[-1], saved[-1] + 1)  # the last one may be complete but not yet printed
    assert restored.params["w"].tolist() == np.random.default_rng(step).normal(size=1000).tolist()
    checkpoint.save(tmp_path, step + 1, restored, keep=2)  # removes what the killed process left
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([str(step), str(step + 1)])
    assert checkpoint.restore(tmp_path, like, report=messages.append)[1] == step + 1
    assert messages == []


class Killed(BaseException):
    """Stops a save as a kill would; the code under test does not catch it."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "at_least"), [(3, 2), (2, 1), (1, 1)], ids=["newer step", "same step again", "back to an earlier step"]
)
def test_a_save_that_stops_at_any_rename_or_removal_leaves_complete_states(two, monkeypatch, step, at_least):
    (two / "9.old").mkdir()
    seeds = {1: [1], 2: [2]}
    seeds.setdefault(step, []).append(10)

    def save_until(cut: int, directory: Path) -> bool:
        calls = 0

        def counted(function, half_way):
            def call(path, *args, **kwargs):
                nonlocal calls
                if calls == cut:
                    half_way(path)
                    raise Killed
                calls += 1
                return function(path, *args, **kwargs)

            return call

        def remove_one_file(path):
            for file in files_of(path)[-1:]:
                file.unlink()

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "replace", counted(os.replace, lambda path: None))
            patch.setattr(checkpoint.shutil, "rmtree", counted(shutil.rmtree, remove_one_file))
            try:
                checkpoint.save(directory, step, state_of(10), keep=1)
            except Killed:
                return False
        return True

    cut, finished = 0, False
    while not finished:
        directory = shutil.copytree(two, two.parent / str(cut))
        finished = save_until(cut, directory)
        messages = []
        restored, found = checkpoint.restore(directory, state_of(0), report=messages.append)
        assert messages == [], cut
        assert found >= at_least, cut
        assert any(bits(restored) == bits(state_of(seed)) for seed in seeds[found]), cut
        cut += 1
    assert cut > 4
    assert (found, bits(restored)) == (step, bits(state_of(10)))
    assert sorted(p.name for p in directory.iterdir()) == [str(step), *(["2.aside"] if step == 1 else [])]


# Keeping and replacing


def test_keeps_the_newest(tmp_path):
    for step in (1, 5, 10, 11):
        checkpoint.save(tmp_path, step, state_of(step), keep=3)
    assert checkpoint.steps(tmp_path) == [5, 10, 11]
    checkpoint.save(tmp_path, 100, state_of(100), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["100"]
    assert bits(checkpoint.restore(tmp_path, state_of(0))[0]) == bits(state_of(100))


def test_the_same_step_is_replaced(two):
    checkpoint.save(two, 2, state_of(22))
    assert checkpoint.steps(two) == [1, 2]
    assert bits(checkpoint.restore(two, state_of(0))[0]) == bits(state_of(22))


def test_checkpoints_after_a_step_that_was_resumed_from_are_not_kept_instead_of_new_ones(tmp_path):
    for step in (1, 8, 9):
        checkpoint.save(tmp_path, step, state_of(step))
    for step in (8, 9):
        flip(tmp_path / str(step) / "digests.json", 0)
    restored, step = checkpoint.restore(tmp_path, state_of(0), report=lambda message: None)
    assert step == 1
    checkpoint.save(tmp_path, 2, state_of(2), keep=2)
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert checkpoint.restore(tmp_path, state_of(0))[1] == 2
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2", "8.aside", "9.aside"}


# The average alone


def test_ema_is_read_without_params_opt_or_model(two):
    for field in ("params", "opt", "step"):
        shutil.rmtree(two / "2" / field)
    ema, step = checkpoint.restore_ema(two)
    assert (step, bits(ema)) == (2, bits(state_of(2).ema))
    ema, step = checkpoint.restore_ema(two, step=1)
    assert (step, bits(ema)) == (1, bits(state_of(1).ema))


def test_ema_falls_back_over_damage(two):
    flip(max(files_of(two / "2" / "ema"), key=lambda p: p.stat().st_size))
    with pytest.warns(UserWarning, match=r"2 cannot be read .* going back to step 1"):
        ema, step = checkpoint.restore_ema(two)
    assert (step, bits(ema)) == (1, bits(state_of(1).ema))


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """A checkpoint 0 with sequences in its averages, and these averages."""
    ema = ({"blocks": [jnp.ones(2), (jnp.zeros(1),)]}, np.arange(3.0, dtype=np.float32))
    directory = tmp_path_factory.mktemp("nested")
    checkpoint.save(directory, 0, State(np.uint32(0), {}, ema, ()))
    return directory, ema


def test_sequences_in_ema_become_dicts_without_like(nested):
    directory, _ = nested
    ema, _ = checkpoint.restore_ema(directory)
    assert bits(ema) == bits({"0": {"blocks": {"0": jnp.ones(2), "1": {"0": jnp.zeros(1)}}}, "1": jnp.arange(3.0)})


def test_ema_is_restored_in_the_structure_of_like(nested):
    directory, saved = nested
    zeros = jax.tree.map(np.zeros_like, saved)[:1] + (np.zeros(3, np.float32),)
    for like in (saved, (jax.tree.map(jnp.asarray, zeros[0]), zeros[1])):
        ema, step = checkpoint.restore_ema(directory, like=like)
        assert (step, bits(ema)) == (0, bits(saved))
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, saved))
    ema, _ = checkpoint.restore_ema(directory, like=abstract)
    assert bits(ema) == bits(jax.tree.map(jnp.asarray, saved))


def test_ema_that_does_not_fit_like_is_an_error(nested):
    directory, saved = nested
    like = ({"blocks": [jnp.ones(3)], "more": jnp.zeros(())}, np.arange(3))
    with pytest.raises(ValueError, match=rf"ema of checkpoint {directory / '0'} does not fit `like`:") as error:
        checkpoint.restore_ema(directory, like=like)
    assert str(error.value).split("\n  ")[1:] == [
        "missing key: ema.0.more float32[]",
        "unexpected key: ema.0.blocks.1.0 float32[1]",
        "shape mismatch: ema.0.blocks.0 is float32[2], must be float32[3]",
        "dtype mismatch: ema.1 is float32[3], must be int64[3]",
    ]
    with pytest.raises(TypeError, match=r"leaf ema\.1=3 of like must be an array, not int"):
        checkpoint.restore_ema(directory, like=(saved[0], 3))


# States that do not fit


def test_mismatches_are_listed_by_path(two):
    like = state_of(0)
    params = {
        "embed": {"kernel": jnp.zeros((3, 6))},
        "head": {"kernel": jnp.zeros((5, 2)), "bias": jnp.zeros(2)},
    }
    with pytest.raises(ValueError, match="does not fit") as error:
        checkpoint.restore(two, like._replace(params=params))
    assert str(error.value).split("\n  ")[1:] == [
        "missing key: params.head.bias float32[2]",
        "unexpected key: params.head.scale float32[]",
        "shape mismatch: params.embed.kernel is float32[3, 5], must be float32[3, 6]",
        "dtype mismatch: params.head.kernel is bfloat16[5, 2], must be float32[5, 2]",
    ]


def test_another_optimiser_does_not_fit(two):
    like = state_of(0)
    with pytest.raises(ValueError, match=r"unexpected key: opt\.1\.0\.mu\.embed\.kernel float32\[3, 5\]"):
        checkpoint.restore(two, like._replace(opt=optax.sgd(0.1).init(like.params)))


def test_another_key_implementation_does_not_fit(tmp_path):
    state = State(np.uint32(0), {}, {}, jax.random.key(0, impl="rbg"))
    checkpoint.save(tmp_path, 0, state)
    with pytest.raises(ValueError, match=r"dtype mismatch: opt is key<rbg>\[\], must be key<fry>\[\]"):
        checkpoint.restore(tmp_path, state._replace(opt=jax.random.key(0)))


def test_long_lists_of_mismatches_are_counted(two):
    many = {f"w{i:02}": jnp.zeros(1) for i in range(25)}
    with pytest.raises(ValueError, match="and 5 more") as error:
        checkpoint.restore(two, state_of(0)._replace(params=many))
    assert str(error.value).count("missing key: params.") == 20


# Errors


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"params": np.ones(1)}, TypeError, "NamedTuple.*not dict"),
        (State(3, {}, {}, ()), TypeError, r"leaf step=3 .* must be an array, not int"),
        (State(np.uint32(3), {"w": "text"}, {}, ()), TypeError, r"leaf params\.w='text'"),
        (State(np.uint32(3), {"w": np.array(["text"])}, {}, ()), TypeError, r"leaf params\.w .* dtype <U4"),
        (State(np.uint32(3), {"a.b": np.ones(1), "a": {"b": np.ones(1)}}, {}, ()), ValueError, r"\['params\.a\.b'\]"),
    ],
    ids=["not a NamedTuple", "number", "text", "array of text", "ambiguous dots"],
)
def test_states_that_cannot_be_saved_are_an_error_before_anything_is_written(tmp_path, state, error, message):
    with pytest.raises(error, match=message):
        checkpoint.save(tmp_path / "run", 0, state)
    assert not (tmp_path / "run").exists()


def test_steps_and_keep_are_checked(tmp_path):
    for step, keep in ((-1, 3), (0, 0)):
        with pytest.raises(ValueError, match=f"step={step} .* keep={keep}"):
            checkpoint.save(tmp_path, step, state_of(0), keep=keep)
    with pytest.raises(TypeError, match="float"):
        checkpoint.save(tmp_path, 1.5, state_of(0))


def test_a_failed_save_is_an_os_error_and_keeps_the_others(two, monkeypatch):
    def fails_half_way(path, arrays):
        (path.parent / f"{path.name}.orbax-checkpoint-tmp").mkdir()
        raise ValueError(
            "RESOURCE_EXHAUSTED: " + "path " * 99 + "No space left on device [tensorstore_spec='" + "x" * 999
        )

    monkeypatch.setattr(checkpoint, "_write_arrays", fails_half_way)
    with pytest.raises(OSError, match=f"could not write checkpoint {two / '3'}: .*No space left on device$"):
        checkpoint.save(two, 3, state_of(3))
    assert {p.name for p in two.iterdir()} == {"1", "2"}
    assert checkpoint.restore(two, state_of(0))[1] == 2


def test_a_full_disk_is_detected_before_writing(two, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"needs 0\.0 MB where 0\.0 MB are free"):
        checkpoint.save(two, 3, state_of(3))
    assert checkpoint.steps(two) == [1, 2]


def test_a_file_with_the_name_of_the_directory_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="could not write checkpoint .*File exists"):
        checkpoint.save(tmp_path / "checkpoints", 0, state_of(0))
