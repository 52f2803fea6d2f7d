"""How a route is declared, who may call it, and how a request becomes an answer.

1. Routes
2. Access
3. HTTP
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Callable, NamedTuple, NoReturn, Protocol, cast
from urllib.parse import parse_qsl, quote

from joborch_base.archives import Archive, repr_digest
from joborch_base.data_folder import DiskFull, Promise, user_numbers
from joborch_base.files import Form, FormReader, free_bytes
from joborch_base.identity import OLD_SERVER_LOG_S, TOKEN_PREFIX, Proof, is_here, is_own_user, link_key, machine_names, plain_address
from joborch_base.vocabulary import (
    COME_AGAIN_S,
    JSON_TYPE,
    KIB,
    MIB,
    OURS_HEADER,
    ZIP_TYPE,
    HttpError,
    JoborchError,
    Network,
    StorageError,
    T,
    __version__,
    host_of,
    load_plugin,
    log,
    nearest,
    one_line,
)

if TYPE_CHECKING:
    import bottle

    from joborch import Node

# == 1. Routes ==  A route is declared once: who may call it, what it takes, and what it answers.


class Parameter(NamedTuple):
    """One parameter of a route: the declaration makes both the OpenAPI entry and the check."""

    name: str
    place: str  # path, query, header or form
    kind: str  # string, integer, number, boolean or file
    help: str
    example: Any = None
    required: bool = False
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str = ""  # of a string; shown in OpenAPI, and checked by `read`
    default: Any = None  # the value if it is absent
    longest: int | None = None  # characters of a string, all of them printable
    missing: str = ""  # the remedy if it is required and absent
    read: Callable[[str], Any] | None = None  # makes the value from a text, or raises ValueError with the remedy

    def value(self, text: str | None) -> Any:
        """Return the value of the `text` in a request, or the default for None. Raises HttpError 400 with the remedy.

        In forms and headers, white space around the text is ignored, and an empty text counts as absent.
        """
        shown = text
        if text is not None and self.place in ("form", "header"):
            text = text.strip()
            shown = text if text or self.missing else None
        if shown is None:
            if self.missing:
                raise HttpError(400, f"{self.name} is missing: {self.missing}", self.name)
            return self.default
        try:
            return self.checked((self.read or self.plain)(shown))
        except ValueError as error:
            raise HttpError(400, f"{self.name} is {one_line(shown, 40)!r}: {error}", self.name) from error

    def plain(self, text: str) -> Any:
        """Convert a text to this kind. Raises ValueError with the remedy."""
        if self.kind != "integer":
            return text
        if not re.fullmatch(r"[+-]?[0-9]{1,30}" if self.place == "form" else r"-?[0-9]{1,30}", text):
            raise ValueError(self.any_number)
        return int(text)

    def checked(self, value: Any) -> Any:
        """Return `value` if it is within the bounds. Raises ValueError that names them."""
        if self.choices and value not in self.choices:
            raise ValueError(f"give {' or '.join(self.choices)}" if len(self.choices) == 2 else f"give one of {', '.join(self.choices)}")
        if self.longest is not None and (len(value) > self.longest or not value.isprintable()):
            raise ValueError(f"give at most {self.longest} printable characters")
        below_least = self.least is not None and value < self.least
        if self.kind in ("integer", "number") and (below_least or (self.most is not None and value > self.most)):
            raise ValueError(self.whole_number)
        return value

    @property
    def whole_number(self) -> str:
        """The remedy if a whole number is required."""
        bounds = (("from", self.least), ("to", self.most))
        return "give a whole number" + "".join(f" {word} {bound}" for word, bound in bounds if bound is not None)

    @property
    def any_number(self) -> str:
        """The remedy for what is no number. Bounds that nobody reaches would only confuse."""
        return self.whole_number if self.most is not None and self.most < 10**15 else f"give a whole number, as in {self.example}"


def read_all(parameters: Iterable[Parameter], texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the value of each parameter by its name. Raises HttpError for the first that is invalid."""
    return {parameter.name: parameter.value(texts.get(parameter.name)) for parameter in parameters}


class Gives(NamedTuple):
    """One answer of a route: what it means, its content type ("" for none) and a real example."""

    meaning: str
    content: str = ""
    example: Any = None
    also: tuple[str, ...] = ()  # other content types that the caller may ask for


