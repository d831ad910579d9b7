"""The service: a DiNAT classifier over HTTP, and the commands around it."""
