"""Classes with the names and signatures of published implementations, around our solver.

    from sapq_triton.dropin import GPTQ, Quantizer     # instead of `from gptq import *`
    from sapq_triton.dropin import Quantizer, TrueOBS  # instead of `from trueobs import *`

Interfaces: github.com/IST-DASLab/gptq and github.com/IST-DASLab/OBC.
"""

from .gptq import GPTQ
from .quantizer import Quantizer
from .trueobs import TrueOBS

__all__ = ["GPTQ", "Quantizer", "TrueOBS"]
