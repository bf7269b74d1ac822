"""The page on which people label: an app over a labels file, and the server that runs it.

The page is three static files (page/). A completion is hostile input: it reaches the browser as JSON and is set as text,
and the page's content security policy allows only the page's own script. A person is known by the secret in their link.
"""

import dataclasses
import difflib
import errno
import hmac
import ipaddress
import re
import socket
import threading
import time
from pathlib import Path
from urllib.parse import quote

from .label_file import SIDES
from .store import LabelStore, Showing

PAGE = Path(__file__).parent / "page"
_TYPES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_COOKIE = "dpo_fast_token"


@dataclasses.dataclass(frozen=True)
class PageOptions:
    """How pairs are given out (`LabelStore.show`) and what the page says. If `token` is set, every request must carry it."""

    labels_per_pair: int = 1
    overlap: bool = False
    limit: int | None = None
    gold_every: int = 10
    guidelines: str = ""
    token: str | None = None

    def __post_init__(self):
        for name in ("labels_per_pair", "gold_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1")


def make_app(store: LabelStore, options: PageOptions):
    """The FastAPI app."""
    from fastapi import Body, FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next):
        given = request.query_params.get("access") or request.cookies.get(_COOKIE) or ""
        if options.token and not hmac.compare_digest(given.encode(), options.token.encode()):
            response = PlainTextResponse("This page needs its whole link, with access=... at the end.\n", 403)
        else:
            response = await call_next(request)
            if options.token and request.query_params.get("access"):
                response.set_cookie(_COOKIE, options.token, httponly=True, samesite="strict")
        response.headers.update(_HEADERS)
        return response

    def file(name: str) -> Response:
        return Response((PAGE / name).read_bytes(), media_type=_TYPES[name])

    def refuse(status: int, text: str) -> JSONResponse:
        return JSONResponse({"error": text}, status)

    def state(name: str) -> dict:
        shown = store.show(
            name,
            labels_per_pair=options.labels_per_pair,
            overlap=options.overlap,
            limit=options.limit,
            gold_every=options.gold_every,
        )
        counts = store.counts(options.labels_per_pair, limit=options.limit)
        mine = len(store.labelled_by(name))
        common = {
            "name": name,
            "mine": mine,
            "can_undo": mine > 0,
            "labelled": counts["done"],
            "wanted": counts["wanted"],
            "guidelines": options.guidelines,
        }
        if shown is None:
            over = counts["done"] >= counts["wanted"]
            rest = "All pairs have their labels." if over else "The pairs that are left are with other people."
            return common | {"done": f"Nothing is left for you now. {rest} Thank you!"}
        return common | {"done": None} | describe(shown)

    @app.get("/")
    def root():
        return PlainTextResponse("dpo_fast.annotate: open your personal link.\n")

    @app.get("/page.js")
    def script():
        return file("page.js")

    @app.get("/page.css")
    def style():
        return file("page.css")

    @app.get("/a/{secret}")
    def page(secret: str):
        if store.annotator_of(secret) is None:
            return PlainTextResponse("No annotator has this link: ask for yours again.\n", 404)
        return file("page.html")

    @app.get("/a/{secret}/next")
    def following(secret: str):
        name = store.annotator_of(secret)
        return refuse(404, "no annotator has this link") if name is None else state(name)

    @app.get("/a/{secret}/diff")
    def difference(secret: str, token: str):
        name = store.annotator_of(secret)
        shown = store.showing(name, token) if name else None
        if shown is None:
            return refuse(409, "this pair is not open here any more: reload the page")
        left, right = sides(shown)
        return dict(zip(("left", "right"), mark_differences(left, right), strict=True))

    @app.post("/a/{secret}/label")
    def save(secret: str, token: str = Body(), choice: str = Body()):
        name = store.annotator_of(secret)
        if name is None:
            return refuse(404, "no annotator has this link")
        if choice not in ("left", "right", "tie", "bad", "skip"):
            return refuse(400, f"unknown choice {choice!r}")
        try:
            store.label_showing(name, token, choice)
        except ValueError as error:
            return refuse(409, str(error))
        return state(name)

    @app.post("/a/{secret}/undo")
    def undo(secret: str):
        name = store.annotator_of(secret)
        if name is None:
            return refuse(404, "no annotator has this link")
        if store.undo(name) is None:
            return refuse(409, "there is no label to take back")
        return state(name)

    return app


def sides(shown: Showing) -> tuple[str, str]:
    """The texts on the left and on the right."""
    item = shown.item
    return (item.a, item.b) if shown.shown_left == "a" else (item.b, item.a)


def describe(shown: Showing) -> dict:
    """The data of a pair that the page needs; it holds no ids and does not say whether the pair is a gold question."""
    item = shown.item
    left, right = sides(shown)
    prompt = [{"role": "", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
    return {
        "token": shown.token,
        "prompt": [{"role": turn["role"], "content": turn.get("content") or ""} for turn in prompt],
        "left": {"text": left, "truncated": shown.shown_left in item.truncated},
        "right": {"text": right, "truncated": SIDES[shown.shown_left] in item.truncated},
    }


def mark_differences(left: str, right: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts as lists of (piece, whether the other text lacks it), cut between words."""
    words = [re.findall(r"\s+|\w+|[^\w\s]", text) for text in (left, right)]
    parts = ([], [])
    for what, *ends in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for out, side, (start, end) in zip(parts, words, (ends[:2], ends[2:]), strict=True):
            if start < end:
                out.append(("".join(side[start:end]), what != "equal"))
    return parts


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class PageServer:
    """Serves a labels file until `stop`; it is a context manager.

    Port 0 takes a free one. Raises ValueError for a port in use, for a host that is not this machine's, and for a host that
    other machines reach without `options.token`.
    """

    def __init__(
        self, store: LabelStore, options: PageOptions | None = None, *, host: str = "127.0.0.1", port: int = 0
    ):
        import uvicorn

        options = options or PageOptions()
        if not is_loopback(host) and not options.token:
            raise ValueError(f"host {host} is reached from other machines: set a token (--token), or leave host out")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            self._socket.listen(128)
        except OSError as error:
            self._socket.close()
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port {port} is in use: choose another one (--port; 0 takes a free one)") from None
            raise ValueError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{self._socket.getsockname()[1]}"
        self._store, self._options = store, options
        app = make_app(store, options)
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=3)
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def link(self, annotator: str) -> str:
        """A person's link; a new person is added."""
        access = f"?access={quote(self._options.token)}" if self._options.token else ""
        return f"{self.address}/a/{self._store.add_annotator(annotator)}{access}"

    def start(self) -> "PageServer":
        """Serve in a thread; returns when requests are answered."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """End the server; all labels are saved already."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    __enter__ = start

    def __exit__(self, *_) -> None:
        self.stop()

    def wait(self, finished) -> None:
        """Wait until `finished()`, which is asked every second, is true or the server ends."""
        while self._thread.is_alive() and not finished():
            time.sleep(1)
