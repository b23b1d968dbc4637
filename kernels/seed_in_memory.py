"""Kernels that read their seed in the GPU's memory, where a graph that is replayed finds another one each time."""

import inspect
import linecache

import triton
import triton.language as tl

SEED = "seed"


def _declared(parameter):
    if parameter.name == SEED:
        return f"p_{SEED}"
    types = {tl.constexpr: ": tl.constexpr", tl.int64: ": tl.int64"}
    return parameter.name + types.get(parameter.annotation, "")


def reading_seed(function):
    """The kernel of ``function``, a kernel with a parameter ``seed``, that takes a pointer to the seed in its place.

    Its source is the signature and a call: no body is written twice, and the kernel whose seed is a number, which saves
    a load where no graph is captured, stays as it is.
    """
    name = function.fn.__name__
    parameters = inspect.signature(function.fn).parameters.values()
    declared = ", ".join(map(_declared, parameters))
    given = ", ".join(f"tl.load(p_{SEED})" if each.name == SEED else each.name for each in parameters)
    source = f"def {name}_at_seed({declared}):\n    {name}({given})\n"
    file = f"<{__name__}: {function.fn.__module__}.{name}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # Triton reads sources
    namespace = {"__name__": function.fn.__module__, "tl": tl, name: function}
    exec(compile(source, file, "exec"), namespace)
    return triton.jit(do_not_specialize=["offset"])(namespace[f"{name}_at_seed"])
