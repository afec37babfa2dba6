"""A server of the page alone, on this machine's own address."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from cmpe_se.errors import UserError

if TYPE_CHECKING:
    import gradio as gr

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")
_PORTS = range(7860, 7960)  # where Gradio looks for a free one
_PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt")
_FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/queue/", "/gradio_api/heartbeat/", "/gradio_api/upload")
_STARTED = "/gradio_api/startup-events"
_FILE = "/gradio_api/file="


class OnlyThePage:
    """Lets through what a browser needs for the page, and none of Gradio's proxies, recorders and editors.

    Nor what another site's page, open in the same browser, asks of this one.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http" or not _is_known(scope["path"]):
            await PlainTextResponse("not found", status_code=404)(scope, receive, send)
        elif urlsplit(Headers(scope=scope).get("origin", f"http://{ADDRESS}")).hostname not in _NAMES:
            await PlainTextResponse("requests of other sites are refused", status_code=403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _is_known(path: str) -> bool:
    if path.startswith(_FILE):
        return "://" not in path and ":/" not in path  # files of this server, not addresses that it would fetch
    return path in (*_PAGES, _STARTED) or path.startswith(_FOLDERS)


@contextmanager
def serve(page: "gr.Blocks", *, port: int | None, largest_file: int) -> Iterator[str]:
    """Serve a page for as long as the context lasts; gives its address.

    Args:
        page: made within ``only_our_settings``.
        port: a free one from 7860 on if left out.
        largest_file: bytes of an upload.

    Raises:
        UserError: the port is taken, or nothing can be served.
    """
    import gradio as gr

    try:
        _, address, _ = page.queue(api_open=False).launch(
            server_name=ADDRESS,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            max_file_size=largest_file,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            theme=gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            css=(files("cmpe_se.commands.explore") / "page.css").read_text(encoding="utf-8"),
            app_kwargs={
                "middleware": [
                    Middleware(TrustedHostMiddleware, allowed_hosts=_NAMES),
                    Middleware(OnlyThePage),
                ]
            },
        )
    except OSError as error:
        if error.strerror is not None:
            raise UserError(f"cannot serve at {ADDRESS}: {error.strerror}") from None
        taken = f"port {port} is" if port else f"the ports {_PORTS[0]} to {_PORTS[-1]} are"  # Gradio's own words
        raise UserError(f"{taken} taken or not allowed; name another with --port") from None
    try:
        yield address
    finally:
        page.close(verbose=False)
