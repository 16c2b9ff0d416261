"""What a network costs, module by module, read from its trace: any function of parameters and a batch of images.

    operations    product  2 M N K,    convolution  2 taps C_in C_out                                (1)
    kept          bytes of the arrays that the gradient with respect to the parameters needs of the forward pass  (2)

A multiplication and an addition are two operations; what is done once per value (norms, activations, resizing) is left
out, a few per cent. Taps of a convolution are those inside the image. A training step takes three times as many, what
a network recomputes not counted. The module of an operation is its `jax.named_scope`, which Flax sets; the module of a
parameter is the one that uses it first, so names and nesting of the parameters do not matter. Bodies of `lax.scan`
count as often as they run.

What is kept is what JAX hands from the forward to the backward pass, but for results of elementwise operations, which
XLA repeats: in their place the arrays that they are made of in the same module, once each. This is an estimate of how
the memory of a compiled step grows with its images (docs/scale.md compares them); (1) and the parameters are exact.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal, Var

Path = tuple[str, ...]  # names of nested modules, outermost first


class Cost(NamedTuple):
    """What a module costs: values, operations of one image's forward pass, bytes that one image keeps."""

    parameters: int = 0
    flops: int = 0
    kept: int = 0


def ledger(apply: Callable[..., Any], params: Any, *inputs: Any) -> dict[Path, Cost]:
    """The costs of `apply(params, *inputs)` by module, in the order in which they are called.

    Args:
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`s.
      inputs: pytrees of the same whose leading axis is that of the images; its length does not matter.

    Per image means: what one more image adds. What is done once per batch costs nothing.
    """
    # Of two and three images, since one is a special case of broadcasting.
    traces = [_traces(apply, params, _images(inputs, n)) for n in (2, 3)]
    (two, kept_two), (three, kept_three) = (
        (_operations(forward.jaxpr), _kept(residuals.jaxpr)) for forward, residuals in traces
    )
    parameters = _parameters(traces[0][0].jaxpr, params)
    paths = dict.fromkeys([*three, *parameters, *kept_three])
    return {
        path: Cost(parameters[path], three[path] - two[path], kept_three[path] - kept_two[path])
        for path in paths
        if parameters[path] or three[path] or kept_three[path]
    }


def flops(apply: Callable[..., Any], params: Any, *inputs: Any) -> int:
    """Operations of one image's forward pass, eq. (1); arguments as for `ledger`."""
    two, three = (_operations(jax.make_jaxpr(apply)(params, *_images(inputs, n)).jaxpr).total() for n in (2, 3))
    return three - two


def total(costs: Mapping[Path, Cost]) -> Cost:
    """The sum of all modules."""
    return added(*costs.values())


def added(*costs: Cost) -> Cost:
    """The sum of costs."""
    return Cost(*map(sum, zip(Cost(), *costs, strict=True)))


