"""Races of patch extraction: every rival takes turns with a plain copy of the same bytes, the roof that memory allows.

    python -m experiments.bench.patch --json=patch.json --plot=patch.png
    python -m experiments.bench.patch --cases=28x28/7 --fraction=0.1

Host arrays are float32 images [B, H, W, C] and tokens [B, N, D]. A rival that is not installed, or cannot cut this
geometry, is skipped with a note; one that returns the same order of values is checked against the definition first. The
versions named "blog" are those of Piantedosi, "Diffusion model patch creation"
(piantedosi.github.io/diffusion_model_patch_creation), written anew for any window and stride, in float32; its
"whole data set" returns what it computes. `--plot` draws the seconds of the first case as boxes, and next to that file,
in one ending in _roof, all cases as bars against the copy.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import session
from experiments.bench import timing
from experiments.bench.patch_report import draw, report
from experiments.bench.patch_rivals import BATCH, CASES, REPEAT, device_rivals, generators, host_rivals, token_bytes

_CASES = flags.DEFINE_list("cases", list(CASES), "Which geometries to race.")
_FRACTION = flags.DEFINE_float("fraction", 1.0, "Races with this fraction of the images.", lower_bound=0.0)
_PLOT = flags.DEFINE_string("plot", None, "Also draw a box plot to this PNG, and bars to the one ending in _roof.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments not understood: {argv[1:]}")
    unknown = [name for name in _CASES.value if name not in CASES]
    if unknown:
        raise app.UsageError(f"--cases={unknown} are not among {list(CASES)}")
    timing.check_json(flags.FLAGS.json)
    result = run(_CASES.value, fraction=_FRACTION.value, rounds=flags.FLAGS.rounds)
    print(report(result))
    timing.write_json(flags.FLAGS.json, result)
    if _PLOT.value:
        draw(result, Path(_PLOT.value))


def run(cases: Sequence[str] = tuple(CASES), *, fraction: float = 1.0, rounds: int = 7) -> dict[str, Any]:
    """All measurements, ready for JSON."""
    result: dict[str, Any] = {"machine": timing.machine(), "cases": {}}
    for name in cases:
        case = CASES[name]._replace(images=max(1, round(CASES[name].images * fraction)))
        host, skipped = host_rivals(case)
        device, calls = device_rivals(case)
        result["cases"][name] = {
            "case": case._asdict(),
            "bytes": token_bytes(case),
            "host": race(host, case.images, rounds),
            "device": race(device, case.images * calls, rounds),
            "skipped": skipped,
        }
    result["generator"] = race(generators(), BATCH * REPEAT, rounds, calls=20)
    return result


def race(rivals: dict[str, Callable[[], Any]], work: int, rounds: int, calls: int = 1) -> dict[str, Any]:
    """`timing.summary` of rivals that do `work` images a call."""

    def repeated(rival: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                rival()

        return run

    timed = rivals if calls == 1 else {name: repeated(rival) for name, rival in rivals.items()}
    return timing.summary(timing.interleave(timed, rounds), dict.fromkeys(rivals, work * calls))


if __name__ == "__main__":
    session.run(main, timing.define_flags)
