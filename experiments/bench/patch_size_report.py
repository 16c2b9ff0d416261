"""What `experiments.bench.patch_size` measured: tables, the targets and whether they are reached, and a plot."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import peers, tables

KINDS = {"train": "training", "sample": "sampling"}
SAME_COST = 1.15  # the target for equal positions, eq. (1) of `patch_size`: at most
GROWTH = 0.7  # the target for one image, eq. (2) there: at least this part of P^2


def claims(result: dict[str, Any]) -> list[tuple[str, float, str, float]]:
    """(what, measured, "at most" or "at least", target): what is published of time, and the same of other costs."""
    rows = []
    first, last = (result["same_grid"] or [""])[0], (result["same_grid"] or [""])[-1]
    cases = result["cases"]
    if first != last and cases[first]["patch_size"] == 1:
        what = f"{last} over {first}"
        rows += [
            (f"{word} time, {what}", result[kind][first]["speed_over"][last], "at most", SAME_COST)
            for kind, word in KINDS.items()
        ]
        flops, memory = (cases[last][cost]["train"] / cases[first][cost]["train"] for cost in ("flops", "bytes"))
        rows += [(f"operations, {what}", flops, "at most", SAME_COST)]
        rows += [(f"training memory, {what}", memory, "at most", SAME_COST)]
    pixels = next((name for name in result["same_image"] if cases[name]["patch_size"] == 1), None)
    for name in result["same_image"]:
        patch = cases[name]["patch_size"]
        if pixels is None or patch == 1:
            continue
        goal = GROWTH * patch**2
        what = f"{name} over P = 1"
        rows += [
            (f"{word} speed, {what}", result[kind][name]["speed_over"][pixels], "at least", goal)
            for kind, word in KINDS.items()
        ]
        fewer = cases[pixels]["flops"]["train"] / cases[name]["flops"]["train"]
        rows.append((f"operations saved, {what}", fewer, "at least", goal))
    counts = [cost["xla_flops"][kind] / ours for cost in cases.values() for kind, ours in cost["flops"].items()]
    rows.append(
        ("larger over smaller count of operations, worst case", max(max(c, 1 / c) for c in counts), "at most", 1.05)
    )
    for kind, word in KINDS.items() if result["peer"] else ():
        speed = result["peer"][kind]["ours"]["speed_over"]["PyTorch eager"]
        rows.append((f"{word} speed over PyTorch eager", speed, "at least", 1.0))
    return rows


def report(result: dict[str, Any]) -> str:
    """All tables."""
    fields = result["fields"]
    parts = [
        f"U-Net of width {fields['num_channels']} x {fields['channel_mult']}, {fields['num_res_blocks']} blocks, "
        f"{result['dtype']}, batches of {result['batch_size']}; {tables.where(result['machine'])}"
    ]
    rows = []
    for name, cost in result["cases"].items():
        counts = [
            text
            for kind in ("forward", "train")
            for text in (
                f"{cost['flops'][kind] / 1e9:.2f}",
                f"{cost['xla_flops'][kind] / cost['flops'][kind]:.3f}",
            )
        ]
        memory = [f"{cost['bytes'][kind] / 2**20:,.0f}" for kind in KINDS]
        rows.append([name, f"{cost['positions']:,}", f"{cost['parameters']:,}", *counts, *memory])
    heads = ["positions", "parameters", "GFLOP forward", "XLA's", "GFLOP step", "XLA's", "MiB train", "MiB sample"]
    parts.append(tables.table("an image; memory of a batch", heads, rows))
    reference = result["same_image"][0]
    rows = []
    for name in result["cases"]:
        train_row, sample_row = result["train"][name], result["sample"][name]
        tflops = result["cases"][name]["flops"]["train"] * train_row["per_second"] / 1e12
        rows.append(
            [
                name,
                f"{train_row['per_second']:.2f}",
                tables.over(train_row, reference),
                f"{tflops:.3f}",
                f"{sample_row['per_second']:.2f}",
                tables.over(sample_row, reference),
            ]
        )
    heads = ["trained/s", f"over {reference}", "TFLOP/s", "sampling steps/s", f"over {reference}"]
    parts.append(tables.table("images", heads, rows))
    if result["peer"]:
        peer = result["peer"]
        parts.append(
            f"PatchDiffusion-Pytorch, torch {peer['torch']}, {peer['case']}: its network is "
            f"{peers.agreement(peer['parity'])}"
        )
        for kind, word in KINDS.items():
            rows = [
                [name, f"{row['per_second']:.2f}", tables.over(row, "PyTorch eager")]
                for name, row in peer[kind].items()
            ]
            parts.append(tables.table(word, ["images/s", "over PyTorch eager"], rows))
    else:
        parts.append("PyTorch is left out: --peer=PATH of a checkout of PatchDiffusion-Pytorch times it too")
    parts.append(tables.targets(claims(result)))
    return "\n\n".join(parts)


def shares(result: dict[str, Any], name: str, base: str) -> dict[str, float]:
    """What a case costs as a part of what another one does."""
    case, other = result["cases"][name], result["cases"][base]
    share = {
        "operations": case["flops"]["train"] / other["flops"]["train"],
        "training memory": case["bytes"]["train"] / other["bytes"]["train"],
    }
    for kind, word in KINDS.items():
        share[f"{word} time"] = 1.0 if name == base else result[kind][base]["speed_over"][name]
    return share


def plot(result: dict[str, Any], path: Path) -> None:
    """One plot: what patches save on an image, and that they cost nothing at the same number of positions."""
    from matplotlib.figure import Figure

    cases, size = result["cases"], max(case["size"] for case in result["cases"].values())
    figure = Figure((12, 4.6), layout="constrained")
    panels = [
        (result["same_image"], f"The same {size} x {size} image: P x P less to do"),
        (result["same_grid"], "The same number of positions: as much to do"),
    ]
    panels = [(names, title) for names, title in panels if names]
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[len(names) for names, _ in panels])[0]
    for ax, (names, title) in zip(axes, panels, strict=True):
        base = names[0]
        parts = [shares(result, name, base) for name in names]
        for k, label in enumerate(parts[0]):
            places = np.arange(len(names)) + 0.2 * (k - 1.5)
            bars = ax.bar(places, [part[label] for part in parts], 0.19, label=label)
            texts = [f"1/{1 / part[label]:.0f}" if part[label] < 0.5 else f"{part[label]:.2f}" for part in parts]
            ax.bar_label(bars, texts, fontsize=7, padding=1, bbox={"color": "white", "pad": 0.3})
        for i, name in enumerate(names):
            ideal = cases[name]["positions"] / cases[base]["positions"]
            ax.hlines(ideal, i - 0.45, i + 0.45, "black", "--", label="" if i else "positions", linewidth=1)
        labels = [f"P = {cases[n]['patch_size']}\n{cases[n]['size']} x {cases[n]['size']}" for n in names]
        ax.set_xticks(range(len(names)), labels)
        ax.set(title=title, ylabel=f"cost of an image, {base} is 1")
        if cases[names[-1]]["positions"] < cases[base]["positions"]:
            powers = [4.0**-i for i in range(8) if 4.0**-i >= min(min(part.values()) for part in parts) / 4]
            ax.set_yscale("log", base=2)
            ax.set_yticks(powers, [f"1/{1 / p:.0f}" if p < 1 else "1" for p in powers])
            ax.set_ylim(powers[-1], 2)
    axes[0].legend(fontsize="small")
    device, dtype = result["machine"]["device"], result["dtype"]
    figure.suptitle(f"Patch Diffusion's U-Net at several patch sizes, {dtype}, {device}", fontsize="medium")
    figure.savefig(path, dpi=120)