def _images(inputs: Any, n: int) -> Any:
    """Shapes of the inputs of n images."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), inputs)


def _traces(apply: Callable[..., Any], params: Any, inputs: Any) -> tuple[Any, Any]:
    """The traces of the forward pass, and of what it hands to the backward pass."""

    def residuals(params: Any, *inputs: Any) -> Any:
        return jax.vjp(lambda params: apply(params, *inputs), params)[1]

    return jax.make_jaxpr(apply)(params, *inputs), jax.make_jaxpr(residuals)(params, *inputs)


def _scopes(eqn: Any) -> Path:
    """The names of the scopes that an operation is in, as far as the function that it is written in goes."""
    found = []
    for part in str(eqn.source_info.name_stack).split("/"):
        while wrapped := re.fullmatch(r"[\w.]+\((.*)\)", part):  # "jvp(block_0)"
            part = wrapped.group(1)
        if re.fullmatch(r"[\w.\-]+", part):  # einsum's is its formula
            found.append(part)
    return tuple(found)


def _inner(eqn: Any) -> list[tuple[Jaxpr, int, int]]:
    """The functions that an operation calls: (body, how often, how many inputs it has before those of the body).

    Of the branches for several platforms that for all others, of the branches of a condition the costliest.
    """
    name, p = eqn.primitive.name, eqn.params
    if name == "cond":
        branches = [_open(branch) for branch in p["branches"]]
        platforms = p.get("branches_platforms")
        if platforms is not None and None in platforms:
            return [(branches[platforms.index(None)], 1, 1)]
        return [(max(branches, key=lambda body: _operations(body).total()), 1, 1)]
    if name == "scan":
        return [(_open(p["jaxpr"]), p["length"], 0)]
    if name == "while":
        return [(_open(p["body_jaxpr"]), 1, p["cond_nconsts"])]
    if name == "pallas_call":
        return [(_open(p["jaxpr"]), prod(p["grid_mapping"].grid), 0)]
    return [(body, 1, 0) for value in p.values() if (body := _open(value)) is not None]


def _open(value: Any) -> Jaxpr | None:
    value = getattr(value, "jaxpr", value)
    return value if isinstance(value, Jaxpr) else None


def _operations(jaxpr: Jaxpr, path: Path = (), times: int = 1) -> Counter[Path]:
    """Operations by module, eq. (1)."""
    count: Counter[Path] = Counter()
    for eqn in jaxpr.eqns:
        here = (*path, *_scopes(eqn))
        own = _own_operations(eqn)
        count[here] += times * own  # of nothing too: modules are listed in the order in which they are called
        if not own:
            for body, repeats, _ in _inner(eqn):
                count.update(_operations(body, here, times * repeats))
    return count


def _own_operations(eqn: Any) -> int:
    """Operations of a product, a convolution or a library's attention; 0 for all else."""
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * prod(eqn.outvars[0].aval.shape) * prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name == "dot_product_attention_fwd_wrapper":  # cuDNN's: [B, N, H, D], [B, M, H, D]
        query, key = (v.aval.shape for v in eqn.invars[:2])
        return 4 * prod(query) * key[1]
    return 0


def _convolution(eqn: Any) -> int:
    p, (lhs, rhs) = eqn.params, (v.aval.shape for v in eqn.invars)
    numbers, out = p["dimension_numbers"], eqn.outvars[0].aval.shape
    taps = 1
    for i, (low, _) in enumerate(p["padding"]):
        image, kernel, places = (s[spec[2 + i]] for s, spec in zip((lhs, rhs, out), numbers, strict=True))
        step, spread = p["lhs_dilation"][i], p["rhs_dilation"][i]
        at = np.arange(places)[:, None] * p["window_strides"][i] + np.arange(kernel) * spread - low
        taps *= int(((at >= 0) & (at <= (image - 1) * step) & (at % step == 0)).sum())
    batch, channels = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return 2 * batch * channels * rhs[numbers.rhs_spec[1]] * taps // p["batch_group_count"]


