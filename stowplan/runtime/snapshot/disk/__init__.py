"""Copies of snapshots on disk, which torch's own checkpoints read."""
