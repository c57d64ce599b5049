"""Snapshots of training in the memory of many nodes: what is lost with some of them is computed from the others."""