@dataclass(frozen=True)
class Request:
    """What a handler sees of a request."""

    environ: Mapping[str, Any]

    @property
    def caller(self) -> Caller | None:
        """Who calls; None on a route for anyone, if nothing was proven."""
        return cast("Caller | None", self.environ.get(CALLER_KEY))

    @functools.cached_property
    def query_pairs(self) -> list[tuple[str, str]]:
        return parse_qsl(self.environ.get("QUERY_STRING", ""), keep_blank_values=True)

    @functools.cached_property
    def query(self) -> dict[str, str]:
        return dict(self.query_pairs)

    @property
    def method(self) -> str:
        return str(self.environ["REQUEST_METHOD"])

    @property
    def stream(self) -> IO[bytes]:
        return cast("IO[bytes]", self.environ["wsgi.input"])

    @property
    def length(self) -> int:
        return int(self.environ.get("CONTENT_LENGTH") or 0)

    def read_form(self, folder: Path, by_name: bool = False, unpack_limit_bytes: int = 0) -> Form:
        """Read the form of this request and write its files to `folder`. They use up the disk space reserved for the request.

        With `unpack_limit_bytes`, archives are unpacked, and all files may have so many bytes. Raises HttpError, also if the body
        is not the one of its Content-Digest.
        """
        promise: Promise | None = self.environ.get("joborch.promise")
        account = (promise.more_for_file, promise.wrote, promise.more) if promise is not None else ()
        reader, stream = FormReader(folder, by_name, *account), self.stream
        reader.unpack_limit_bytes = unpack_limit_bytes
        digest = self.header("Content-Digest")
        if not digest:
            return reader.read(stream, self.header("Content-Type"), self.length)
        checked = load_plugin("uploads").DigestedBody(stream, digest)
        try:
            form = reader.read(cast("IO[bytes]", checked), self.header("Content-Type"), self.length)
        except HttpError:
            checked.check()  # the true reason
            raise
        checked.check()
        return form

    def empty_form(self, **fields: str) -> Form:
        """Return these fields for a request that has no body. Raises HttpError if its Content-Digest is that of another body."""
        if digest := self.header("Content-Digest"):
            load_plugin("uploads").DigestedBody(self.stream, digest).check()
        return Form(fields=fields)

    def header(self, name: str) -> str:
        key = name.upper().replace("-", "_")
        return str(self.environ.get(key if key == "CONTENT_TYPE" else "HTTP_" + key, ""))

    def resumed_at(self, begin: T) -> T | int:
        """Return where a browser that reconnects to an event stream had got to (Last-Event-ID); `begin` if this is no such request."""
        known = self.header("Last-Event-ID")
        return int(known) if re.fullmatch("[0-9]{1,18}", known) else begin

    def left(self) -> bool:
        """Tell whether the caller has closed the connection, or its token is no longer valid."""
        gone, is_valid = self.environ.get("waitress.client_disconnected"), self.environ.get(VALID_KEY)
        return bool((gone and gone()) or (is_valid and not is_valid(self.caller)))


@dataclass
class Answer:
    """What a handler returns: a JSON value, bytes, an open file, or nothing; a status; further headers."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, refusal: HttpError) -> Answer:
        said = {"message": refusal.message, **({"field": refusal.field} if refusal.field else {})}
        return cls(said, refusal.status, dict(refusal.headers))


class CutOff(JoborchError):
    """Raised in a LiveBody that stays incomplete, because the caller has left or this process stops."""


LIVE_HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}  # of a LiveBody: else nginx would buffer it until its end


class LiveBody:
    """A body that is made while it is sent. It gives up its place at the end, also if nothing of it was sent.

    If its parts raise CutOff, the connection is closed without the last chunk (RFC 9112, 8), so that no caller takes the answer
    for complete. If nothing was sent before, the answer is a 503.
    """

    def __init__(self, parts: Iterator[bytes], place: contextlib.ExitStack) -> None:
        self.parts, self.place = parts, place

    def __iter__(self) -> Iterator[bytes]:
        begun = False
        try:
            for part in self.parts:
                yield part
                begun = begun or part != b""
        except CutOff as error:
            if begun:
                raise
            import bottle

            body, headers = {"message": "the server stops: try again soon"}, {"Content-Type": JSON_TYPE, "Retry-After": str(COME_AGAIN_S)}
            raise bottle.HTTPResponse(json.dumps(body), 503, headers) from error

    def close(self) -> None:
        """Give up the place. The web server calls it, however the answer ended."""
        self.place.close()


Handler = Callable[..., Answer]
# Called with node, request and connection before a thread takes a request. If it returns True, it keeps the request, and calls
# the last argument when the request is to be answered: so a caller that waits occupies no thread.
Parks = Callable[["Node", Any, Any, Callable[[], object]], bool]


ANY_TEXT = r"[\s\S]+?"  # of a path parameter: the name of a file may have a line end


@dataclass(frozen=True)
class Route:
    """One declaration, which makes the Bottle route, the OpenAPI entry, the access rule and a test."""

    method: str
    path: str  # with <name> for its variable parts
    mode: str  # "server", "client" or "server client"
    who: str  # roles separated by blanks; or anyone; or server: one that proved itself by the link's MAC, or any caller if no token is set
    summary: str
    takes: tuple[Parameter, ...]
    gives: Mapping[int, Gives]
    handler: Handler
    quick: bool  # only reads the database: a ThreadLimit lets few run at once
    slow: bool  # its duration depends on others: on what a script wrote, a client's answer, the size of an upload
    parks: Parks | None = None

    def taken(self, place: str) -> list[Parameter]:
        return [parameter for parameter in self.takes if parameter.place == place]

    @property
    def takes_form(self) -> bool:
        return bool(self.taken("form"))

    @property
    def needs_form(self) -> bool:
        return any(parameter.required for parameter in self.taken("form"))

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        part = re.sub(r"<(\w+)>", r"(?P<\1>[^/]+)", self.path)
        return re.compile(re.sub(r"<(\w+):path>", lambda found: f"(?P<{found[1]}>{ANY_TEXT})", part) + r"\Z")


ROUTES: list[Route] = []
ROLES = ("user", "portal", "reader", "operator", "client")  # of tokens


def route(
    method: str,
    path: str,
    mode: str,
    *,
    who: str,
    takes: Sequence[Parameter] = (),
    gives: Mapping[int, Gives],
    quick: bool = False,
    slow: bool = False,
    parks: Parks | None = None,
) -> Callable[[Handler], Handler]:
    """Declare a route. The first sentence of the handler's docstring is its summary."""
    known = who in ("anyone", "server") or all(role in ROLES for role in who.split())
    if not known:
        raise ValueError(f"who is {who!r}: give roles separated by blanks ({', '.join(ROLES)}), or anyone")

    def declare(handler: Handler) -> Handler:
        summary = (handler.__doc__ or "").strip().split("\n")[0]
        ROUTES.append(Route(method, path, mode, who, summary, tuple(takes), gives, handler, quick, slow, parks))
        return handler

    return declare


