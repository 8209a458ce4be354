"""Part of the run: what CUDA and its libraries really say, and what the engine makes of it."""

from __future__ import annotations

import subprocess
import sys

from record import Place, Rows

PROGRAM = """
import json, sys, torch
from tetriserve.engine.engine import is_out_of_memory
device = sys.argv[1]
def fill(leave_mib):
    held = []
    while (free := torch.cuda.mem_get_info()[0] >> 20) > leave_mib + 8:
        held.append(torch.empty((free - leave_mib) << 20, dtype=torch.uint8, device=device))
    return held
try:
{lines}
    if device == "cuda":
        torch.cuda.synchronize()
    said, short = "nothing", False
except Exception as error:
    said, short = f"{{type(error).__name__}}: {{error}}"[:300], is_out_of_memory(error)
held = None
try:
    works = torch.ones(1, device=device).sum().item() == 1
except Exception as error:
    works = f"{{type(error).__name__}}: {{error}}"[:120]
print(json.dumps([said, short, works]))
"""

CASES = {
    "no memory, torch": "torch.empty(1 << 60, device=device)",
    "no memory, cuBLAS": "held = fill(24); a = torch.ones(64, 64, device=device); (a @ a).sum()",
    "no memory, cuDNN": (
        "x = torch.ones(1, 64, 512, 512, device=device); w = torch.ones(64, 64, 3, 3, device=device); "
        "held = fill(80); torch.nn.functional.conv2d(x, w, padding=1)"
    ),
    "not supported, cuDNN": (
        "from torch.nn.attention import SDPBackend, sdpa_kernel; q = torch.ones(1, 2, 8, 8, device=device)\n"
        "    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION): torch.nn.functional.scaled_dot_product_attention(q, q, q)"
    ),
    "an index out of bounds": "torch.zeros(4, device=device)[torch.tensor([10], device=device)]",
}
"""Each in a process of its own; only the last one may leave the device broken."""


def errors(place: Place, rows: Rows) -> None:
    """The texts, whether they count as a lack of memory, and whether the device works afterwards."""
    for name, lines in CASES.items():
        if not place.on_cuda and ("fill(" in lines or "cuDNN" in name):
            continue
        program = PROGRAM.format(lines=f"    {lines}")
        with rows.or_error(case=name):
            ended = subprocess.run(
                [sys.executable, "-c", program, place.device], capture_output=True, text=True, timeout=60
            )
            *_, answer = ended.stdout.splitlines() or [ended.stderr[-300:]]
            rows.add(case=name, answer=answer, exit_code=ended.returncode)
