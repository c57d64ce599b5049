"""Many processes: pipelines of stages, snapshots in memory."""