ROUTE_PLUGINS = (
    "documents",
    "lists",
    "results",
    "page",
    "tokens",
    "joborch_plugins.health",
    "joborch_plugins.metrics",
    "joborch_plugins.reload",
    "pauses",
    "export",
    "joborch_plugins.privacy",
    "joborch_plugins.webhooks",
    "joborch_plugins.joined",
    "joborch_plugins.clouds",
)  # modules that declare routes


@functools.lru_cache(maxsize=2)
def routes_of(mode: str) -> tuple[Route, ...]:
    """Return the routes of one mode, in an order that does not depend on which plug-in was imported first."""
    order = {load_plugin(name).__name__: number for number, name in enumerate(ROUTE_PLUGINS)}
    sorted_routes = sorted(ROUTES, key=lambda found: order.get(found.handler.__module__, -1))
    return tuple(found for found in sorted_routes if mode in found.mode.split())


def refuse_not_utf8(path: str) -> None:
    """Raise HttpError 400 for the path of a request that is not UTF-8: Bottle would drop such bytes and find something else.

    `path` has bytes as characters (PEP 3333).
    """
    raw = path.encode("latin-1")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        encoded = one_line(quote(quote(raw, safe="/"), safe="/"), 200)
        text = f"the path is not UTF-8: a file whose name is not is listed percent-encoded, so give it as {encoded}"
        raise HttpError(400, text, "path") from error


def find_route(mode: str, method: str, path: str) -> Route:
    """Return the route of a request. Raises HttpError 404 or 405."""
    wanted = "GET" if method == "HEAD" else method
    for found in routes_of(mode):
        if found.method == wanted and found.pattern.match(path):
            return found
    here = [found for found in routes_of(mode) if found.pattern.match(path)]
    if here:
        allowed = sorted({found.method for found in here} | ({"HEAD"} if any(found.method == "GET" for found in here) else set()))
        raise HttpError(405, f"{one_line(method, 20)} is not possible here: use {' or '.join(allowed)}", Allow=", ".join(allowed))
    if mode == "client" and any(found.pattern.match(path) for found in routes_of("server")):
        raise HttpError(404, f"there is nothing at {one_line(path, 80)}: this is a client, so call its server instead")
    raise HttpError(404, f"there is nothing at {one_line(path, 80)}{nearest_path(mode, path)}: see /swagger-ui/")


def nearest_path(mode: str, path: str) -> str:
    """Return ` (did you mean /jobs/1/files?)` for a path whose words are almost those of a route, or an empty text."""
    import difflib

    def likeness(wanted: str, word: str) -> float:
        return 1.0 if wanted.startswith("<") and word else difflib.SequenceMatcher(None, wanted, word).ratio()

    words, best, meant = path.strip("/").split("/"), 0.0, ""
    if len(path) > 80:
        return ""
    for found in routes_of(mode):
        wanted = found.path.strip("/").split("/")
        likely = [likeness(*pair) for pair in zip(wanted, words)] if len(wanted) == len(words) else []
        if likely and min(likely) >= 0.6 and sum(likely) > best:
            best = sum(likely)
            meant = "/" + "/".join(word if each.startswith("<") else each for each, word in zip(wanted, words))
            meant += "/" if found.path.endswith("/") and words != [""] else ""
    return f" (did you mean {one_line(meant)}?)" if meant else ""


