"""What `experiments.bench.patch` measured: tables, the targets and whether they are reached, and two plots."""

from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import tables
from experiments.bench.patch_implementations import BATCH, BLOG, COPIES, COPY, FUSEDS, NUMBA, NUMBAS, REPEAT, VIEW

XLA_COPY = "XLA copy of tokens"


def targets(result: dict[str, Any]) -> list[tuple[str, float, str, float]]:
    """(what, measured ratio, "at least", target) of the speeds that this project promises."""
    rows = []

    def over(fast: str, slow: str, table: dict[str, Any]) -> float:
        return table[fast]["speed_over"][slow]

    for name, case in result["cases"].items():
        host, device = case["host"], case["device"]
        first = name == "28x28/7"
        less = 1 if first else 0.9  # what holds for the first geometry holds for the others within a tenth
        rows.append((f"{name}: {NUMBAS} over {COPIES}", over(NUMBAS, COPIES, host), 0.95 * less))
        rows.append((f"{name}: {NUMBA} over {COPY}", over(NUMBA, COPY, host), 0.85 * less))
        rows.append((f"{name}: {FUSEDS} over {COPIES}", over(FUSEDS, COPIES, host), 1.25 * less))
        if first:
            best = min((b for b in BLOG if b in host), key=lambda b: host[b]["seconds"])
            rows.append((f"{name}: {NUMBAS} over {best}", over(NUMBAS, best, host), 10))
        rows.append((f"{name}: XLA patchify over its copy", over("XLA patchify", XLA_COPY, device), 1 / 1.25))
        rows.append((f"{name}: XLA unpatchify over its copy", over("XLA unpatchify", XLA_COPY, device), 1 / 1.5))
    speed = result["generator"]["noised_patches"]["speed_over"]["blog generator"]
    rows.append(("noised_patches over the blog's generator", speed, 5))
    speed = result["generator"]["noised_patches, noise given"]["speed_over"]["blog generator, noise given"]
    rows.append(("the same, noise given to both", speed, 5))
    return [(what, got, "at least", goal) for what, got, goal in rows]


def report(result: dict[str, Any]) -> str:
    """All tables."""
    parts = [tables.where(result["machine"])]
    for name, case in result["cases"].items():
        for where, copy in (("host", COPIES), ("device", XLA_COPY)):
            size = case["bytes"] / case["case"]["images"] / 1e9
            rows = [
                [program, f"{row['per_second']:,.0f}", f"{size * row['per_second']:.2f}", tables.over(row, copy)]
                for program, row in case[where].items()
                if program != VIEW
            ]
            parts.append(tables.table(f"{name}, {where}", ["images/s", "GB/s of tokens", f"over {copy}"], rows))
        view = case["host"][VIEW]
        parts.append(f"{VIEW}, nothing copied: {view['seconds'] * view['work'] * 1e6:.0f} us a call")
        parts.extend(starmap("skipped {}: {}".format, case["skipped"].items()))
    rows = [
        [name, f"{row['per_second']:,.0f}", tables.over(row, "blog generator")]
        for name, row in result["generator"].items()
    ]
    parts.append(tables.table(f"generator, {REPEAT} x {BATCH}", ["images/s", "over blog generator"], rows))
    return "\n\n".join([*parts, tables.targets(targets(result))])


def plot(result: dict[str, Any], path: Path) -> None:
    """Writes a box plot of the first case to `path`, and bars of all cases next to it."""
    from matplotlib.figure import Figure

    name, case = next(iter(result["cases"].items()))
    box_plot(Figure((9, 6), layout="constrained"), name, case).savefig(path, dpi=120)
    beside = path.with_stem(f"{path.stem}_against_copy")
    bars(Figure((10, 6), layout="constrained"), result).savefig(beside, dpi=120)


def box_plot(figure, name: str, case: dict[str, Any]):
    """Images per second of every implementation in every round, fastest on top."""
    host = {program: row for program, row in case["host"].items() if program not in (VIEW, "Numba unpatchify")}
    order = sorted(host, key=lambda program: host[program]["per_second"])
    ax = figure.add_subplot()
    ax.boxplot(
        [[row["work"] / t for t in row["timings"]] for row in map(host.get, order)],
        orientation="horizontal", tick_labels=order,
    )  # fmt: skip
    ax.set(xscale="log", xlabel="images per second", title=f"{name}, {case['case']['images']:,} images, float32")
    ax.grid(axis="x", alpha=0.3)
    return figure


def bars(figure, result: dict[str, Any]):
    """Speed of the main implementations in each case, where the copy with all threads is 1."""
    shown = [
        NUMBA,
        NUMBAS,
        FUSEDS,
        "NumPy views, copied",
        "NumPy reshape, transpose",
        "einops",
        "torch unfold",
        *BLOG[2:],
    ]
    ax = figure.add_subplot()
    names = list(result["cases"])
    for k, program in enumerate(shown):
        heights = [
            result["cases"][name]["host"].get(program, {"speed_over": {COPIES: 0}})["speed_over"][COPIES]
            for name in names
        ]
        ax.bar(np.arange(len(names)) + (k - len(shown) / 2) * 0.09, heights, 0.09, label=program)
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    ax.set_xticks(range(len(names)), names)
    ax.set(ylabel=f"speed, {COPIES} = 1", title="Patch extraction relative to a copy of the same bytes")
    ax.legend(fontsize="small", ncols=3)
    return figure
