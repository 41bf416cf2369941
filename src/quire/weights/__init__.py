"""Finding, reading and checking checkpoints."""
