"""From a model and a batch to a step program.

``step``             the whole step, put together
``outline``          the model around its blocks, run with what stands for them (``stand_in``); ``phases`` of its parts
``block_capture``    one block for real: its tape, bytes and seconds; ``block_program`` says it in the planner's terms
``block_allocations``, ``outside``  their requests of memory, one by one
``graph_end``        what stands for the rest of the model behind a block
``own_arguments``    a call's arguments, cut off from the graph around it
``optimizers``       what the optimizer's step takes
``instruments``      what bytes and seconds are measured with: the device itself, or a dry run
"""
