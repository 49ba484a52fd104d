"""What a training run needs, before it starts: its step compiled from shapes, and what the program says."""
