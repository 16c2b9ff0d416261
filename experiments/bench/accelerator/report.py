"""The results as one Markdown table: what was measured, the aim, and whether it is met."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.accelerator import record

SECTIONS = ("machine", "jit_train", "jit_sample", "unet", "patch", "digits", "numbers", "training")


class Row(NamedTuple):
    """A line of the table; `met` is None where there is no aim."""

    section: str
    what: str
    value: str
    aim: str = ""
    met: bool | None = None


def collected(folder: Path) -> dict[str, Any]:
    """What the sections in `folder` have written, by name."""
    found = {name: values for name in SECTIONS if (values := record.read(folder, name))}
    prepared = record.prepared_path(folder)
    if "machine" in found and prepared.exists():
        found["machine"]["prepared"] = json.loads(prepared.read_text())
    return found


def report(results: dict[str, Any]) -> str:
    """The results in Markdown: the machine, the table, what was left out and what failed."""
    m = results.get("machine", {}).get("machine", {})
    card = m.get("driver") or m.get("device") or "unknown device"
    torch = next((r["torch"] for r in results.values() if "torch" in r), None)
    lines = [f"# Accelerator run: {m.get('device', 'unknown device')}", ""]
    lines += [f"{card}; backend {m.get('backend')}, jax {m.get('jax')}, Python {m.get('python')}, PyTorch {torch}."]
    if any(r.get("tiny") for r in results.values()):
        lines += ["", "**Tiny sizes: these numbers show that every section runs, and nothing about speed.**"]
    if prepared := results.get("machine", {}).get("prepared"):
        lines += ["", *_compiled_first(prepared)]
    lines += ["", "| section | what | value | aim | met |", "|---|---|---|---|---|"]
    for row in rows(results):
        met = {None: "", True: "yes", False: "no"}[row.met]
        lines.append(f"| {row.section} | {row.what} | {row.value} | {row.aim} | {met} |")
    left_out = [f"- {name}: {what}" for name, r in results.items() for what in r.get("left_out", [])]
    lines += ["", "Left out:", "", *left_out] if left_out else []
    failed = [f"- {n}: {what}: {_last(e)}" for n, r in results.items() for what, e in r.get("errors", {}).items()]
    failed += [f"- {name}: {_last(r['error'])}" for name, r in results.items() if r.get("error")]
    lines += ["", "Failed (the JSON has more of each traceback):", "", *failed] if failed else []
    return "\n".join(lines) + "\n"


def _compiled_first(prepared: dict[str, Any]) -> list[str]:
    count, took, at_once = len(prepared["seconds"]), prepared["took"], prepared["at_once"]
    missed = [f"{p} (failed)" for p in prepared["failed"]] + [f"{p} (not reached)" for p in prepared["not_reached"]]
    return [
        f"{count} programs were compiled in {took:.0f} s, {at_once} at a time: kernels were chosen beside other",
        "processes, less exactly than alone.",
        *([f"Not compiled then: {', '.join(missed)}."] if missed else []),
    ]


def rows(results: dict[str, Any]) -> list[Row]:
    """All lines of the table, of what there is; files that cannot be read are named and left out."""
    lines = []
    for name, section in results.items():
        try:
            lines += _LINES[name](section.get("rows", {}), section)
        except Exception as e:
            lines.append(Row(name, "its JSON cannot be put into words", f"{type(e).__name__}: {e}"))
    return lines


def _machine(r: dict[str, Any], _: dict[str, Any]) -> list[Row]:
    lines = []
    for name, row in r.items():
        unit = "flops_per_second" if "flops_per_second" in row else "bytes_per_second"
        scale, name_of = (1e12, "TFLOP/s") if unit == "flops_per_second" else (1e9, "GB/s")
        lines.append(Row("machine", name, f"{row[unit] / scale:.3g} {name_of}"))
    return lines


def _jit(r: dict[str, Any], values: dict[str, Any]) -> list[Row]:
    """Rows of JiT-B/16, each of ours beside the peer with the same batch."""
    section = values["section"]
    lines = _parity(section, r)
    for name, row in r.items():
        if "images_per_second" not in row:
            continue
        text = f"{row['images_per_second']:.4g} images/s, {_memory(row)}"
        lines.append(Row(section, name, text))
        if name.startswith("PyTorch"):
            continue
        if row["mfu"] is not None:
            aim = ("at least 50 %", row["mfu"] >= 0.5) if section == "jit_train" else ("", None)
            lines.append(Row(section, f"{name}: share of the matrix product", f"{100 * row['mfu']:.1f} %", *aim))
        peer = r.get(f"PyTorch, {name.partition(', ')[0]}")
        if peer:
            lines.append(_ratio(section, f"{name}: speed over compiled PyTorch", row, peer))
    return lines


def _unet(r: dict[str, Any], _: dict[str, Any]) -> list[Row]:
    lines = _parity("unet", r)
    for name, row in r.items():
        if "images_per_second" not in row:
            continue
        lines.append(Row("unet", name, f"{row['images_per_second']:.4g} images/s, {_memory(row)}"))
        if row.get("mfu") is not None:
            lines.append(Row("unet", f"{name}: share of the matrix product", f"{100 * row['mfu']:.1f} %"))
        if peer := r.get(f"PyTorch, {name}"):
            lines.append(_ratio("unet", f"{name}: speed over compiled PyTorch", row, peer))
    for kind in ("training", "sampling"):
        pair = [(name.partition(", ")[2], row) for name, row in r.items() if name.startswith(kind)]
        if len(pair) == 2:
            (patched, a), (plain, b) = pair
            time, memory = a["seconds"] / b["seconds"], a["bytes"] / b["bytes"]
            what = f"{kind}, {patched} over {plain}"
            lines.append(Row("unet", f"{what}: time", f"{time:.3f}", "1.0", time <= 1.05))
            lines.append(Row("unet", f"{what}: memory", f"{memory:.3f}", "1.0", memory <= 1.05))
    return lines


def _patch(r: dict[str, Any], _: dict[str, Any]) -> list[Row]:
    lines = []
    for name, row in r.items():
        text = f"{row['bytes_per_second'] / 1e9:.4g} GB/s"
        if name.startswith("copy") or "over_copy" not in row:
            lines.append(Row("patch", name, text))
        else:
            ratio = row["over_copy"]
            lines.append(Row("patch", name, f"{text}, {ratio:.2f} of a copy", "at least 0.8 of a copy", ratio >= 0.8))
    return lines


def _digits(r: dict[str, Any], _: dict[str, Any]) -> list[Row]:
    text = "{steps_per_second:.4g} steps/s, {seconds_for_3600_steps:.3g} s for 3,600 steps"
    return [Row("digits", f"main job, {name}", text.format(**row)) for name, row in r.items()]


def _numbers(r: dict[str, Any], section: dict[str, Any]) -> list[Row]:
    lines = []
    for name, row in r.items():
        if "relative_difference" in row:
            worst = max(row["by_module"], key=row["by_module"].get)
            text = f"{row['relative_difference']:.2g}; most in {worst}, {row['by_module'][worst]:.2g}"
            lines.append(Row("numbers", name, text))
        elif "equal" in row:
            mode = "deterministic operations" if section.get("deterministic") else "operations as they are"
            text = (
                "bit for bit" if row["equal"] else f"{row['unequal_arrays']} arrays differ, {row['max_difference']:.2g}"
            )
            lines.append(Row("numbers", f"{name}, {mode}", text, "bit for bit", row["equal"]))
        else:
            lines.append(Row("numbers", name, f"differ by {row['max_difference_of_255']} of 255 at most", "0", None))
    return lines


def _training(r: dict[str, Any], _: dict[str, Any]) -> list[Row]:
    lines = []
    for name, row in r.items():
        text = f"{row['steps']} steps of {row['batch_size']} in {row['seconds']:.0f} s ({row['images_per_second']:.4g} "
        text += f"images/s), loss {row['loss'][0]:.3g} to {row['loss'][-1]:.3g}; see samples.png"
        lines.append(Row("training", name, text))
    return lines


def _parity(section: str, r: dict[str, Any]) -> list[Row]:
    same = r.get("PyTorch is the same network")
    if same is None:
        return []
    text = f"outputs {same['output']:.1g}, gradients {same['gradient']:.1g} apart"
    return [Row(section, "PyTorch is the same network (float32)", text, "at most 0.0001", True)]


_LINES = {
    "machine": _machine,
    "jit_train": _jit,
    "jit_sample": _jit,
    "unet": _unet,
    "patch": _patch,
    "digits": _digits,
    "numbers": _numbers,
    "training": _training,
}


def _ratio(section: str, what: str, row: dict[str, Any], peer: dict[str, Any]) -> Row:
    ratio = row["images_per_second"] / peer["images_per_second"]
    return Row(section, what, f"{ratio:.2f} x", "at least 1.0 x", ratio >= 1.0)


def _memory(row: dict[str, Any]) -> str:
    return "memory unknown" if row.get("bytes") is None else f"{row['bytes'] / 2**30:.2f} GiB"


def _last(error: str) -> str:
    """The last line of a traceback, fit for a list."""
    lines = error.strip().splitlines()
    return lines[-1][:300] if lines else "no message"
