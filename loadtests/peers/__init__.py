"""Other programs that serve the same models, each in a process of its own."""
