"""The planner: this project's own step, run on fake tensors, to know what it needs before anyone
rents a GPU.
"""