def validate(node: Node, request: Request, declared: Route, path: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the declared parameters in path and query. Raises HttpError 400 or 404."""
    refuse_unknown(node, request, declared)
    texts = {"path": path, "query": request.query}
    return {name: value for place, given in texts.items() for name, value in read_all(declared.taken(place), given).items()}


def refuse_unknown(node: Node, request: Request, declared: Route) -> None:
    """Raise HttpError 400 for a query parameter that the route does not declare, or that is given twice.

    If a filter were silently ignored, the caller would misread the answer. A server may send its client any parameter: it may
    be newer than the client.
    """
    if not request.query_pairs or (node.config.mode == "client" and request.header(OURS_HEADER)):
        return
    known = [parameter.name for parameter in declared.taken("query")]
    for name, times in Counter(name for name, _ in request.query_pairs).items():
        shown = one_line(name, 80)
        if name not in known and any(parameter.name == name for parameter in declared.taken("form")):
            raise HttpError(400, f"{shown} does not belong in the URL: send it in the form, as in -F {shown}=...", shown)
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            path = re.sub(r"<(\w+)(:path)?>", r"{\1}", declared.path)
            raise HttpError(400, f"{shown!r} is not a parameter of {declared.method} {path}{nearest(name, known)}: {takes}", shown)
        if times > 1:
            raise HttpError(400, f"{shown} is in the URL {times} times: give it once", shown)


MISSING_USER = "give the whole number of a user, as in -F user_id=1"
EXAMPLE_ERROR = {"message": f"user_id is missing: {MISSING_USER}", "field": "user_id"}
BAD = Gives("the request cannot be understood; `field` is what to change", JSON_TYPE, EXAMPLE_ERROR)
NOT_FOUND = Gives("no job has this id", JSON_TYPE, {"message": "no job has the id 42"})
NO_LENGTH = Gives("no length", JSON_TYPE, {"message": "the request has no body: send a form with Content-Length, as curl -F does"})
TOO_LARGE = Gives("too large", JSON_TYPE, {"message": "the request is 20000000000 bytes large: at most 10737418240 (JOBORCH_MAX_UPLOAD)"})
NOT_A_FORM = Gives("not a form", JSON_TYPE, {"message": "send a form as multipart/form-data, as curl -F does"})
KEY_USED = Gives(
    "the Idempotency-Key was used before with other content", JSON_TYPE, {"message": "this Idempotency-Key was used for job 42"}
)
NO_STORAGE = Gives("storage cannot be written now", JSON_TYPE, {"message": "the database cannot be used now: try again soon"})
DISK_FULL = Gives("disk full", JSON_TYPE, {"message": "the disk of this server is too full for 1000000 bytes more: try again later"})
CLIENT_AWAY = Gives("its client does not answer now", JSON_TYPE, {"message": "gpu1:9000 cannot be reached: connection refused"})
RECEIVING = {411: NO_LENGTH, 413: TOO_LARGE, 415: NOT_A_FORM, 503: NO_STORAGE, 507: DISK_FULL}
PARTS = {
    206: Gives("the part that Range requested", ZIP_TYPE),
    304: Gives("you have it already (If-None-Match)"),
    416: Gives("the Range is outside the file", JSON_TYPE, {"message": "there are 1234 bytes: ask for a part of them"}),
}


# == 2. Access ==  A caller needs a token, or must be the same user on this machine. A refusal names the remedy.

PROXY_HEADERS = ("FORWARDED", "X_FORWARDED_FOR", "VIA", "X_REAL_IP")  # added when a request is passed on


class Caller(NamedTuple):
    """Who calls, and how that was proven: token, session, unix socket, same user, anonymous or link."""

    name: str
    proof: str
    role: str = "operator"  # one of ROLES; at a client also server
    services: tuple[str, ...] = ()  # of a portal or client; empty: all
    user: int | None = None  # of the role user
    digest: str = ""  # of the token that `joborch token add` made: a later one may have the same name

    @property
    def own_name(self) -> str | None:
        """The name of the caller's own token; None if it has none, since many may call in this way."""
        return self.name if self.proof in ("token", "session") and self.name != DEFAULT_TOKEN else None


class Peer(Protocol):
    """The other end of a connection."""

    @property
    def address(self) -> str:
        """Return its IP address; empty on a Unix socket."""

    def uid(self) -> int | None:
        """Return its user on this machine, or None if that cannot be proven."""


def check_caller(node: Node, headers: Mapping[str, str], peer: Peer) -> Caller:
    """Return who calls. Raises HttpError 401 or 403 with what the caller needs.

    `headers` are those of the request, in CGI spelling (AUTHORIZATION). A token is sufficient proof. A caller without one may be
    a web page in the user's browser, so requests from other sites, or for another host name, are refused.
    """
    shown = headers.get("AUTHORIZATION", "")
    session = session_of(node, headers.get("COOKIE", "")) if peer.address and not shown else None
    if session is not None:
        check_site(headers)
        return session[0]
    # A stored token counts even if none is needed: its holder may do less than this user.
    if (node.tokens and (shown or peer.address)) or shown.partition(" ")[2].strip().startswith(TOKEN_PREFIX):
        return check_token(node, shown, peer)
    check_site(headers)
    if peer.address:
        check_host(node, headers)
    uid, proxied = None, next((name for name in PROXY_HEADERS if name in headers), "")
    if not proxied and (not peer.address or is_here(peer.address)):
        uid = peer.uid()
    if not peer.address and uid is not None:  # the mode of the socket decides who may open it
        return Caller(f"uid {uid}", "unix socket")
    if is_own_user(uid):
        return Caller(f"uid {uid}", "same user")
    if node.config.allow_anonymous and is_allowed(node.config.allow_from, peer.address):
        return Caller(peer.address, "anonymous")
    raise HttpError(403, why_refused(node, peer, proxied, uid))


def check_token(node: Node, shown: str, peer: Peer) -> Caller:
    """Return the caller if it has one of our tokens, else raise HttpError 401, in a time that does not depend on the token."""
    kind, _, token = shown.partition(" ")
    token, what = token.strip(), "a token is needed"
    if token:
        is_set, stored, what = find_token(node, token)
        if kind.lower() != "bearer":
            what = "the token is wrong"
        elif is_set or stored is not None:
            return Caller(DEFAULT_TOKEN, "token") if stored is None else stored.caller("token")
    if shown:
        node.refused.note(peer.address)
    raise HttpError(401, f"{what}: send the header Authorization: Bearer TOKEN", WWW_Authenticate='Bearer realm="joborch"')


def find_token(node: Node, text: str) -> tuple[bool, Any, str]:
    """Return whether a text is a token of the settings, the stored token that it is, and why it is none, as the beginning of a message."""
    is_set = False
    for known in node.tokens:  # all of them: the time must not tell how many were compared
        is_set |= hmac.compare_digest(text.encode("utf-8", "replace"), known.encode())
    return (is_set, *node.token_store.find(text))


# -- sessions: a browser keeps a cookie in place of the token, for the web page --

SESSION_S = 12 * 3600.0
SESSION_PURPOSE = b"joborch session 1"  # of a key that is derived from a token
DEFAULT_TOKEN = "default"  # the name of the tokens in JOBORCH_TOKEN
NAME_OF_TOKEN = "[a-z][a-z0-9_-]{0,62}"
CSRF_HEADER = "X-CSRF-Token"


def session_cookie(node: Node) -> str:
    """Return the name of the cookie. Cookies are the same for all ports of a host, so that servers need different names."""
    return f"joborch-session-{node.config.port}"


def session_mac(key: bytes, text: str) -> str:
    """Return the MAC of a text about sessions."""
    return hmac.new(key, text.encode(), "sha256").hexdigest()


def session_keys(node: Node) -> list[bytes]:
    """Return the keys of sessions that stand for the tokens in the settings."""
    return [link_key(token, SESSION_PURPOSE) for token in node.tokens]


def new_session(node: Node, token: str) -> str | None:
    """Return the value of a cookie that stands for `token` for SESSION_S, or None if the token is wrong.

    Nothing is stored: the value is its own end, the token's name and a MAC. It is valid as long as the token is.
    """
    is_set, stored, _ = find_token(node, token.strip())
    if not is_set and (stored is None or stored.role == "client"):
        return None
    key = link_key(token.strip(), SESSION_PURPOSE) if stored is None else stored.session_key
    text = f"{node.clock.wall() + SESSION_S:.0f}.{secrets.token_hex(8)}.{stored.name if stored else DEFAULT_TOKEN}"
    return f"{text}.{session_mac(key, 'cookie ' + text)}"


def session_of(node: Node, cookies: str) -> tuple[Caller, str] | None:
    """Return who has the session in a Cookie header, and its CSRF token; None if it has no valid session. A client has no sessions."""
    shape = rf"(?:^|; *){session_cookie(node)}=(([0-9]{{1,15}})\.[0-9a-f]{{16}}\.({NAME_OF_TOKEN}))\.([0-9a-f]{{64}}) *(?:;|$)"
    found = re.search(shape, cookies) if cookies and node.config.mode == "server" else None
    if found is None or int(found[2]) <= node.clock.wall():
        return None
    stored = node.token_store.named(found[3])
    for key in [stored.session_key] if stored else session_keys(node) if found[3] == DEFAULT_TOKEN else []:
        if hmac.compare_digest(session_mac(key, "cookie " + found[1]), found[4]):
            caller = stored.caller("session") if stored else Caller(DEFAULT_TOKEN, "session")
            return caller, session_mac(key, "csrf " + found[1])
    return None


def csrf_token_of(node: Node, cookies: str) -> str | None:
    """Return the CSRF token of the session in a Cookie header, or None if it has no valid session."""
    session = session_of(node, cookies)
    return session and session[1]


def check_csrf(node: Node, declared: Route, caller: Caller | None, headers: Mapping[str, str]) -> None:
    """Raise HttpError 403 for a change in a session without its CSRF token, which only our own pages know."""
    if caller is None or caller.proof != "session" or declared.method == "GET" or declared.who == "anyone":
        return
    shown = headers.get(CSRF_HEADER.upper().replace("-", "_"), "").encode("latin-1", "replace")
    if not hmac.compare_digest(shown, (csrf_token_of(node, headers.get("COOKIE", "")) or "").encode()):
        raise HttpError(403, f"the header {CSRF_HEADER} is missing or out of date: load the page again", CSRF_HEADER)


def check_site(headers: Mapping[str, str]) -> None:
    """Raise HttpError 403 for a request that a browser sends for a page of another site."""
    origin = headers.get("ORIGIN")
    foreign = origin is not None and host_of(origin)[0] != headers.get("HOST", "")
    if foreign or headers.get("SEC_FETCH_SITE", "").lower() == "cross-site":
        raise HttpError(403, "a page of another site may not call this server: send a token")


def check_host(node: Node, headers: Mapping[str, str]) -> None:
    """Raise HttpError 403 for a host name that is not this server's: a web page could use one (DNS rebinding).

    IP addresses are safe, and so are requests without Host, because browsers always send it.
    """
    if "HOST" not in headers:
        return
    name = host_of(f"//{headers['HOST']}")[1]
    address = plain_address(name)
    known = [each.strip().lower() for each in node.config.hosts.split(",") if each.strip()]
    by_address = address is not None and not address.is_unspecified  # browsers accept 0.0.0.0 as this machine, too
    if not by_address and name not in {*known, "localhost", *machine_names()}:
        remedy = "use 127.0.0.1, list the name in JOBORCH_HOSTS, or send a token"
        raise HttpError(403, f"this server is not called {one_line(name, 80)!r}: {remedy}")


def is_allowed(networks: Sequence[Network], text: str) -> bool:
    """Tell whether a caller at this address needs no token. This machine counts only if loopback is among the networks."""
    address = plain_address(text)
    if address is None:
        return False
    if not address.is_loopback and is_here(text):
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return any(address in network for network in networks)


def why_refused(node: Node, peer: Peer, proxied: str, uid: int | None) -> str:
    """Return why a caller without a token is refused, and the remedy."""
    remedy = f"set JOBORCH_TOKEN for the {node.config.mode} and send it"
    if proxied:
        header = proxied.replace("_", "-").title()
        return f"the request has the header {header}, so it came through a proxy and its user is unknown: {remedy}"
    if peer.address and not is_here(peer.address):
        return f"callers at {peer.address} need a token: {remedy}, or list the address in JOBORCH_ALLOW_FROM"
    if uid is None or uid == user_numbers().unmapped:
        return f"joborch cannot tell which user of this machine is calling: {remedy}"
    return f"another user of this machine needs a token: {remedy}"


ONLY_CLIENTS = (
    "only a client calls this, which does not send its token, but proves that it has it: "
    "run the line that `joborch token add NAME --role client --services NAMES` prints"
)


def identify(node: Node, who: str, proof: Proof | None, headers: Mapping[str, str], peer: Peer) -> Caller | None:
    """Return who calls a route that is open to `who`; None for an unauthenticated caller of an open route. Raises HttpError."""
    if proof is not None and node.config.mode == "client":
        return Caller("server", "link", "server")
    try:
        caller = check_caller(node, headers, peer) if proof is None else node.plugins["joined"].caller(proof)
    except HttpError as refusal:
        if who == "client" and proof is None:
            refusal.message = ONLY_CLIENTS
        if who != "anyone":
            raise
        return None
    if who == "client" and caller.proof != "link":
        raise HttpError(401 if caller.proof == "token" else 403, ONLY_CLIENTS)
    if who == "server" and caller.proof == "token":
        refuse_old_server(node)
    if not may_call(who, caller.role):
        needed = who.replace(" ", " or ")
        raise HttpError(403, f"the token {caller.name} has the role {caller.role}, and this needs the role {needed}")
    return caller


def may_call(who: str, role: str) -> bool:
    """Tell whether a caller with this role may call a route that is open to `who`. A client has only operators and servers as callers."""
    return who == "anyone" or role == "server" or role in who.split() or (who == "server" and role == "operator")


def refuse_old_server(node: Node) -> NoReturn:
    """Raise HttpError 426 for a server that sends its token instead of a proof, and log that from time to time."""
    now = node.clock.monotonic()
    if now - node.old_server_at > OLD_SERVER_LOG_S:
        node.old_server_at = now
        log.warning("a server sends its token, as joborch 0.1.0 does: replace its joborch.pyz with version %s; its jobs wait", __version__)
    what = f"this client is joborch {__version__}, and this server does not prove its identity (joborch 0.1.0 cannot)"
    raise HttpError(426, f"{what}: replace the server's joborch.pyz with version {__version__}; its jobs wait", Upgrade="joborch-link/1")


def proof_of(node: Node, headers: Mapping[str, str], method: str, target: str, length: int, peer: Peer) -> Proof | None:
    """Return the proof in a request, or None if it has none. Raises HttpError 401 if the proof is wrong."""
    may_prove = node.config.mode == "server" or bool(node.tokens)
    if not (may_prove and headers.get("AUTHORIZATION", "").lower().startswith("joborch ")):
        return None
    try:
        return node.proofs.accept(headers, method, target, length)
    except HttpError as refusal:
        if "X-Joborch-Nonce" not in refusal.headers:  # with a new nonce, the server only needs to call /hello again
            node.refused.note(peer.address)
        raise


# == 3. HTTP ==  A request is checked at the end of its headers: its caller, its size, its route.

CALLER_KEY, VALID_KEY = "joborch.caller", "joborch.is_valid"  # in the WSGI environment, where request headers begin with HTTP_

FULL_SAID_EVERY_S = 60.0
JSON_ENCODER = json.JSONEncoder(allow_nan=False)  # of answers; json.dumps would make one for each
ANYONES_BODY_BYTES = 16 * KIB  # limit for requests without a token: strangers must not fill the memory


def check_size(node: Node, found: Route, length: int, chunked: bool) -> Promise:
    """Reserve the disk space that a body needs. Raises HttpError 411, 413 or 507, before the body is read.

    A form needs its size twice: as it arrives, and as files. If its length is unknown, each part is reserved when it arrives.
    """
    promise = Promise(node.data.account)
    if not found.takes_form:
        limit = ANYONES_BODY_BYTES if found.who == "anyone" else MIB
        if length > limit or chunked:
            what = "a body without Content-Length" if chunked else f"a body of {length:,} bytes"
            raise HttpError(413, f"{what} is not taken here: send at most {limit:,} bytes, with Content-Length")
        return promise
    if not length and not chunked and not found.needs_form:
        return promise
    if not length and not chunked:
        raise HttpError(411, "the request has no body: send a form with Content-Length, as curl -F does", "Content-Length")
    limit = node.config.max_upload_bytes
    if length > limit:
        raise HttpError(413, f"the request is {length} bytes large: at most {limit} (JOBORCH_MAX_UPLOAD)", "Content-Length")
    try:
        promise.more(2 * length)
    except DiskFull as error:
        raise too_full(node, length) from error
    return promise


def too_full(node: Node, length: int) -> HttpError:
    """Return the error for a body of `length` bytes that does not fit on the disk, and log that."""
    say_full(node, full_texts(node))
    what = f"the disk of this {node.config.mode} is too full for {length} bytes more"
    return HttpError(507, f"{what}: try again later, or ask its operator to free space (JOBORCH_MIN_FREE)", Retry_After="60")


def say_full(node: Node, texts: tuple[str, str]) -> None:
    """Log that uploads are refused because the disk is full, and what to do, at most once a minute."""
    now = node.clock.monotonic()
    if now - node.full_said_at >= FULL_SAID_EVERY_S:
        node.full_said_at = now
        log.warning("%s: %s", *texts)


def full_texts(node: Node, write_failed: bool = False) -> tuple[str, str]:
    """Say that uploads are refused and what to do: too little is free, or a write failed although there is room."""
    free, kept, refused = free_bytes(node.data.path), node.config.min_free_bytes, f"uploads are refused: {node.data.path}"
    if write_failed and free > kept:
        what = f"{refused} takes no file, although {free // MIB} MiB are free: inodes or a quota are used up"
        return what, "delete files, or raise the quota"
    return f"{refused} has {free // MIB} MiB free, JOBORCH_MIN_FREE keeps {kept // MIB}", "free space, or lower JOBORCH_MIN_FREE"


def make_app(node: Node) -> bottle.Bottle:
    """Return the WSGI application of one node: a Bottle with the routes of its mode."""
    import bottle

    app = bottle.Bottle()
    app.config["json.enable"] = False  # run_handler encodes answers
    app.router.add_filter("path", lambda _: (ANY_TEXT, None, None))
    for declared in routes_of(node.config.mode):
        app.route(declared.path, declared.method, functools.partial(run_handler, node, declared))
    app.default_error_handler = plain_error
    return app


def plain_error(error: Any) -> bytes:
    """Return the JSON body of an error that Bottle itself made."""
    import bottle

    bottle.response.content_type = JSON_TYPE
    return json.dumps({"message": one_line(str(error.body or error.status_line))}).encode()


def run_handler(node: Node, declared: Route, **arguments: str) -> bottle.HTTPResponse:
    """Run one handler. Whatever it raises becomes an answer without traceback and paths."""
    import bottle

    request, began = Request(bottle.request.environ), time.monotonic()
    try:
        values = validate(node, request, declared, arguments)
        with node.gate if declared.quick else contextlib.nullcontext():
            answer = declared.handler(node, request, **values)
    except HttpError as refusal:
        answer = Answer.of(refusal)
    except StorageError as error:
        log.error("%s %s: %s", request.method, declared.path, error)
        answer = Answer({"message": "the database cannot be used now: try again soon"}, 503, {"Retry-After": "5"})
    except DiskFull as error:
        answer = Answer.of(too_full(node, error.needed))
    except OSError as error:
        trouble = disk_refusal(node, error)
        if trouble.status != 507:  # say_full has logged that
            log.exception("%s %s: %s", request.method, declared.path, trouble.message)
        answer = Answer.of(trouble)
    except Exception:
        trouble = internal_error(node)
        log.exception("%s %s: %s", request.method, declared.path, trouble.message)
        answer = Answer.of(trouble)
    body, headers = answer.body, dict(answer.headers)
    if isinstance(body, (dict, list, int, float, str)):
        body = JSON_ENCODER.encode(body).encode() + b"\n"
        headers.setdefault("Content-Type", JSON_TYPE)
    if isinstance(body, bytes):
        headers.setdefault("Content-Length", str(len(body)))
        if node.config.mode == "client" and body:
            headers.setdefault("Repr-Digest", repr_digest(hashlib.sha256(body).hexdigest()))
    headers.update({"X-Content-Type-Options": "nosniff", OURS_HEADER: __version__})
    node.audit.note(request, declared, answer)
    sent_bytes = int(headers.get("Content-Length", 0))
    took_s = time.monotonic() - began
    node.plugins["metrics"].answered(request.method, declared, answer.status, took_s, request.length, sent_bytes)
    log_access(node, request.method, str(request.environ.get("PATH_INFO", "")), answer.status, request.caller, took_s)
    return bottle.HTTPResponse(body if body is not None else b"", answer.status, headers)


def log_access(node: Node, method: str, path: str, status: int, caller: Caller | None, took_s: float = 0.0) -> None:
    """Log an answered request if JOBORCH_ACCESS_LOG is set, without its query, which may contain private data.

    `path` has bytes as characters (PEP 3333).
    """
    if not node.config.access_log:
        return
    verb, shown = one_line(method, 20), one_line(path.encode("latin-1", "replace").decode("utf-8", "replace"), 200)
    name = caller.name if caller is not None else None
    fields = {"method": verb, "path": shown, "status": status, "caller": name, "ms": round(1000 * took_s, 1)}
    log.info("%s %s %d (caller=%s) in %.1f ms", verb, shown, status, name or "-", 1000 * took_s, extra={"fields": fields})


def internal_error(node: Node) -> HttpError:
    """Return a 500 with a random number that is also in the log."""
    return HttpError(500, f"internal error {secrets.token_hex(4)}: look for this number in the log of this {node.config.mode}")


DISK_TROUBLES = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)


