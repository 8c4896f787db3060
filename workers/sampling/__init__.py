"""From logits to tokens: sampling, grammars, and when to stop."""
