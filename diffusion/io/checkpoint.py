"""Checkpoints from which training resumes bit for bit.

A training state is a NamedTuple of pytrees, `State(step, params, ema, opt)`. One checkpoint is one directory:

    directory/<step>/<field>/...        the arrays of one field, written by Orbax                      (1)
    directory/<step>/digests.json       digests of every leaf and of every file of (1)                 (2)

so a sampler reads `ema` without `params` and `opt`. The digest of a leaf is

    SHA-256(path, shape, dtype, key implementation, bytes)                                             (3)

because the array format has no checksum of its contents: a flipped byte would be restored as another number. `restore`
verifies the files before Orbax parses them, so that no damaged file reaches a parser, and then (3), which covers
everything from the saved state to the restored one. If a checkpoint is damaged, the newest undamaged one is restored.

A checkpoint is created by one rename and removed by one rename. So a process that is killed at any moment leaves
complete checkpoints, and at worst a directory of another name (`<step>.saving*`, `<step>.old`), which the next `save`
removes. Directories are local or mounted paths. If several JAX processes train together, each calls `save` and
`restore`; the first one writes.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import sharding
from diffusion.io.files import atomic_write

DIGESTS = "digests.json"
LISTED = 20  # leaves of each kind that an error lists

Leaves = dict[tuple[str, ...], Any]  # path of a leaf (its names from the root) -> the leaf
ARRAYS = jax.Array | np.ndarray | np.generic


def save(directory: str | os.PathLike, step: int, state: Any, *, keep: int = 3) -> None:
    """Writes `state`, a NamedTuple of pytrees of arrays, as checkpoint `step`; then removes all but the newest `keep`.

    `step` becomes the newest checkpoint: one of the same step is replaced, and later ones, which exist only if a run
    was resumed from before them, are renamed `<step>.aside` and never read. Leaves are JAX or NumPy arrays, including
    typed keys. Returns when everything is on disk.

    Raises:
      TypeError: `state` is not a NamedTuple, or a leaf is not an array of numbers.
      ValueError: `step` is negative, `keep` < 1, or two leaves have the same dotted path.
      OSError: the checkpoint could not be written; earlier ones are unchanged.
    """
    step, keep = index(step), index(keep)
    if step < 0 or keep < 1:
        raise ValueError(f"step={step} must be at least 0 and keep={keep} at least 1")
    leaves = _state_leaves(state, ARRAYS)
    arrays = _on_host(leaves)
    digests = [_digest(path, _key_impl(leaf), arrays[path]) for path, leaf in leaves.items()]
    directory = Path(directory).absolute()
    final, saving, old = (directory / f"{step}{suffix}" for suffix in ("", ".saving", ".old"))
    writer = jax.process_index() == 0
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if writer:
            _remove([*directory.glob("[0-9]*.saving*"), *directory.glob("[0-9]*.old")])
            needed, free = sum(x.nbytes for x in arrays.values()), shutil.disk_usage(directory).free
            if needed > free:
                raise OSError(errno.ENOSPC, f"needs {needed / 1e6:.1f} MB where {free / 1e6:.1f} MB are free")
        _write_arrays(saving, arrays)
        if writer:
            files = {
                p.relative_to(saving).as_posix(): _file_digest(p) for p in sorted(saving.rglob("*")) if p.is_file()
            }
            text = json.dumps({"leaves": digests, "files": files}, indent=1)
            atomic_write(saving / DIGESTS, lambda file: file.write(text.encode()))
            if final.exists():
                os.replace(final, old)
            os.replace(saving, final)
            for n in steps(directory):
                if n > step:
                    _remove([directory / f"{n}.aside"])
                    os.replace(directory / str(n), directory / f"{n}.aside")
            for n in steps(directory)[:-keep]:
                os.replace(directory / str(n), directory / f"{n}.old")
            _remove(directory.glob("[0-9]*.old"))
    except Exception as e:
        if writer:
            _remove(directory.glob("[0-9]*.saving*"))
        raise OSError(f"could not write checkpoint {final}: {_brief(e)}") from e
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"checkpoint {step}")


def restore(
    directory: str | os.PathLike,
    like: Any,
    step: int | None = None,
    *,
    report: Callable[[str], object] = warnings.warn,
) -> tuple[Any, int]:
    """The state of the newest undamaged checkpoint, or of `step`, bit for bit in the structure of `like`; and its step.

    `like` is a state of arrays or `jax.ShapeDtypeStruct`s. It gives the structure, shapes, dtypes and, if a leaf has
    one, the sharding. Where `like` has NumPy leaves they are restored as NumPy, the others as JAX arrays (never weakly
    typed). `report` is called with a message for every damaged checkpoint that is skipped.

    Raises:
      FileNotFoundError: there is no checkpoint, or none of `step`.
      OSError: all checkpoints that were tried are damaged; the message lists them.
      ValueError: the checkpoint has other leaves than `like`; the message lists missing keys, unexpected keys, and
        shapes and dtypes that differ.
    """
    wanted = _state_leaves(like, ARRAYS | jax.ShapeDtypeStruct)
    found, step = _newest(directory, step, None, report)
    return _like(like, wanted, found, f"checkpoint {Path(directory) / str(step)} does not fit this state"), step


def restore_ema(
    directory: str | os.PathLike,
    step: int | None = None,
    *,
    like: Any = None,
    on_host: bool = False,
    report: Callable[[str], object] = warnings.warn,
) -> tuple[Any, int]:
    """The averaged parameters of the newest undamaged checkpoint, or of `step`; and the step. Reads no other field.

    `like` is a pytree of arrays or `jax.ShapeDtypeStruct`s, as for `restore`. Without it, which needs no model, the
    averages are nested dicts of JAX arrays, or with `on_host` of NumPy arrays, and sequences inside `ema` become dicts
    with keys "0", "1", ...

    Raises:
      FileNotFoundError, OSError, ValueError: as `restore`.
    """
    wanted = {} if like is None else _checked_leaves({"ema": like}, "like", ARRAYS | jax.ShapeDtypeStruct)
    found, step = _newest(directory, step, "ema", report)
    if like is None:
        return _nest({path: leaf if on_host else _place(path, leaf) for path, leaf in found.items()})["ema"], step
    return _like(like, wanted, found, f"ema of checkpoint {Path(directory) / str(step)} does not fit `like`"), step


def steps(directory: str | os.PathLike) -> list[int]:
    """The steps that have a checkpoint in `directory`, ascending; empty where there is no such directory."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    names = [p.name for p in directory.iterdir() if p.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def latest(directory: str | os.PathLike) -> int | None:
    """The newest step that has a checkpoint in `directory`, damaged or not; None without one."""
    return max(steps(directory), default=None)


