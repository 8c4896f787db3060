"""What a model's text means: thoughts, answer and calls of tools, told apart as the text is written."""
