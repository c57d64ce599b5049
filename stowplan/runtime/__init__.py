"""Many processes: pipelines of stages."""
