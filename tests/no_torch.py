"""Fail if a run's `-X importtime` log shows a module that the runtime never imports; print what it shows otherwise.

python tests/no_torch.py IMPORTS.log
"""

import sys
from pathlib import Path

BANNED = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers"}

lines = Path(sys.argv[1]).read_text().splitlines()
imported = {
    line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time:") and "|" in line
}
print("\n".join(line for line in lines if not line.startswith("import time:")))
if not {"numpy", "onnxruntime"} <= imported:
    sys.exit("the log shows no run at all")
if found := BANNED & imported:
    sys.exit(f"the runtime imported {', '.join(sorted(found))}")
print(f"{len(imported)} top-level modules were imported, none of {', '.join(sorted(BANNED))}")
