"""The front door: an OpenAI-compatible HTTP API over the workers. Imports no torch and no transformers."""
