"""What a program is made of, counted in its jaxpr."""

import numpy as np


def products(jaxpr) -> int:
    """FLOPs of the products in a jaxpr, loops counted as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * int(np.prod([eqn.invars[0].aval.shape[i] for i in contract]))
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            total += 2 * eqn.outvars[0].aval.size * kernel.size // kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)  # of a jit, a scan, a checkpoint
            total += products(inner) * eqn.params.get("length", 1) if hasattr(inner, "eqns") else 0
    return total


def equations(jaxpr) -> list:
    """All equations of a jaxpr and of those inside it, each once."""
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            found += equations(inner) if hasattr(inner, "eqns") else []
    return found
