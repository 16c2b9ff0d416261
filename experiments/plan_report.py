"""The result of `experiments.plan` in words and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion import ledger
from experiments import costs


def report(result: Mapping[str, Any]) -> str:
    """The plan of a run, as `plan.plan` returns it."""
    mesh = result["mesh"]
    each = result["batch_size"] / result["devices"]
    rows = [costs.Line(**row | {"cost": ledger.Cost(**row["cost"])}) for row in result["ledger"]]
    head = f"{result['config']} on {result['target']}: data={mesh['data']} x fsdp={mesh['fsdp']}, "
    head += f"{result['batch_size']} images a step, {each:g} a device"
    lines = [head, "", costs.printed(rows), "", *_memory(result), "", *_work(result)]
    if result["compiled"]:
        lines += ["", *_communication(result)]
    if result.get("speed"):
        lines += ["", *_speed(result)]
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The networks of `plan.table` as a table in Markdown."""
    numbers = [int(name.removeprefix("state_")) for name in rows[0] if name.startswith("state_")]
    rated = [n for n in numbers if f"images_per_second_{n}" in rows[0]]
    heads = ["network", "size", "parameters", "GFLOPs/image", "kept MB/image"]
    heads += [f"state GB, fsdp={n}" for n in numbers] + [f"images/s, {n}" for n in rated]
    cells = [
        [
            row["network"],
            str(row["size"]),
            f"{row['parameters'] / 1e6:,.0f} M",
            f"{row['flops'] / 1e9:,.1f}",
            f"{row['kept'] / 1e6:,.0f}",
            *(f"{row[f'state_{n}'] / 1e9:,.2f}" for n in numbers),
            *(f"{row[f'images_per_second_{n}']:,.0f}" for n in rated),
        ]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *cells])


def _memory(result: Mapping[str, Any]) -> list[str]:
    found = result["compiled"]
    how = f"compiled in {found['seconds']:.0f} s" if found else f"estimated from the ledger ({_why(result)})"
    kinds = {name: value for name, value in result["state_bytes"].items() if value}
    rows = [*kinds.items(), (f"temporary, {how}", result["temporary_bytes"]), ("in all", result["bytes"])]
    lines = ["memory of each device", *(f"  {value / 2**30:9.3f} GiB  {name}" for name, value in rows)]
    if found:
        sizes = ", ".join(
            f"{name} {found[key] / 2**30:.3f}"
            for name, key in (("arguments", "arguments"), ("results", "outputs"), ("in place of arguments", "alias"))
        )
        lines.append(f"  of which the compiler says, in GiB: {sizes}")
    if result["memory"]:
        room = f"{result['usable'] / 2**30:.1f} of the {result['memory'] / 2**30:.1f} GiB of a device"
        lines.append(f"  {'fits' if result['fits'] else 'DOES NOT FIT'} in {room}")
        how = "compiled" if result["largest_compiled"] else "estimated"
        lines.append(f"  largest power of two that fits, {how}: {result['largest']} images a device")
    if result["refused"]:
        lines.append(f"  the compiler: {result['refused']}")
    return lines


def _why(result: Mapping[str, Any]) -> str:
    return result["not_compiled"] or "the compiler refused"


def _work(result: Mapping[str, Any]) -> list[str]:
    lines = [f"{result['flops']:.3e} FLOPs a step: three forward passes of the network, by the ledger"]
    if not result["denoises"]:
        lines[0] += "; this objective evaluates it more often"
    if result["compiled"] and result["compiled"]["flops"]:
        counted = result["compiled"]["flops"] * result["devices"]
        lines.append(f"{counted:.3e} FLOPs a step, by XLA, which counts the body of a loop once")
    return lines


def _communication(result: Mapping[str, Any]) -> list[str]:
    found = result["compiled"]["collectives"]
    if not found:
        return ["no communication"]
    lines = ["communication of each device, a step; in loops of unknown length, as on TPUs, counted once"]
    for name, row in found.items():
        lines.append(
            f"  {row['count']:6} {name:18} of {row['bytes'] / 1e9:9.3f} GB in all, sends {row['sent'] / 1e9:9.3f} GB"
        )
    if result["bandwidth"]:
        total = sum(row["sent"] for row in found.values())
        rate = result["bandwidth"]
        lines.append(f"  {1000 * total / rate:.1f} ms at {rate / 1e9:.0f} GB/s, hidden where computation takes longer")
    return lines


def _speed(result: Mapping[str, Any]) -> list[str]:
    peak = result["peak_flops"] / 1e12
    lines = [f"at a share of the peak, {peak:,.0f} TFLOP/s a device in bfloat16"]
    for row in result["speed"]:
        shown = f"{1000 * row['seconds']:9.1f} ms a step, {row['images_per_second']:10,.0f} images/s"
        lines.append(f"  {row['utilisation']:.0%}  {shown}")
    if result["dtype"] != "bfloat16":
        lines.append(f"  (this network computes in {result['dtype']}, whose peak is lower)")
    return lines
