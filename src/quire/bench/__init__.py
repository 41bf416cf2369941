"""`quire bench`: a load client for any OpenAI-compatible server, and measurements of this engine.

Nothing heavy is imported here or at the head of the modules: `quire bench --help` stays quick, and the
scripts under `bench/` use `record` alone.
"""
