"""The inference engine: batching, runtimes, and the processes that run them."""
