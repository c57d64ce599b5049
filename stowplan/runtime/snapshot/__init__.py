"""Snapshots of trainings in their nodes' memory (docs/snapshots.md).

snapshotter   what a training uses; restoring, standing, interval: its parts
job_memory    a rank's memory over the job's life; members, former, layouts, job_processes: whose memory is where
place         where a rank is, and what all ranks agree on
memory        one node's memory, its states, the process that keeps it, and how it is spoken to
exchange      memory processes of several nodes: parity, recovery
codes         erasure codes and checksums
state         a training's state as bytes and a schema, and back
disk          copies on disk
fail_points   failures at named points, for tests
"""
