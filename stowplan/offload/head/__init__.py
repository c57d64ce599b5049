"""The last layer of a model and its cross entropy in chunks of rows. See docs/head.md.

``loss`` is the arithmetic, ``logits`` what stands for logits that are never made, ``chunked`` finds a model's head,
tries whether it may be replaced, and replaces it.
"""
