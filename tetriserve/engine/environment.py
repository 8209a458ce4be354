"""What torch, NCCL and CUDA are told by environment variables, and why; to be set before torch is imported.

What the environment says already stays. docs/operating.md lists them for whoever runs a cluster.
"""

from __future__ import annotations

import os

ENVIRONMENT = {
    # A failed range is settled here: its members leave their group and a later range builds it anew. torch's NCCL
    # watchdog would end the process instead, and where one process met an error all others a few minutes later,
    # through the store that they share.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_FR_BUFFER_SIZE": "0",
    # After an error this watchdog sleeps four times as long as this, and who leaves the group waits for it.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "250",
    # NCCL's own memory handles outlive a peer that is killed in the middle of an exchange; with CUDA IPC survivors
    # were seen to end with an illegal memory access (ai-dynamo/nixl#1952).
    "NCCL_CUMEM_ENABLE": "1",
    # The GPUs of a cell are on one node: what NCCL needs of sockets stays inside it.
    "NCCL_SOCKET_IFNAME": "lo",
    # All-to-all has no use for NVLink SHARP, whose buffers cost memory in every communicator.
    "NCCL_NVLS_ENABLE": "0",
    # Requests of many shapes in turn would otherwise leave holes that the next large one does not fit in.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


OTHER_NAMES = {"PYTORCH_CUDA_ALLOC_CONF": "PYTORCH_ALLOC_CONF"}
"""torch reads the first and only without it the second."""


def set_environment() -> None:
    """Set what is not set yet. Without effect on a CPU."""
    for name, value in ENVIRONMENT.items():
        if OTHER_NAMES.get(name, name) not in os.environ:
            os.environ.setdefault(name, value)