def disk_refusal(node: Node, error: OSError) -> HttpError:
    """Return the answer for an error of the disk: 507 if it is full, 503 for other disk errors, else 500. /health tries it then."""
    node.disk_failed = True
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        say_full(node, full_texts(node, not isinstance(error, DiskFull)))
        return HttpError(507, f"disk is full at this {node.config.mode}: try again later", Retry_After="60")
    if error.errno in DISK_TROUBLES:
        return HttpError(503, f"the disk of this {node.config.mode} cannot be used now: try again later", Retry_After="60")
    return internal_error(node)


def reason_phrase(status: int) -> str:
    """Return HTTP's name of a status code."""
    import http

    return http.HTTPStatus(status).phrase


def file_answer(request: Request, archive: Archive, filename: str, headers: Mapping[str, str]) -> Answer:
    """Return an open file: all of it, a part (RFC 9110 Range, If-Range), or 304 if the caller has it."""
    said = {"Content-Type": ZIP_TYPE, "Repr-Digest": repr_digest(archive.sha256), **headers}
    said["Content-Disposition"] = f'attachment; filename="{filename}"'
    try:
        answer, begin, _ = ranged(request, archive.size, f'"{archive.sha256}"', said)
    except HttpError:
        archive.file.close()
        raise
    if answer.status == 304:
        archive.file.close()
    else:
        archive.file.seek(begin)
        answer.body = archive.file
    return answer