def _parameters(jaxpr: Jaxpr, params: Any) -> Counter[Path]:
    """Values of the parameters, which are the first inputs, by the module that uses them first."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    variables = jaxpr.invars[: len(leaves)]
    users: dict[Var, Path] = {}
    _find_users(jaxpr, (), {v: v for v in variables}, users)
    count: Counter[Path] = Counter()
    for (names, leaf), variable in zip(leaves, variables, strict=True):
        unused = tuple(str(getattr(key, "key", key)) for key in names[:-1])
        count[users.get(variable, unused)] += prod(leaf.shape)
    return count


def _find_users(jaxpr: Jaxpr, path: Path, known: Mapping[Var, Var], users: dict[Var, Path]) -> None:
    """Writes into `users` where each parameter is used first; `known` are the names that they have here."""
    for eqn in jaxpr.eqns:
        given = [(i, known[v]) for i, v in enumerate(eqn.invars) if not isinstance(v, Literal) and v in known]
        given = [(i, parameter) for i, parameter in given if parameter not in users]
        if not given:
            continue
        here = (*path, *_scopes(eqn))
        for body, _, skipped in _inner(eqn):
            if len(body.invars) == len(eqn.invars) - skipped:
                inside = {body.invars[i - skipped]: parameter for i, parameter in given if i >= skipped}
                _find_users(body, here, inside, users)
        for _, parameter in given:
            users.setdefault(parameter, here)


# Operations whose result is a view of their operand.
_VIEWS = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "copy", "copy_p"}
# Operations that XLA repeats inside of what uses their result.
_FUSED = {
    *("add", "sub", "mul", "div", "neg", "max", "min", "abs", "sign", "clamp", "square", "integer_pow", "pow", "sqrt"),
    *("rsqrt", "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "erf", "sin", "cos", "and", "or", "not"),
    *("eq", "ne", "lt", "le", "gt", "ge", "select_n", "convert_element_type", "slice", "split", "concatenate", "pad"),
}


class _Array(NamedTuple):
    """An array in memory: the calls that lead to the function that computes it, the name that it has there, its module.

    A function that is called twice has one body, so a name alone is not enough.
    """

    calls: tuple[int, ...]
    variable: Var
    path: Path


class _Value(NamedTuple):
    """What must be kept for a value: in its outermost module the arrays that it is made of, elsewhere itself.

    Within a module XLA repeats elementwise operations where their result is used; a longer chain it would not repeat.
    An operand of a product must be there as a whole.
    """

    module: Path
    itself: frozenset[_Array] = frozenset()
    made_of: frozenset[_Array] = frozenset()

    def within(self, module: Path) -> frozenset[_Array]:
        return self.made_of if module == self.module else self.itself


_NOTHING = _Value(())  # of constants, parameters and images


def _kept(jaxpr: Jaxpr) -> Counter[Path]:
    """Bytes of the results by the module that computed them, eq. (2); inputs are not counted, nothing twice."""
    results = _values(jaxpr, [_NOTHING] * len(jaxpr.invars), _operands(jaxpr, set()))
    arrays = frozenset().union(*(value.made_of for value in results))
    count: Counter[Path] = Counter()
    for array in arrays:
        count[array.path] += prod(array.variable.aval.shape) * array.variable.aval.dtype.itemsize
    return count


def _values(
    jaxpr: Jaxpr, given: list[_Value], operands: set[Var], path: Path = (), calls: tuple[int, ...] = ()
) -> list[_Value]:
    """The results of a function that is called in module `path` with the values `given`."""
    known: dict[Var, _Value] = dict(zip(jaxpr.invars, given, strict=True))

    def of(variable: Any) -> _Value:
        return _NOTHING if isinstance(variable, Literal) else known.get(variable, _NOTHING)

    for eqn in jaxpr.eqns:
        here, name, inward = (*path, *_scopes(eqn)), eqn.primitive.name, [of(v) for v in eqn.invars]
        called = _inner(eqn)
        if name in _VIEWS:
            known[eqn.outvars[0]] = inward[0]
        elif len(called) == 1 and len(called[0][0].outvars) == len(eqn.outvars):
            body, _, skipped = called[0]
            whole = name not in ("scan", "while")  # what a loop collects is an array of its own
            inside = inward[skipped:] if whole else [_NOTHING] * len(body.invars)
            results = _values(body, inside, _results_of(body, eqn, operands), here, (*calls, id(eqn)))
            for v, value in zip(eqn.outvars, results, strict=True):
                known[v] = (
                    value if whole else _array(calls, v, max((a.path for a in value.made_of), key=len, default=here))
                )
        else:
            for v in eqn.outvars:
                known[v] = _array(calls, v, here)
                if name in _FUSED and v not in operands:
                    made_of = frozenset().union(*(value.within(here[:2]) for value in inward))
                    known[v] = known[v]._replace(made_of=made_of)
    return [of(v) for v in jaxpr.outvars]


def _array(calls: tuple[int, ...], variable: Var, path: Path) -> _Value:
    itself = frozenset([_Array(calls, variable, path)])
    return _Value(path[:2], itself, itself)


def _results_of(body: Jaxpr, eqn: Any, operands: set[Var]) -> set[Var]:
    """The values in the body of a call that are operands of products, there or outside."""
    pairs = zip(body.outvars, eqn.outvars, strict=False)
    return _operands(body, {v for v, outer in pairs if outer in operands and not isinstance(v, Literal)})


def _operands(jaxpr: Jaxpr, found: set[Var]) -> set[Var]:
    """The values of `jaxpr` that are operands of products and convolutions; `found` are those of its results."""
    for eqn in reversed(jaxpr.eqns):
        own = []
        if _own_operations(eqn) or (eqn.primitive.name in _VIEWS and eqn.outvars[0] in found):
            own = eqn.invars
        else:
            for body, _, skipped in _inner(eqn):
                used = _results_of(body, eqn, found)
                own += [outer for v, outer in zip(body.invars, eqn.invars[skipped:], strict=False) if v in used]
        found.update(v for v in own if not isinstance(v, Literal))
    return found
