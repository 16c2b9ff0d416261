"""Time grids: the falling times [T + 1] that a sampler steps through, as NumPy arrays in float64.

uniform     t_i = start (1 - i / T)
shifted     t -> shift t / (1 + (shift - 1) t)             Esser et al. 2024 (2403.03206)
respaced    some of the steps of a training chain          Nichol & Dhariwal 2021 (2102.09672)
logsnr      even steps in log SNR                          Lu et al. 2022 (2211.01095)
karras      sigma^(1 / rho) in equal steps                 Karras et al. 2022 (2206.00364), eq. 5
rho         the same of sigma / alpha, for any path
"""

import itertools

import numpy as np

from diffusion.process import Path, times_of_snr


def uniform_grid(steps: int, start: float = 1.0, last: float | None = None) -> np.ndarray:
    """Times [steps + 1] from `start` to 0 in equal steps; `start` above 1 for paths whose time does not end there.

    With `last` they are equal down to there, and the last step goes from `last` to 0 at once: the result is then x0_hat
    at time `last`. That helps a network that saw few times near 0 in training.

    Raises:
      ValueError: an argument is out of range; the message names it.
    """
    if not start > 0:
        raise ValueError(f"start={start} must be positive")
    return _equal_steps(steps, start, last, last)


def shifted_grid(steps: int, shift: float = 1.0, start: float = 1.0, last: float | None = None) -> np.ndarray:
    """`uniform_grid` mapped by t -> shift t / (1 + (shift - 1) t): a shift above 1 takes more steps at high noise.

    `start` is the first time before that map, `last` a time after it.

    Raises:
      ValueError: an argument is out of range; the message names it.
    """
    if not 0 < start <= 1:
        raise ValueError(f"start={start} must lie in (0, 1]")
    if not shift > 0:
        raise ValueError(f"shift={shift} must be positive")
    t = _equal_steps(steps, start, last, None if last is None else last / (shift - (shift - 1) * last))
    return shift * t / (1 + (shift - 1) * t)


def karras_grid(steps: int, high: float, low: float, rho: float = 7.0) -> np.ndarray:
    """Times [steps + 1] for a variance-exploding path whose time is sigma: `steps` from `high` to `low`, then 0.

    Equal steps in sigma^(1 / rho); EDM samples CIFAR-10 from 80 to 0.002.

    Raises:
      ValueError: steps < 2, or not 0 < low < high, or rho is not positive.
    """
    if steps < 2:
        raise ValueError(f"steps={steps} must be at least 2: one at high={high} and one at low={low}")
    if not 0 < low < high:
        raise ValueError(f"low={low} must lie between 0 and high={high}")
    if not rho > 0:
        raise ValueError(f"rho={rho} must be positive")
    return np.append(np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho, 0.0)


def rho_grid(
    path: Path,
    steps: int,
    high: float = 80.0,
    low: float = 0.002,
    rho: float = 7.0,
    span: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
    """Times [steps + 1] at which sigma / alpha has the values of `karras_grid`, for any path, and 0 at the end.

    The first time has sigma / alpha = `high`: the start of sampling is noise of scale sigma there (`initial_noise` with
    a path), in which what is left of the data, 1 / high of the noise, is missing.

    Args:
      span: the range of times of the path; sigma / alpha must rise with t there.

    Raises:
      ValueError: see `karras_grid`; or the path does not reach `high` or `low` inside `span`.
    """
    ratios = karras_grid(steps, high, low, rho)[:-1]
    return _times_at(path, 1 / ratios**2, span, f"sigma / alpha from high={high} to low={low}")


def respaced_grid(spec: str, steps: int) -> np.ndarray:
    """Falling times that keep some of the `steps` of a chain, i / steps, and end at 0; `sample` then takes these steps.

    "250" keeps 250 evenly spaced ones; "10,15,20" cuts the chain, from data to noise, into equal sections and keeps so
    many of each (Nichol & Dhariwal 2021, 2102.09672); "ddim25" keeps 25 at one integer stride (Song et al. 2020,
    2010.02502); "" keeps all.

    Raises:
      ValueError: that many steps cannot be kept.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if spec.startswith("ddim"):
        wanted = spec.removeprefix("ddim")
        strides = [n for n in range(1, steps + 1) if str(-(-steps // n)) == wanted]
        if not strides:
            raise ValueError(f"respacing={spec!r}: no integer stride keeps {wanted!r} of {steps} steps")
        kept = np.arange(0, steps, strides[0])
    else:
        counts = spec.split(",") if spec else [str(steps)]
        if not all(count.strip().isdecimal() and int(count) for count in counts):
            raise ValueError(f"respacing={spec!r} is neither counts as in '250' or '10,15,20' nor 'ddim25'")
        sizes = [steps // len(counts) + (i < steps % len(counts)) for i in range(len(counts))]
        kept = [
            start + _spread(int(count), size, spec)
            for start, size, count in zip(itertools.accumulate(sizes, initial=0), sizes, counts, strict=False)
        ]
        kept = np.concatenate(kept)
    return np.append((kept[::-1] + 1) / steps, 0.0)


def logsnr_grid(path: Path, steps: int, high: float, low: float, span: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """Times [steps + 1]: `steps` times even in log SNR, from `low` (most noise) to `high`, then 0, the data.

    Args:
      high, low: log SNR, `process.logsnr`, at the last and at the first of these times.
      span: the range of times of the path; its SNR must fall with t there.

    Raises:
      ValueError: steps < 2, high is not above low, or the path does not reach one of them inside `span`.
    """
    if steps < 2:
        raise ValueError(f"steps={steps} must be at least 2: one at each end of the range of log SNR")
    if not low < high:
        raise ValueError(f"low={low} must be below high={high}: log SNR grows from noise to data")
    return _times_at(path, np.exp(np.linspace(low, high, steps)), span, f"log SNR from low={low} to high={high}")


def _times_at(path: Path, snr: np.ndarray, span: tuple[float, float], asked: str) -> np.ndarray:
    """Times [n + 1] at which the path has the rising SNR [n], and 0; `asked` is said in errors."""
    try:
        times = times_of_snr(path, snr, span)
    except ValueError as e:
        raise ValueError(f"{asked}: {e}") from None
    times = np.append(times.astype(np.float64), 0.0)
    if not (np.diff(times) < 0).all():
        raise ValueError(
            f"steps={len(snr)}, {asked}: some of these times are equal in float32; take fewer steps, or a larger range"
        )
    return times


def _equal_steps(steps: int, start: float, last: float | None, end: float | None) -> np.ndarray:
    """Times [steps + 1] from `start` to 0 in equal steps, or to `end`, `last` before a map, and then to 0 at once."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if end is None:
        return np.linspace(start, 0.0, steps + 1)
    if not 0 < end < start:
        raise ValueError(f"last={last} must lie between 0 and where the times start")
    if steps == 1:
        raise ValueError(f"steps=1 go from start={start} to 0 at once: leave out last={last}")
    return np.append(np.linspace(start, end, steps), 0.0)


def _spread(count: int, size: int, spec: str) -> np.ndarray:
    """`count` of 0..size - 1 from end to end, as evenly as whole numbers can be."""
    if count > size:
        raise ValueError(f"respacing={spec!r} keeps {count} of a section of {size} steps")
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    return np.round(np.cumsum([0.0] + [stride] * (count - 1))).astype(int)
