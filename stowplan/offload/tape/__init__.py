"""The op tape: what one block does below autograd, and how to do parts of it again without running its Python code.

``tape``    the recorded program: ops, values (storages), slots (tensors that autograd saves)
``rules``   what may be done again, op by op
``record``  a dispatch mode that writes a tape while a block runs
``proof``   every op is done again and compared bit for bit, timed on the way
``replay``  a tape and a set of targets to a flat Python function
``checks``  what was brought back, compared with what the forward pass had
``run``     one forward call of a block under a plan: packing and unpacking of saved tensors
"""
