"""Structured output: texts that must match a schema, a regex or a grammar.

In the order of a request: `response_format.py` and `spec.py` turn the client's request into a
`GrammarSpec` (with `structural_tag.py` for tagged text). For the front end, `checker.py` compiles it once
in a process that can be killed. For the engine core, `store.py` compiles it and keeps it. `base.py` has
the protocols that the sampler uses, and `guidance.py` implements them with llguidance. Importing this
package imports neither llguidance nor torch.
"""
