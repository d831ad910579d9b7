"""From pictures ready for the network to answers: batching, and the runtimes that compute."""
