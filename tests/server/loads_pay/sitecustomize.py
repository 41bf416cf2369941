"""With this folder in PYTHONPATH, a Python process begins with this: KV that another instance has is loaded,
whatever the measured times say, and a load may take long. Else small models often compute it sooner."""

from quire.scheduler.rates import Rates

Rates.prompt_token = 0.05  # type: ignore[method-assign, assignment]
