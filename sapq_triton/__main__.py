"""python -m sapq_triton"""

from .cli import main

raise SystemExit(main())
