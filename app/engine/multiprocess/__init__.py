"""The engine in a process of its own, shared by several frontend processes."""
