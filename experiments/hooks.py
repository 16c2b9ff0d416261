"""What runs beside training steps: validation on held-out images, previews, and the check for a non-finite loss."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import data, sharding
from diffusion import train as training
from diffusion.io import checkpoint
from experiments import display, image_files, inputs, parts, processes, sampling
from experiments.config import Config
from experiments.log import Log
from experiments.objective import objective
from experiments.run_dir import RunDir


class Validation:
    """Loss on a fixed set of noised held-out images; keeps the best weights and says when to stop.

    The images, their noise and so the loss depend neither on the devices nor on microbatches.
    """

    def __init__(self, config: Config, run: parts.Parts, folder: RunDir, log: Log, mesh: jax.sharding.Mesh) -> None:
        c = config.train
        self._patience, self._log, self._best = c.patience, log, folder.best
        # Of an earlier session too; later ones are added here, since only one of several processes writes the log.
        self._losses = {row["step"]: row["held_out_loss"] for row in log.rows() if "held_out_loss" in row}
        # In equal batches, none larger than in training, which is known to fit into memory.
        count = -(-c.eval_count // c.repeat)
        batches = -(-count // c.batch_size)
        size = -(-count // batches)
        # Filled up so that all devices, and microbatches, have equal shares; what is random is drawn before.
        examples = size * c.repeat
        at_once = -(-min(c.microbatch or examples, examples) // mesh.size) * mesh.size
        filled = -(-examples // at_once) * at_once - examples
        held = data.batch(inputs.source(config, config.data.held_out), config.seed, 0, batches * size)
        held = jax.tree.map(lambda x: x.reshape(batches, size, *x.shape[1:]), held)
        pieces = objective(run, training=False)

        def loss(params: Any) -> jax.Array:
            def of(now: tuple[jax.Array, Any]) -> jax.Array:
                i, images = now
                # The key is made inside, anew each time: every validation has the same noise.
                key = jax.random.fold_in(parts.key(config.seed, "held out"), i)
                drawn = pieces.draw(key, images, None)
                drawn = jax.tree.map(lambda x: sharding.split_examples(fill(x, filled)), drawn)
                (value, aux), _ = training.accumulated(
                    lambda k, d: (pieces.loss(params, k, d), ()), key, drawn, at_once
                )
                return aux["loss"][:examples].mean() if filled else value

            with sharding.in_use(mesh):
                return jax.lax.map(of, (np.arange(batches), held)).mean()

        self._loss = jax.jit(loss)

    def validate(self, step: int, state: training.State) -> None:
        """Measures and logs the loss, and keeps the state if it is the best so far."""
        value = float(self._loss(state.ema[0]))
        self._log.scalars(step, {"held_out_loss": value})
        if self._patience is not None and value < min(self._losses.values(), default=math.inf):
            checkpoint.save(self._best, step, state, keep=1)
        self._losses[step] = value

    def should_stop(self) -> bool:
        """Whether the last `patience` validations were all worse than the best."""
        losses = self._losses
        if self._patience is None or not losses:
            return False
        best = min(losses, key=losses.get)
        return sum(step > best for step in losses) >= self._patience

    def best(self, state: training.State) -> training.State:
        """The best state, or `state` itself without early stopping."""
        if self._patience is None:
            return state
        state, step = checkpoint.restore(self._best, state, report=print)
        processes.check_same("the step of the best weights", step)
        print(f"\nheld-out loss was lowest after step {step}: those weights are kept")
        return state


def fill(x: jax.Array, n: int) -> jax.Array:
    """An array [B, ...] with its last entry n times more."""
    return jnp.concatenate([x, jnp.repeat(x[-1:], n, 0)]) if n else x


class Preview:
    """A grid of samples of the averaged weights during training, from the same noise every time.

    One expert alone cannot sample: below each row of noised held-out images is what it denoises them to. A
    super-resolution network enlarges held-out images.
    """

    def __init__(self, config: Config, run: parts.Parts, folder: RunDir, log: Log) -> None:
        classes = run.spec.num_classes
        self._columns = min(classes, 10) or 8
        self._labels = inputs.equal_shares(4 * self._columns, classes)
        self._inputs, self._batch_size = None, config.sample.batch_size
        self._expert = run.split is not None
        if self._expert or run.superres:
            held = inputs.held_out(config, self._labels)
            self._inputs = held if self._expert else np.asarray(sampling.low_resolution(run, held))
        self._sample = sampling.denoise_fn(run) if self._expert else sampling.sample_fn(run)
        self._folder, self._log, self._range = folder.previews, log, run.spec.value_range

    def __call__(self, step: int, params: Any) -> None:
        batches = sampling.in_batches(self._sample, params, self._labels, self._batch_size, self._inputs)
        images = np.concatenate(list(batches))
        if not processes.first():
            return
        if self._expert:  # [N, 2, *S, C] to a row of noised images, one of denoised ones, and so on
            images = images.reshape(-1, self._columns, *images.shape[1:]).swapaxes(1, 2).reshape(-1, *images.shape[2:])
        image = image_files.grid(display.as_images(images, self._range), self._columns)
        self._folder.mkdir(exist_ok=True)
        image_files.save(self._folder / f"{step:07d}.png", image)
        self._log.image(step, "samples", np.asarray(image))


def check_finite(step: int, taken: jax.Array, metrics: dict[str, jax.Array], folder: RunDir) -> None:
    """Raises FloatingPointError, with a remedy, if an update was skipped for a non-finite loss or gradient."""
    if int(taken) < step:
        value = float(metrics["loss"] + metrics["grad_norm"])
        when = f"became non-finite before step {step}" if math.isfinite(value) else f"is {value} at step {step}"
        raise FloatingPointError(
            f"the loss or its gradient {when}; nothing was saved after step {folder.latest_step or 0}. Lower "
            "--config.train.learning_rate (with muon also matrix_rate) or set --config.train.clip=1.0, with another "
            "--workdir."
        )
