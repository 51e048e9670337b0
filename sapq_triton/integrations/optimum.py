"""optimum's GPTQQuantizer, and with it transformers' GPTQConfig: GPTQModel's class underneath.

`optimum.gptq.quantizer.GPTQ` is `gptqmodel.quantization.gptq.GPTQ`, whose `fasterquant` calls the
`quantize` that is replaced: see `gptqmodel` here for what is obeyed, and what is left alone.
"""

from .gptqmodel import Options, swap_of
from .patching import Swap

DISTRIBUTION = "optimum"
KNOWN_VERSIONS = ("2.3",)

__all__ = ["DISTRIBUTION", "KNOWN_VERSIONS", "Options", "swaps"]


def swaps(options: Options) -> list[Swap]:
    from gptqmodel.quantization.gptq import GPTQ
    from optimum.gptq import quantizer

    if getattr(quantizer, "GPTQ", None) is not GPTQ:
        raise ValueError(
            "optimum.gptq.quantizer does not use GPTQModel's GPTQ (it needs gptqmodel installed); "
            f"known to work: optimum {KNOWN_VERSIONS}"
        )
    return [swap_of(GPTQ, options)]
