"""What a model is, where its weights come from, and the one forward pass."""
