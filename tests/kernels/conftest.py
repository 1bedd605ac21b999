"""Without a GPU, Triton kernels run in Triton's interpreter, which is chosen when they are defined:
so before any of them is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
