"""One node's memory for snapshots: its layout and states, and the process that keeps it."""