def _paths(tree: Any) -> Leaves:
    return {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _nest(leaves: Leaves) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, name), leaf in leaves.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _state_leaves(state: Any, kinds: Any) -> Leaves:
    if not isinstance(state, tuple) or not hasattr(state, "_fields"):
        raise TypeError(
            f"the state must be a NamedTuple such as State(step, params, ema, opt), not {type(state).__name__}"
        )
    return _checked_leaves(state, "the state", kinds)


def _checked_leaves(tree: Any, name: str, kinds: Any) -> Leaves:
    leaves = _paths(tree)
    for path, leaf in leaves.items():
        if not isinstance(leaf, kinds):
            raise TypeError(f"leaf {_dotted(path)}={leaf!r:.80} of {name} must be an array, not {type(leaf).__name__}")
        if not (_is_key(leaf) or leaf.dtype == bool or jnp.issubdtype(leaf.dtype, np.number)):
            raise TypeError(f"leaf {_dotted(path)} of {name} has dtype {leaf.dtype}; only numbers can be saved")
    names = [_dotted(path) for path in leaves]
    if len(set(names)) < len(names):  # Orbax joins names with dots too, and would write one array over the other.
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"two leaves of {name} have the same dotted path {twice}; remove the dots from their names")
    return leaves


def _on_host(leaves: Leaves) -> dict[tuple[str, ...], np.ndarray]:
    """Leaves as contiguous NumPy arrays in this machine's byte order; keys become their key data."""
    leaves = {path: jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in leaves.items()}
    arrays = sharding.gathered(leaves)
    return {path: np.asarray(x, x.dtype.newbyteorder("="), order="C") for path, x in arrays.items()}


def _digest(path: tuple[str, ...], key_impl: str | None, x: np.ndarray) -> dict[str, Any]:
    entry = {"path": list(path), "shape": list(x.shape), "dtype": x.dtype.name, "key": key_impl}
    sha = hashlib.sha256(json.dumps(entry, sort_keys=True).encode())
    sha.update(x.reshape(-1).view(np.uint8))
    return {**entry, "sha256": sha.hexdigest()}


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_arrays(path: Path, arrays: Leaves) -> None:
    # Orbax cannot write arrays without elements; DIGESTS has their shape and dtype, from which they are restored.
    tree = _nest({path: x for path, x in arrays.items() if x.size})
    with _orbax() as ocp, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = {field: ocp.args.PyTreeSave({field: value}) for field, value in tree.items()}
        checkpointer.save(path, args=ocp.args.Composite(**items))


