"""The rows of every accuracy table: name -> order of `sapq_triton.quantize`."""

from sapq_triton.spec import Order

METHODS: dict[str, Order] = {
    "RTN": "nearest",
    "GPTQ order": "natural",
    "activation order": "activation",
    "SAPQ": "sensitivity",
}
