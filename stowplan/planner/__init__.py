"""Decisions from numbers: what to keep, where to put it, in which order; imports neither torch nor ray."""
