"""Native operators: importing the module registers torch.ops.carillon.*.

Import torch first: its libraries must be loaded. carillon.kernels.table does both, and checks that
the module was compiled for the torch that runs.
"""

TORCH_VERSION: str
"""Release of torch that the module was compiled against, such as "2.13.0"."""
WITH_CUDA: bool
"""Whether the CUDA operators were compiled."""
