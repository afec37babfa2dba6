"""A server of the page alone, on this machine's own address."""

import json
import logging
from collections.abc import Container, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, QueryParams
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmpe_se.commands.explore.guests import Guests, Uploads
from cmpe_se.commands.explore.images import UPLOADS_KEPT
from cmpe_se.errors import UserError
from cmpe_se.utils.text import in_one_line

if TYPE_CHECKING:
    from cmpe_se.commands.explore.page import Page

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")
_PORTS = range(7860, 7960)  # where Gradio looks for a free one
_PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt")
_FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/queue/", "/gradio_api/heartbeat/", "/gradio_api/upload")
_STARTED = "/gradio_api/startup-events"
_ASK, _LISTEN, _UPLOAD = "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/upload"
_FILE = "/gradio_api/file="
_LONGEST_QUESTION = 2**20  # bytes; uploaded files are named in it, and not part of it
_FORM = 2**16  # bytes around an uploaded file
_MOST_UPLOADS, _UPLOADED = 200, 400 * 2**20  # files and bytes on the disk at a time
_SESSIONS = 50  # whose images are kept in memory: 10 MB each, or twice that
NOT_KNOWN = "the page has nothing like that; load it again"
_log = logging.getLogger(__name__)


class OnlyThePage:
    """Lets through what a browser needs for the page, and none of Gradio's proxies, recorders and editors.

    Nor what another site's page, open in the same browser, asks of this one. What cannot be answered gets a sentence
    here and in the terminal, and no trace.

    Args:
        app: Gradio's.
        guests: told who asks, and who listens.
        uploads: counts them.
        largest_file: bytes of an upload.
        functions: numbers of the page's events.
    """

    def __init__(self, app: ASGIApp, *, guests: Guests, uploads: Uploads, largest_file: int, functions: Container[int]):
        self.app, self.guests, self.uploads = app, guests, uploads
        self.largest_file, self.functions = largest_file, functions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http" or not _is_known(scope["path"]):
            await PlainTextResponse("not found", status_code=404)(scope, receive, send)
        elif not _is_ours(Headers(scope=scope).get("origin", f"http://{ADDRESS}")):
            await PlainTextResponse("requests of other sites are refused", status_code=403)(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            if scope["path"] == _ASK:
                await self._ask(scope, receive, sending)
            elif scope["path"] == _LISTEN:
                with self.guests.listens(QueryParams(scope["query_string"]).get("session_hash", "")):
                    await self.app(scope, receive, sending)
            elif scope["path"] == _UPLOAD:
                await self._upload(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        except Exception as error:  # of Gradio, which does not check what it is asked
            _log.warning(f"a request to {scope['path']} could not be answered: {in_one_line(error)}")
            if started:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await PlainTextResponse(NOT_KNOWN, status_code=400)(scope, receive, send)

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An event of the page: one that it has, of a session that can be told apart."""
        body = b""
        async for chunk in Request(scope, receive).stream():
            body += chunk
            if len(body) > _LONGEST_QUESTION:
                await PlainTextResponse("this question is too long", status_code=413)(scope, receive, send)
                return
        try:
            asked = json.loads(body)
            session, function = asked["session_hash"], asked["fn_index"]
        except (ValueError, KeyError, TypeError, RecursionError):
            session = function = None
        # True is 1 to a dictionary.
        if not isinstance(session, str) or type(function) is not int or function not in self.functions:
            await PlainTextResponse(NOT_KNOWN, status_code=400)(scope, receive, send)
            return
        self.guests.asks(session)
        await self.app(scope, _again(body, receive), send)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A file, unless it or all of them together are too large."""
        length = Headers(scope=scope).get("content-length", "")
        size = int(length) if length.isdecimal() else None
        if size is None:
            await PlainTextResponse("an upload has to say its length", status_code=411)(scope, receive, send)
        elif size > self.largest_file + _FORM:
            words = f"the files exceed {self.largest_file // 2**20} MB"
            await PlainTextResponse(words, status_code=413)(scope, receive, send)
        elif refusal := self.uploads.refusal(size):
            await PlainTextResponse(refusal, status_code=429)(scope, receive, send)
        else:
            self.uploads.add(1, size)

            async def counting(message: Message) -> None:
                if message["type"] == "http.response.body":  # a list of paths
                    self.uploads.add(message.get("body", b"").count(b'","'), 0)
                await send(message)

            await self.app(scope, receive, counting)


def _again(body: bytes, receive: Receive) -> Receive:
    """What gives a request's body once more, and then what comes after it."""
    first = True

    async def received() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return received


def _is_ours(origin: str) -> bool:
    """Whether a header names this server as the page that a request comes from; what is no address does not."""
    try:
        return urlsplit(origin).hostname in _NAMES
    except ValueError:
        return False


def _is_known(path: str) -> bool:
    if path.startswith(_FILE):
        return "://" not in path and ":/" not in path  # files of this server, not addresses that it would fetch
    return path in (*_PAGES, _STARTED) or path.startswith(_FOLDERS)


@contextmanager
def serve(page: "Page", *, port: int | None, largest_file: int) -> Iterator[str]:
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
            state_session_capacity=_SESSIONS,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            theme=gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            css=(files("cmpe_se.commands.explore") / "page.css").read_text(encoding="utf-8"),
            app_kwargs={
                "middleware": [
                    Middleware(TrustedHostMiddleware, allowed_hosts=_NAMES),
                    Middleware(
                        OnlyThePage,
                        guests=page.guests,
                        uploads=Uploads(_MOST_UPLOADS, _UPLOADED, UPLOADS_KEPT),
                        largest_file=largest_file,
                        functions=page.fns,
                    ),
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
