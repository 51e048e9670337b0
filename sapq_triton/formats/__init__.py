"""Files of quantized models: written, read back and compared; read again, by us and by others."""

from .reader import FORMATS, Stored, find_format, load
from .writer import save, save_part

__all__ = ["FORMATS", "Stored", "find_format", "load", "save", "save_part"]
