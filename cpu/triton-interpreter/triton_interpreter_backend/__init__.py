"""A Triton backend named `cpu` that runs every kernel in Triton's interpreter.

Triton imports this package from `triton.backends`, before it decorates any kernel: the one moment at which
`TRITON_INTERPRET` still decides how kernels run. Nobody has to set the variable, in no process.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
