"""`quire bench`: a load client for any OpenAI-compatible server, and measurements of this engine.

Nothing heavy is imported here or at the head of the modules, so that `quire bench --help` is quick and
the scripts under `bench/` can use `record` alone.
"""
