"""`quire demo`: a real server, eight conversations with it at once over HTTP, and a report.

In the order of a run: `server` starts and stops `quire serve`, `talk` holds the conversations, `view` shows
them as they stream, `report` measures and prints the table.
"""

from quire.cli.demo.command import run

__all__ = ["run"]
