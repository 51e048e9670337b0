"""Sensitivity-aware post-training quantization on Triton."""

import os as _os

# in a source checkout the folder `kernels` lies beside this one; installed, it lies inside
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "kernels")) and _os.path.isfile(
    _os.path.join(_os.path.dirname(_here), "pyproject.toml")
):
    __path__.append(_os.path.dirname(_here))

from .allocate import Allocation, ErrorCurves, LayerCurve, allocate
from .compare import compare
from .curves import error_curves
from .formats import load, save
from .integrations import patch, unpatch
from .language import quantize_folder
from .mixed import FloatColumnsResult, RowBitsResult, solve_float_columns, solve_row_bits
from .quantize import quantize
from .report import LayerReport, Report
from .report_files import read_report, save_report
from .result import SolveReport, SolveResult, dequantize, layer_error
from .solver import solve
from .spec import QuantSpec

__all__ = [
    "Allocation",
    "ErrorCurves",
    "FloatColumnsResult",
    "LayerCurve",
    "LayerReport",
    "QuantSpec",
    "Report",
    "RowBitsResult",
    "SolveReport",
    "SolveResult",
    "allocate",
    "compare",
    "dequantize",
    "error_curves",
    "layer_error",
    "load",
    "patch",
    "quantize",
    "quantize_folder",
    "read_report",
    "save",
    "save_report",
    "solve",
    "solve_float_columns",
    "solve_row_bits",
    "unpatch",
]
