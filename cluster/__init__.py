"""Foretoken's control plane and front door: settings, protocol, gateway, controller. Never imports torch."""
