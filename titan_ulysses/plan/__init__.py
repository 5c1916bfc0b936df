"""The planner: runs this project's own training step on fake tensors, to learn what the step needs
before anyone rents a GPU.
"""
