"""Starts, places and watches workers; talks to them by messages only."""
