"""Foretoken's data plane: the engine and the process that serves it. Never imports Ray."""
