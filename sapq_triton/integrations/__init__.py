"""Our solver inside other packages' pipelines.

    sapq_triton.patch("gptqmodel")                 # from here on GPTQModel quantizes with SAPQ
    sapq_triton.unpatch("gptqmodel")

    with sapq_triton.patch("llmcompressor", order="activation", damp=0.02):
        oneshot(...)

Bits, groups, calibration and files stay the pipeline's own, and so do its grids, but that the
scales of GPTQModel are searched; which codes are chosen on them changes. Each module here says what
of its package is replaced, and what is left alone.
"""

from .patching import NAMES, Patch, patch, unpatch

__all__ = ["NAMES", "Patch", "patch", "unpatch"]
