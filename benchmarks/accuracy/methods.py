"""The rows of every accuracy table: name -> options of `sapq_triton.quantize`."""

from typing import Any

from sapq_triton.preset import choose

Options = dict[str, Any]

METHODS: dict[str, Options] = {
    "RTN": dict(order="nearest"),
    "GPTQ order": dict(preset="fast", order="natural"),
    "activation order": dict(preset="fast"),
    "SAPQ": {},
}

# name -> options of `sapq_triton.QuantSpec`
GRIDS: dict[str, Options] = {
    "asymmetric": {},
    "symmetric": dict(symmetric=True),
    "absmax scales": dict(scale_search="absmax"),
    "scales by the Hessian": dict(scale_search="hessian"),
    "uint8 scales": dict(symmetric=True, scale_dtype="uint8"),
    "power-of-two scales": dict(symmetric=True, scale_dtype="power-of-two"),
    "nf4": dict(symmetric=True, codebook="nf4"),
    "fp4": dict(symmetric=True, codebook="fp4"),
    "fp4, power-of-two scales": dict(symmetric=True, codebook="fp4", scale_dtype="power-of-two"),
    "2:4 zeros": dict(sparsity="2:4"),
    "half zeros": dict(sparsity=0.5),
}

FIXED: Options = dict(starts=1, candidates=6, rounds=2, damp=0.01, drift_correction=0.5)

# the parts of SAPQ: each alone on top of activation order (starts and sweeps: of sensitivity order,
# which alone has them), one after another, and what it chooses fixed
PARTS: dict[str, Options] = {
    "activation order + candidates": dict(preset="fast", candidates=8),
    "activation order + rounds": dict(preset="fast", rounds=3),
    "activation order + drift correction": dict(preset="fast", drift_correction=0.5),
    "activation order + damping chosen": dict(
        order="activation", starts=1, sweeps=0, candidates=1, rounds=0, drift_correction=0.0
    ),
    "activation order without bias correction": dict(preset="fast", bias_correction=False),
    "exact OBQ": dict(preset="fast", order="obq", block=64),  # the same codes, a fifth sooner
    "min-pivot order": dict(preset="fast", order="min-pivot"),
    "sensitivity order": dict(preset="fast", order="sensitivity"),
    "sensitivity order + starts": dict(preset="fast", order="sensitivity", starts=8),
    "… + sweeps in the tile": dict(preset="fast", order="sensitivity", sweeps=2),
    "… + candidates": dict(preset="fast", order="sensitivity", sweeps=2, candidates=6),
    "… + rounds": FIXED | dict(drift_correction=0.0),
    "GPTQ order + drift correction": dict(preset="fast", order="natural", drift_correction=0.5),
    "GPTQ order, damping and drift chosen": dict(order="natural", candidates=1, rounds=0),
    "SAPQ, nothing chosen": FIXED,
    "SAPQ, drift correction .25": FIXED | dict(drift_correction=0.25),
    "SAPQ, drift correction 1": FIXED | dict(drift_correction=1.0),
    "SAPQ, damping .001": FIXED | dict(damp=0.001),
    "SAPQ, damping .1": FIXED | dict(damp=0.1),
    "SAPQ, damping .3": FIXED | dict(damp=0.3),
    "SAPQ, damping .1, drift correction 1": FIXED | dict(damp=0.1, drift_correction=1.0),
    "SAPQ without bias correction": dict(bias_correction=False),
    "SAPQ, one start": dict(starts=1),
    "SAPQ, an order for each row": dict(starts="obq"),
}


def all_options(method: str) -> Options:
    """Those of `quantize` in a method of METHODS or PARTS, with what its preset says"""
    given = dict((METHODS | PARTS)[method])
    return choose(given.pop("preset", "best"), **given)


def solver_options(method: str) -> Options:
    """Those of `sapq_triton.solve` in one of METHODS"""
    options = all_options(method)
    del options["drift_correction"]
    options["damp"] = options["damp"] or 0.01  # there is nothing to choose it on
    return options
