import os

import torch

# Triton decides between its interpreter and the GPU when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
