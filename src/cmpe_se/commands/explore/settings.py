"""Gradio's settings, set here and not by the environment."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_our_settings() -> Iterator[None]:
    """A temporary folder of our own for Gradio, gone at the end, and none of the environment's settings for it.

    It has to surround the first import of Gradio. The environment is as it was at the end.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="cmpe-se-explore-") as folder:
        for name in [name for name in os.environ if name.startswith("GRADIO_")]:
            del os.environ[name]  # what is served, and to whom, `serving.py` says alone
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        for name in ("NO_PROXY", "no_proxy"):  # Gradio asks its own server whether it is there
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost")))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
