"""Weak stubs for every function of a header.

python3 gen.py PREFIXES < preprocessed header (or names, one per line) > stubs.c
"""

import re
import sys

prefixes = tuple(sys.argv[1].split(","))
text = sys.stdin.read()
names = set(re.findall(r"\b(\w+)\s*\(", text)) if "(" in text else set(text.split())
print('#include "core.h"' if "--core" in sys.argv else "int fc_unknown(const char *name, int *said);")
for name in sorted(name for name in names if re.match(rf"(?:{'|'.join(prefixes)})[A-Z]", name)):
    print(f'__attribute__((weak)) int {name}(void) {{ static int said; return fc_unknown("{name}", &said); }}')
