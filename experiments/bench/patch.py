"""Patch extraction: many implementations take turns with a plain copy of the same bytes, as fast as memory allows.

    python -m experiments.bench.patch --json=patch.json --plot=patch.png
    python -m experiments.bench.patch --cases=28x28/7 --fraction=0.1

Host arrays are float32 images [B, H, W, C] and tokens [B, N, D]. An implementation that is not installed, or cannot cut
this geometry, is skipped with a note; one that returns the same order of values is checked against the definition
first. Those named "blog" are those of Piantedosi, "Diffusion model patch creation"
(piantedosi.github.io/diffusion_model_patch_creation), written again for any window and stride, in float32; its
"whole data set" returns what it computes. `--plot` writes a box plot of the first case, and next to that file, in one
ending in _against_copy, bars of all cases relative to the copy.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from absl import app, flags

from experiments import command
from experiments.bench import commands, timing
from experiments.bench.patch_implementations import (
    BATCH,
    CASES,
    REPEAT,
    device_programs,
    generators,
    host_programs,
    token_bytes,
)
from experiments.bench.patch_report import plot, report
from experiments.paths import define_path


def main(argv: Sequence[str]) -> None:
    given = flags.FLAGS
    unknown = [name for name in given.cases if name not in CASES]
    if unknown:
        raise app.UsageError(f"--cases={unknown} are not among {list(CASES)}")
    measure = partial(run, given.cases, fraction=given.fraction, rounds=given.rounds)
    commands.perform(argv, measure, report, plot)


def define_flags(argv: list[str]) -> None:
    """Defines the flags of all benchmarks and those of this one."""
    commands.define_flags(argv)
    flags.DEFINE_list("cases", list(CASES), "Which geometries to measure.")
    flags.DEFINE_float(
        "fraction", 1.0, "Measure with this fraction of the images and of the generators' calls.", lower_bound=0.0
    )
    define_path("plot", None, "Also write a box plot to this PNG, and bars to the one ending in _against_copy.")


def run(cases: Sequence[str] = tuple(CASES), *, fraction: float = 1.0, rounds: int = 7) -> dict[str, Any]:
    """All measurements, ready for JSON."""
    result: dict[str, Any] = {"machine": timing.machine(), "cases": {}}
    for name in cases:
        case = CASES[name]._replace(images=max(1, round(CASES[name].images * fraction)))
        host, skipped = host_programs(case)
        device, calls = device_programs(case)
        result["cases"][name] = {
            "case": case._asdict(),
            "bytes": token_bytes(case),
            "host": timing.compare(host, case.images, rounds),
            "device": timing.compare(device, case.images * calls, rounds),
            "skipped": skipped,
        }
    calls = max(1, round(20 * fraction))
    result["generator"] = timing.compare(generators(), BATCH * REPEAT, rounds, calls=calls)
    return result


if __name__ == "__main__":
    command.run(main, define_flags)
