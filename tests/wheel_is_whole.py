"""Fail if the wheel in a folder lacks a Python file of the tree, or has one more: packages are listed by hand.

python tests/wheel_is_whole.py dist
"""

import sys
import zipfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
(wheel,) = Path(sys.argv[1]).glob("*.whl")
packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".py", "py.typed"))}
tree = {str(p.relative_to(root)) for p in (root / "tfinfer").rglob("*.py")} | {"tfinfer/py.typed"}
tree |= {f"tfinfer/{p.relative_to(root)}" for p in (root / "export").rglob("*.py")}
if packed != tree:
    sys.exit(f"missing in the wheel: {sorted(tree - packed)}; only there: {sorted(packed - tree)}")
print(f"the wheel holds all {len(tree)} files")
