"""What the commands `foretoken cluster …` run."""
