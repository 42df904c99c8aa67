"""Compile the sweep ahead of time for a compute capability and print its resources as JSON; run by the tests.

python aot_obs_sweep.py CAPABILITY N M
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmprune.kernels.obs_sweep.kernel import _ROWS, _WARPS, _sweep_kernel

capability, n, m = map(int, sys.argv[1:])
pointers = dict.fromkeys(("asked", "original", "upper", "importance", "errors"), "*fp32") | {"keep": "*i8"}
constants = {"N": n, "M": m, "COLUMNS": 128, "ROWS": _ROWS}
names = _sweep_kernel.arg_names
signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
source = ASTSource(
    fn=_sweep_kernel,
    signature=signature,
    constexprs={(names.index(name),): value for name, value in constants.items()},
    attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
)
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": _WARPS})
with tempfile.TemporaryDirectory() as folder:
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
print(json.dumps({name: int(value) for name, value in found.items()}))
