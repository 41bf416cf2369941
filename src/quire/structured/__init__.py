"""Structured output: texts that must match a schema, a regex or a grammar.

In the order of a request: `response_format.py` and `spec.py` turn what the client asked for into a
`GrammarSpec` (with `structural_tag.py` for tagged text); `checker.py` compiles it once in a process that
may be killed, for the front end; `store.py` compiles and keeps it for the engine core; `base.py` is what
the sampler sees, `guidance.py` the one member that does the work. Importing this package imports neither
llguidance nor torch.
"""