def _read(path: Path, only: str | None) -> Leaves:
    """The verified leaves of one checkpoint, or of one field of it, on the host."""
    digests = json.loads((path / DIGESTS).read_text(encoding="utf-8"))
    entries = {tuple(e["path"]): e for e in digests["leaves"] if only in (None, e["path"][0])}
    if only and not entries:
        raise ValueError(f"it has no {only}")
    fields = {p[0] for p, e in entries.items() if 0 not in e["shape"]}
    for name, digest in digests["files"].items():
        field, nested, _ = name.partition("/")
        if (not nested or field in fields) and _file_digest(path / name) != digest:
            raise ValueError(f"file {name} does not match its digest")
    with _orbax() as ocp, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        trees = checkpointer.restore(path, ocp.args.Composite(**{f: ocp.args.PyTreeRestore() for f in fields}))
    arrays = {p: np.zeros(e["shape"], jnp.dtype(e["dtype"])) for p, e in entries.items() if 0 in e["shape"]}
    arrays |= _paths({f: trees[f][f] for f in fields})
    for p in entries.keys() ^ arrays.keys():
        raise ValueError(f"leaf {_dotted(p)} is only in one of {DIGESTS} and the arrays")
    for p, e in entries.items():
        if _digest(p, e["key"], arrays[p]) != e:
            raise ValueError(f"leaf {_dotted(p)} does not match its digest")
    return {
        p: jax.random.wrap_key_data(arrays[p], impl=e["key"]) if e["key"] else arrays[p] for p, e in entries.items()
    }


def _newest(
    directory: str | os.PathLike, step: int | None, only: str | None, report: Callable[[str], object]
) -> tuple[Leaves, int]:
    directory = Path(directory).absolute()
    available = steps(directory)
    if not available:
        raise FileNotFoundError(
            f"there is no checkpoint in {directory}; pass the checkpoint directory of a training run"
        )
    if step is not None and step not in available:
        raise FileNotFoundError(f"there is no checkpoint of step {step} in {directory}; there are {available}")
    tried = available[::-1] if step is None else [index(step)]
    problems = []
    for n, earlier in zip(tried, [*tried[1:], None], strict=True):
        try:
            return _read(directory / str(n), only), n
        except Exception as e:  # Damaged files make Orbax raise almost any exception.
            problems.append(f"{n}: {_brief(e)}")
            if earlier is not None:
                report(f"checkpoint {directory / str(n)} cannot be read ({_brief(e)}); going back to step {earlier}")
    raise OSError("\n  ".join([f"no checkpoint in {directory} can be read; tried", *problems]))


def _like(like: Any, wanted: Leaves, found: Leaves, problem: str) -> Any:
    """The leaves `found` as `like`, whose leaves are `wanted`, or a ValueError that begins with `problem`."""

    def described(leaf):
        return f"{leaf.dtype}{list(leaf.shape)}"

    def differing(field):
        return [
            f"{_dotted(p)} is {described(found[p])}, must be {described(leaf)}"
            for p, leaf in wanted.items()
            if p in found and field(found[p]) != field(leaf)
        ]

    kinds = {
        "missing key": [f"{_dotted(p)} {described(wanted[p])}" for p in wanted if p not in found],
        "unexpected key": [f"{_dotted(p)} {described(found[p])}" for p in found if p not in wanted],
        "shape mismatch": differing(lambda leaf: leaf.shape),
        "dtype mismatch": differing(lambda leaf: leaf.dtype),
    }
    lines = []
    for kind, names in kinds.items():
        lines += [f"{kind}: {name}" for name in names[:LISTED]]
        lines += [f"{kind}: and {len(names) - LISTED} more"] * (len(names) > LISTED)
    if lines:
        raise ValueError("\n  ".join([f"{problem}:", *lines]))
    leaves = [_place(path, found[path], leaf) for path, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _place(path: tuple[str, ...], value: Any, like: Any = None) -> Any:
    """`value` as `like` is: as a NumPy array, on devices with its sharding, or on the default device."""
    if isinstance(like, np.ndarray | np.generic):
        return value[()] if isinstance(like, np.generic) else value
    committed = like.committed if isinstance(like, jax.Array) else getattr(like, "sharding", None) is not None
    placed = sharding.put(value, like.sharding) if committed else jnp.asarray(value)
    if placed.dtype != value.dtype:
        raise ValueError(f"leaf {_dotted(path)} is {value.dtype}, which JAX keeps only with jax_enable_x64=True")
    return placed


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> str | None:
    return str(jax.random.key_impl(leaf)) if _is_key(leaf) else None


def _dotted(path: Iterable[str]) -> str:
    return ".".join(path)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def _brief(e: Exception) -> str:
    """One line for an error: those of tensorstore fill pages, with the cause between the address and the options."""
    line = str(e).strip().partition("\n")[0].partition(" [tensorstore_spec=")[0]
    return f"{type(e).__name__}: {line if len(line) <= 300 else f'{line[:100]} ... {line[-200:]}'}"


@contextmanager
def _orbax() -> Iterator[Any]:
    """Orbax without its log, which repeats every exception with pages of traceback.

    After an error Orbax does not wait for its other threads. They get ten seconds to end, so that none writes to the
    log, or into a directory that is about to be removed.
    """
    import orbax.checkpoint as ocp

    log = logging.getLogger("absl")
    level, threads = log.level, set(threading.enumerate())
    log.setLevel(logging.CRITICAL)
    try:
        yield ocp
    except Exception:
        patience = time.monotonic() + 10  # seconds
        while set(threading.enumerate()) - threads and time.monotonic() < patience:
            time.sleep(0.01)  # not join, which fails for a thread that has not started yet
        raise
    finally:
        log.setLevel(level)