def ranged(request: Request, size: int, tag: str, headers: Mapping[str, str]) -> tuple[Answer, int, int]:
    """Return the answer to a request for a file, without its body, and which bytes the body has: from `begin` to `end`.

    It is 200, 206 for a part (RFC 9110 Range, If-Range), or 304 if the caller has the file with this ETag. Raises HttpError 416.
    """
    known = [text.strip().replace("W/", "") for text in request.header("If-None-Match").split(",")]
    if tag and (tag in known or "*" in known):
        kept = {name: text for name, text in headers.items() if not name.startswith(("Content-", "Repr-"))}
        return Answer(None, 304, {"ETag": tag, **kept}), 0, 0
    said = {**({"ETag": tag} if tag else {}), "Accept-Ranges": "bytes", **headers}
    wanted = request.method == "GET" and request.header("If-Range") in ("", tag)  # RFC 9110: only GET has ranges
    span = byte_range(request.header("Range"), size) if wanted else None
    if span is None:
        return Answer(None, 200, {**said, "Content-Length": str(size)}), 0, size
    begin, end = span
    if begin >= end:
        raise HttpError(416, f"there are {size} bytes: ask for a part of them", "Range", Content_Range=f"bytes */{size}")
    part = {"Content-Length": str(end - begin), "Content-Range": f"bytes {begin}-{end - 1}/{size}"}
    return Answer(None, 206, {**said, **part}), begin, end


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Return (begin, end) of a single byte range; empty if it is outside the file, None if the header is absent or invalid."""
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", header.strip())
    if not match or not (match[1] or match[2]):
        return None
    if not match[1]:
        return (max(0, size - int(match[2])), size) if int(match[2]) else (size, size)
    if match[2] and int(match[2]) < int(match[1]):
        return None
    return int(match[1]), min(int(match[2] or size) + 1, size)


PIPELINED_MOST = 16  # requests on one connection that arrive before the first is answered
CHUNKED_BYTES = 16 * KIB  # of a chunked body at once: the parser copies the rest for each chunk, which may be one byte
CONTROL_LINE_BYTES, TRAILER_BYTES = 4 * KIB, 64 * KIB  # of a chunked body


class Judge:
    """Extends waitress's parser: checks a request as soon as its headers have arrived, and answers 400 if it is malformed."""

    node: Node
    route: Route | None = None
    proof: Proof | None = None  # of the server that sent it
    caller: Caller | None = None
    proven = False  # its caller was authenticated

    def attach(self, channel: Any) -> None:
        self.its_channel = weakref.ref(channel)  # a cycle would keep a spool until the garbage collector runs
        self.too_many = len(channel.requests) >= PIPELINED_MOST
        self.promise = Promise(self.node.data.account)

    @property
    def channel(self) -> Any:
        return self.its_channel()

    def parse_header(self, header_plus: bytes) -> None:
        """Parse the headers of a request and check it."""
        import waitress.parser

        parser: Any = self
        try:
            cast(Any, super()).parse_header(header_plus)
            length = -1 if parser.chunked else parser.content_length
            self.proof = proof_of(self.node, parser.headers, parser.command, parser.request_uri, length, self.channel)
            refuse_not_utf8(parser.path)
            found = self.route = find_route(self.node.config.mode, parser.command, parser.path)
            self.caller = identify(self.node, found.who, self.proof, parser.headers, self.channel)
            check_csrf(self.node, found, self.caller, parser.headers)
            if self.caller is not None:
                self.proven = self.channel.proven = True
            self.promise = check_size(self.node, found, parser.content_length, parser.chunked)
        except HttpError as refusal:
            self.refuse(refusal)
        except (waitress.parser.ParsingError, waitress.parser.TransferEncodingNotImplemented):
            raise  # waitress answers these
        except Exception as error:  # noqa: BLE001 - strangers can cause it, so it is logged only for debugging
            self.refuse_unread(error)

    def received(self, data: bytes) -> int:
        """Process received data. Every error becomes an answer, and strangers cannot fill the log."""
        parser: Any = self
        if self.too_many:
            self.refuse(HttpError(400, f"more than {PIPELINED_MOST} requests arrived at once: wait for the answers before you send more"))
            return len(data)
        try:
            in_body = parser.body_rcv is not None and not parser.completed
            return self.received_body(data) if in_body else int(cast(Any, super()).received(data))
        except DiskFull as error:
            self.refuse(too_full(self.node, error.needed))
        except OSError as error:  # of the file that a large body is spooled to
            log.error("%s %s: the body cannot be kept: %s", parser.command, one_line(parser.path, 80), error)
            self.refuse(disk_refusal(self.node, error))
        except Exception as error:  # noqa: BLE001 - as above
            self.refuse_unread(error)
        return len(data)

    def received_body(self, data: bytes) -> int:
        """Process a part of the body and count it in the disk account."""
        parser: Any = self
        if parser.chunked:
            data = data[:CHUNKED_BYTES]
            self.promise.more(2 * len(data))
        taken = int(cast(Any, super()).received(data))
        self.promise.wrote(taken)
        if parser.chunked and (len(parser.body_rcv.control_line) > CONTROL_LINE_BYTES or len(parser.body_rcv.trailer) > TRAILER_BYTES):
            self.refuse(HttpError(400, "the request cannot be read: the head of a chunk, or what follows the last one, is too long"))
        return taken

    def refuse_unread(self, error: Exception) -> None:
        log.debug("a request cannot be read: %s", one_line(repr(error), 200))
        self.refuse(HttpError(400, "the request cannot be read: its first line or a header is malformed"))

    def refuse(self, refusal: HttpError) -> None:
        """Answer the request with this error and discard its body."""
        import waitress.utilities

        parser: Any = self
        self.node.plugins["metrics"].answered(getattr(self, "command", ""), self.route, refusal.status)
        log_access(self.node, getattr(self, "command", ""), getattr(self, "path", ""), refusal.status, self.caller)
        parser.error = waitress.utilities.Error(refusal.message)
        parser.error.refusal = refusal
        # With a length of 0, waitress's own limits do not replace this error.
        parser.completed, parser.expect_continue, parser.content_length = True, False, 0
        self.close()

    def close(self) -> None:
        """Release the body and the disk space that was promised for it."""
        with contextlib.suppress(OSError):  # it may have buffered bytes that the disk does not accept
            cast(Any, super()).close()
        self.promise.close()
