"""With this folder in PYTHONPATH, a Python process begins with this: KV that another instance has is loaded,
whatever the measured times say, and a load may take long. Else small models often compute it sooner."""

from quire.scheduler.cost_model import CostModel

CostModel.prompt_seconds = lambda self, num_tokens, start=0.0: 0.05 * num_tokens  # type: ignore[method-assign]
