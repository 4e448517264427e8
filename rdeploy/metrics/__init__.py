"""What the outputs of a network are worth, task by task: arrays go in, numbers with intervals come out. NumPy only."""
