"""Optimisers: AdamW, and Muon for the matrices inside a transformer with NAdam for all other parameters.

    rate(step) = peak * step / warmup before `warmup`, then peak * schedule(step - warmup)           (1)

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) moves a matrix along its averaged gradient with the
singular values pushed towards one, so that rare directions are learned at nearly the rate of common ones. A step costs
more and fewer are needed.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

from diffusion.layers import is_stacked

Params = Any


def adamw(
    learning_rate: float,
    *,
    steps: int,
    warmup: int = 0,
    schedule: str = "cosine",
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """AdamW, its gradients clipped to a global norm.

    Args:
      learning_rate: the peak, eq. (1).
      steps: the number of training steps; a falling schedule reaches zero there.
      warmup: the number of steps in which the rate grows from zero.
      schedule: "cosine", "linear" or "constant", after the warm-up.
      weight_decay: acts on what `decayed` marks, by rate(step) * weight_decay per step.
      clip: largest norm of all gradients together; None for no clipping.

    Raises:
      ValueError: the schedule is unknown, or `warmup` is not shorter than `steps`.
    """
    rate = scheduled(learning_rate, steps=steps, warmup=warmup, schedule=schedule)
    return _clipped(clip, optax.adamw(rate, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed))


def muon(
    learning_rate: float,
    *,
    steps: int,
    hidden: Callable[[Params], Params],
    matrix_rate: float = 0.03,
    warmup: int = 0,
    schedule: str = "cosine",
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """Muon on the matrices that `hidden` marks, NAdam on all other parameters; otherwise as `adamw`.

    Three Newton-Schulz iterations (Muon has five), since on a small network they are what a step costs, after scaling
    by the Schatten-4 norm (Grishina et al. 2025, 2506.10935). An update's leading singular values come out at 0.7 to
    1.2 times rate(step) * sqrt(max(1, outputs / inputs)); those below a fiftieth of that norm grow 41-fold at most.

    Args:
      learning_rate: NAdam's peak, eq. (1). (In `optax.contrib.muon` the argument of this name is Muon's.)
      hidden: params -> the same tree of bools. The first axis of a marked matrix is its input, all others its output;
        of stacked layers (`layers`) each has its own. For a ViT, `models.vit.hidden_matrices`.
      matrix_rate: Muon's peak.
      b2, eps: NAdam's.
      weight_decay: acts on the marked matrices, by Muon's rate(step) * weight_decay per step.
      clip: bounds the gradients, so that none dominates the average; Muon's updates do not depend on their size.

    Raises:
      ValueError: as `adamw`; from `init`, `hidden` marks nothing or something that is not a matrix.
    """

    def axes(params: Params) -> Params:
        def of(path: tuple, is_hidden: bool, p: jax.Array) -> contrib.MuonDimensionNumbers | None:
            first = is_stacked(path)  # what is neither input nor output is a batch of matrices
            if is_hidden and p.ndim < 2 + first:
                raise ValueError(f"hidden marks a parameter of shape {p.shape}, which is not a matrix")
            return contrib.MuonDimensionNumbers(first, tuple(range(first + 1, p.ndim))) if is_hidden else None

        mask = hidden(params)
        if not any(jax.tree.leaves(mask)):
            names = sorted(params) if isinstance(params, dict) else jax.tree.structure(params)
            raise ValueError(f"hidden marks none of the parameters {names!s:.200}: is it meant for another network?")
        return jax.tree_util.tree_map_with_path(of, mask, params)

    options = dict(steps=steps, warmup=warmup, schedule=schedule)
    optimizer = contrib.muon(
        scheduled(matrix_rate, **options),
        ns_steps=3,
        preconditioning="schatten",
        weight_decay=weight_decay,
        adam_learning_rate=scheduled(learning_rate, **options),
        adam_b2=b2,
        eps=eps,
        muon_weight_dimension_numbers=axes,
    )
    return _clipped(clip, optimizer)


def scheduled(peak: float, *, steps: int, warmup: int = 0, schedule: str = "cosine") -> optax.Schedule:
    """The rate at each step, eq. (1): linear warm-up, then a cosine or a line to zero at `steps`, or a constant.

    Raises:
      ValueError: the schedule is unknown, or `warmup` is not shorter than `steps`.
    """
    schedules = {
        "cosine": optax.cosine_decay_schedule,
        "linear": lambda rate, left: optax.linear_schedule(rate, 0.0, left),
        "constant": lambda rate, left: optax.constant_schedule(rate),
    }
    if schedule not in schedules:
        raise ValueError(f"schedule={schedule!r} is not one of {tuple(schedules)}")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup={warmup} must lie in [0, steps={steps})")
    after = schedules[schedule](peak, steps - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decayed(params: Params) -> Params:
    """Which parameters weight decay acts on: matrices and tables, not vectors and not biases, which may have axes."""

    def is_decayed(path: tuple, p: jax.Array) -> bool:
        return p.ndim > 1 + is_stacked(path) and getattr(path[-1], "key", None) != "bias"

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _clipped(clip: float | None, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optimizer if clip is None else optax.chain(optax.clip_by_global_norm(clip), optimizer)
