"""A plan on the tensors of one process: capture, the op tape, host copies, and the engine that carries a plan out."""
