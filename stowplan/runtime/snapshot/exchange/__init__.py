"""Memory processes of several nodes make parity of each other's snapshots, and compute what was lost."""
