"""What is looked at as training goes: the loss on held-out image_files, and what the averaged weights draw."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion.io import checkpoint
from diffusion import data
from diffusion import train as training
from experiments import build, drawing, measure, image_files, session
from experiments import objective as objectives
from experiments.config import Config


class HeldOut:
    """Loss on a fixed set of noised held-out image_files; remembers the best weights and when to give up."""

    def __init__(self, config: Config, seen: build.Seen, workdir: Path, log: session.Log) -> None:
        c = config.train
        self._patience, self._log, self._kept = c.patience, log, workdir / "best"
        # In equal batches, none larger than what one device gets in training, which is known to fit into memory.
        most = max((c.microbatch or c.batch_size * c.repeat) // (c.repeat * jax.device_count()), 1)
        count = -(-c.eval_count // c.repeat)
        batches = -(-count // most)
        size = -(-count // batches)
        held = data.batch(build.source(config, config.data.held_out), config.seed, 0, batches * size)
        held = jax.tree.map(lambda x: x.reshape(batches, size, *x.shape[1:]), held)
        parts = objectives.objective(config, seen, training=False)

        def loss(params: Any) -> jax.Array:
            def of(now: tuple[jax.Array, Any]) -> jax.Array:
                i, examples = now
                # The key is made inside, anew each time: every measurement is of the same noise.
                key = jax.random.fold_in(build.key(config.seed, "held out"), i)
                return parts.loss(params, key, parts.draw(key, examples, None))[0]

            return jax.lax.map(of, (np.arange(batches), held)).mean()

        self._loss = jax.jit(loss)

    def losses(self) -> dict[int, float]:
        """Step to loss, of every measurement so far."""
        return {row["step"]: row["held_out_loss"] for row in self._log.rows() if "held_out_loss" in row}

    def judge(self, step: int, state: training.State) -> None:
        """Measures, and keeps the weights if they are the best so far."""
        before = self.losses()
        value = float(self._loss(state.ema[0]))
        self._log.scalars(step, {"held_out_loss": value})
        if self._patience is not None and value < min(before.values(), default=math.inf):
            checkpoint.save(self._kept, step, state, keep=1)

    def exhausted(self) -> bool:
        """Whether the last `patience` measurements brought nothing better."""
        losses = self.losses()
        if self._patience is None or not losses:
            return False
        best = min(losses, key=losses.get)
        return sum(step > best for step in losses) >= self._patience

    def best(self, state: training.State) -> training.State:
        """The best weights, in the form of `state`."""
        state, step = checkpoint.restore(self._kept, state, report=print)
        print(f"\nheld-out loss was lowest after step {step}: those weights are kept")
        return state


class Preview:
    """A grid of what the averaged weights draw, from the same noise every time, as training goes.

    An expert restores held-out image_files instead: below each row of them, noised, is what it makes of them. A network
    that enlarges image_files enlarges held-out ones.
    """

    def __init__(self, config: Config, seen: build.Seen, workdir: Path, log: session.Log) -> None:
        self._columns = min(seen.num_classes, 10) or 8
        self._labels = measure.equal_share(4 * self._columns, seen.num_classes)
        self._beside, self._batch_size = None, config.sample.batch_size
        self._expert = config.process.split is not None
        if self._expert or config.condition.size:
            held = measure.held_out(config, self._labels)
            self._beside = held if self._expert else np.asarray(drawing.shrunk(config, held))
        self._draw = drawing.restorer(config, seen) if self._expert else drawing.drawer(config, seen)
        self._folder, self._log = workdir / "previews", log

    def __call__(self, step: int, params: Any) -> None:
        batches = drawing.in_batches(self._draw, params, self._labels, self._batch_size, self._beside)
        drawn = np.concatenate(list(batches))
        if self._expert:  # [N, 2, H, W, C] to a row of noised image_files, one of restored ones, and so on
            drawn = drawn.reshape(-1, self._columns, *drawn.shape[1:]).swapaxes(1, 2).reshape(-1, *drawn.shape[2:])
        image = image_files.grid(drawn, self._columns)
        self._folder.mkdir(exist_ok=True)
        image_files.save(self._folder / f"{step:07d}.png", image)
        self._log.image(step, "samples", np.asarray(image))
