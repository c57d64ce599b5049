"""Capture without the device: a training step of fake tensors, whose bytes and seconds are added up op by op.

``mode``       the dispatch mode that watches live bytes and emulates what fake tensors do differently
``known``      small tensors whose values are known, so that branches go where they would
``patches``    what other libraries must not notice
``probes``     seconds and scratch of an op by running it once, on the device at hand
``datasheet``  seconds by a machine's rates, for a device that is not there
``run``        a model made fake for a while, and capture's instruments for it
``self_test``  dry against real on a small model
"""
