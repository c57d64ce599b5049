"""A plan on the tensors of one process: capture, the op tape, host copies, and the engine that carries a plan out."""

import torch

from stowplan.offload.versions import refuse_old_torch

refuse_old_torch(torch.__version__)
