"""The service: a DiNAT classifier behind HTTP."""
