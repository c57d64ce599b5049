"""A training step's allocations at planned addresses: a C++ core, its bindings to torch, and when to plan what."""
