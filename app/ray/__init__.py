"""The service and its engines on Ray."""
