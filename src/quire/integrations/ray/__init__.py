"""Quire as a Ray Serve application: OpenAI's endpoints on a Ray cluster, with as many copies as it needs.

    serve run quire.integrations.ray:app model=/models/qwen max_replicas=4

or `import_path: quire.integrations.ray:app` in a Serve config file. docs/ray.md explains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quire.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve import Application


def app(args: Mapping[str, object]) -> Application:
    """The application, for `serve run` and for `serve.run(app({...}), name=...)`.

    args: options of `quire serve`, with underscores, and those of `ServeOptions`. Values may be text, as
    `serve run` passes them. Raises `ConfigError` for an option that does not exist or that does not fit, and
    if Ray is not installed.
    """
    try:
        from quire.integrations.ray.deployments import build
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise ConfigError(
            "Ray Serve is not installed; `pip install 'quire[ray]'` adds it."
        ) from None
    return build(args)


build_app = app
