"""A Triton backend named `cpu` that runs every kernel in Triton's interpreter.

Triton imports this package from `triton.backends` before it decorates any kernel, which is the only moment at which
`TRITON_INTERPRET` decides how kernels run. So the variable needs not be set in any process.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
