"""The web page at /dashboard: what GET routes answer, as HTML that needs no JavaScript; page.js keeps it live and sends what changes.

Every page asks the handlers of the API in this process, as its caller, and so shows what the caller may see. Text becomes HTML
in `tag` and `fill` alone, which escape it.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any, Callable, NamedTuple, Union
from urllib.parse import parse_qsl, quote, urlencode

from joborch import (
    CSRF_HEADER,
    JSON_TYPE,
    NEWEST_ENDED,
    NEWEST_FAILURES,
    NEWEST_SUBMITTED,
    OLDEST_QUEUED,
    OVER,
    ROUTES,
    SESSION_S,
    USERS_WITH_JOBS,
    Answer,
    Gives,
    HttpError,
    Parameter,
    Request,
    Route,
    Server,
    Service,
    Status,
    __version__,
    check_site,
    csrf_token_of,
    find_route,
    format_duration,
    job_log,
    known_job,
    load_plugin,
    may_call,
    new_session,
    one_line,
    own_file,
    plural,
    read_all,
    route,
    sees_service,
    sees_site,
    session_cookie,
    size_text,
)

FOLDER = "joborch_plugins/page/"
HTML_TYPE = "text/html; charset=utf-8"
# Read at the import: the file of the program may be replaced while it runs.
FILES = {name: (kind, own_file(FOLDER + name)) for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript; charset=utf-8"))}
PARTS = {
    name: string.Template(text.strip())
    for name, text in re.findall(r"<!-- part: (\w+) -->\n(.*?)(?=<!-- part: |\Z)", own_file(FOLDER + "page.html").decode(), re.DOTALL)
}
HEADERS = {
    "Content-Type": HTML_TYPE,
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send forms with `Origin: null`
    "Cache-Control": "no-store",
}
NAVIGATION = (  # each with the route that its caller must be allowed
    ("/dashboard", "Overview", "GET /services"),
    ("/dashboard/jobs", "Jobs", "GET /jobs"),
    ("/dashboard/submit", "Submit", "POST /upload"),
    ("/dashboard/users", "Users", "GET /users/1"),
)
FINAL = [status.value for status in OVER]
NONE = "-"  # what a table shows where there is nothing
JOBS_A_PAGE, FILES_A_PAGE, USERS_SHOWN, SLOTS_DRAWN = 50, 200, 50, 64
INSTANCES_DRAWN, ENDED_SHOWN_S = 60, 60.0  # of each cloud; how long one that has ended is still shown
LIFE_S = (60.0, 3600.0)  # the shortest and the longest time that the bars of instances stand for
HOURS, STEP_S = 12, 1800.0  # of the charts, and of one of their bars
RECENT_S = 10.0  # how long charts and failures are kept
LOG_TAIL_BYTES = 64 * 1024  # of an output, its end
NOT_IN_THE_FORM = ("limit", "before", "wait", "wait_for", "ended", "ids", "format", "by")  # of GET /jobs
CAUSES = {
    "user": "user (the script itself)", "limit": "limit (it wanted too much)", "infrastructure": "infrastructure (not the script)",
    "cancelled": "cancelled (on request)",
}  # fmt: skip
LABELS = {  # of fields whose name in the API is not the word for them
    "user_id": "User", "inputs_from": "Inputs from", "callback_url": "Webhook address", "crlf": "Line ends", "cpus": "Cores",
    "gpus": "GPUs",
}  # fmt: skip
HELP = {
    "inputs_from": "ids of your jobs: it waits for them, too, and finds their results in from/ID/",
    "crlf": "what to do if run.sh has Windows line ends, which bash does not understand",
}
REFUSED = {403: "Not allowed", 404: "Not found"}  # titles of pages
LINE_ENDS = {"": "refuse the job", "fix": "change them to LF", "keep": "keep them"}
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


# == HTML ==


class Html(str):
    """A text that is HTML already."""

    __slots__ = ()


Content = Union[str, int, float, None, Iterable["Content"]]  # type: ignore[misc, unused-ignore]


def visible(text: str) -> str:
    """Return `text` with control characters and marks of direction as signs that can be seen: a log or a name must not hide anything."""
    return INVISIBLE.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] < " " else f"⟨U+{ord(found[0]):04X}⟩", text)


def html(content: Content) -> Html:
    """Return content as HTML: text is escaped, None is nothing, and parts of a sequence follow each other."""
    if isinstance(content, Html):
        return content
    if content is None:
        return Html("")
    if isinstance(content, (str, int, float)):
        return Html(escape(visible(str(content))))
    return Html("".join(map(html, content)))


def tag(name: str, /, *content: Content, **attributes: Any) -> Html:
    """Return an element. Attributes are named with underscores (`class_`, `data_post`); False and None leave one out."""
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(visible(str(value)))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    end = "" if name in ("input", "br", "col") else f"</{name}>"
    return Html(f"<{name}{shown}>{html(content)}{end}")


def fill(part: str, **values: Content) -> Html:
    """Return a part of page.html with its gaps filled."""
    return Html(PARTS[part].substitute({name: html(value) for name, value in values.items()}))


def name_of(text: Content) -> Html:
    """Return a name that somebody chose; the direction of its script does not change that of the text around it."""
    return tag("bdi", text, class_="long" if len(str(text)) > 24 else None)


def capital(text: str) -> str:
    """Return a sentence of the API with a capital, unless it begins with something that has none, as a file or a client."""
    word = re.match("[a-z]+(?= )", text)
    return text[0].upper() + text[1:] if word else text


def with_code(text: str) -> Content:
    """Return a sentence of the API, with what it has between backticks as code."""
    return [tag("code", part) if number % 2 else part for number, part in enumerate(capital(text).split("`"))]


def whole(text: Content) -> Html:
    """Return a short text that is never broken, as a figure with its unit."""
    return tag("span", text, class_="whole")


def prose(text: str) -> Html:
    """Return a sentence, in a column that is wide enough for it; nothing if there is none."""
    return tag("span", text, class_="long") if text else Html("")


def time_of(stamp: str | None) -> Html:
    """Return a time of the API; page.js shows it in the reader's time zone and language."""
    return tag("time", f"{stamp[:10]} {stamp[11:19]} UTC", datetime=stamp) if stamp else html(NONE)


def status_of(status: str) -> Html:
    """Return a state as a sign with its name."""
    return tag("span", status, class_=f"status {status.lower()}")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Content]], empty: str) -> Html:
    """Return a table whose cells know the title of their column: a narrow screen shows each row as a card."""
    body = [tag("tr", *(tag("td", tag("div", cell), data_label=title) for title, cell in zip(head, row))) for row in rows]
    if not body:
        return tag("p", empty, class_="quiet")
    titles = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in head)))
    return tag("table", tag("caption", caption, class_="unseen"), titles, tag("tbody", *body))


def section(key: str, title: str, *content: Content) -> Html:
    """Return a part of a page that page.js replaces when the server has news."""
    return tag("section", tag("h2", title, id=f"{key}-title"), *content, id=key, data_live=True, aria_labelledby=f"{key}-title")


class Question(NamedTuple):
    """What is asked before a button does something: a title, what happens, and the words of the button that does nothing."""

    title: str
    text: str
    no: str


def button(text: str, post: str, question: Question | None = None, then: str = "", class_: str | None = None) -> Html:
    """Return a button with which page.js sends a POST, after a question if there is one. Without JavaScript it is hidden."""
    asks = {f"data_{key}": value for key, value in question._asdict().items()} if question else {}
    return tag("button", text, type="button", class_=class_, data_post=post, data_then=then or None, **asks, hidden=True)


def label_of(name: str) -> str:
    """Return what a field of the API is called on a page."""
    return LABELS.get(name, name.capitalize())


def alert(text: str) -> Html:
    """Return what is wrong with a form; the form follows it, filled."""
    return tag("p", text, class_="alert", role="alert")


def job_link(job_id: int) -> Html:
    """Return the number of a job, with a link to it."""
    return tag("a", f"job {job_id}", href=f"/dashboard/jobs/{job_id}")


def user_link(request: Request, user_id: int) -> Content:
    """Return the number of a user, with a link to that user's shares if the caller may see them."""
    return tag("a", user_id, href=f"/dashboard/users?user_id={user_id}") if may(request, "GET", f"/users/{user_id}") else user_id


def duration(seconds: float | None) -> str:
    """Return a duration as people say it; a sign for one that is not known."""
    return NONE if seconds is None else format_duration(max(0.0, seconds))


def moment(stamp: str) -> float:
    """Return a time of the API as wall time."""
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


# == Pages ==

ONE_PAGE = {
    200: Gives("the page", "text/html"),
    400: Gives("a filter cannot be used", "text/html"),
    401: Gives("the page that asks for a token", "text/html"),
    403: Gives("this server has no token, and answers its own user alone", "text/html"),
}


def may(request: Request, method: str, path: str) -> bool:
    """Tell whether the caller of `request` has a role for a route."""
    return request.caller is not None and may_call(find_route("server", method, path).who, request.caller.role)


def answer_of(server: Server, request: Request, path: str, **query: str) -> Answer:
    """Return what GET `path` answers to the caller of `request`. Raises HttpError as that route does."""
    declared = find_route("server", "GET", path)
    if not may(request, "GET", path):
        raise HttpError(403, f"your token does not allow GET {path}")
    found = declared.pattern.match(path)
    texts = {"path": found.groupdict() if found else {}, "query": query}
    values = {name: value for place, given in texts.items() for name, value in read_all(declared.taken(place), given).items()}
    return declared.handler(server, request, **values)


def ask(server: Server, request: Request, path: str, **query: str) -> Any:
    """Return the JSON that GET `path` answers. Raises HttpError as that route does."""
    return answer_of(server, request, path, **query).body


def whole_page(server: Server, request: Request, title: str, content: Content, status: int = 200, heading: Content = None) -> Answer:
    """Return a page with everything around its content. Its heading is its title, unless another one is given."""
    path = request.environ.get("PATH_INFO", "")
    here = max((place for place, _, _ in NAVIGATION if path.startswith(place)), key=len, default="")
    allowed = [(place, text) for place, text, needed in NAVIGATION if may(request, *needed.split())]
    links = [tag("a", text, href=place, aria_current="page" if place == here else None) for place, text in allowed]
    csrf = csrf_token_of(server, request.header("Cookie"))
    end = fill("sign_out") if request.caller and request.caller.proof == "session" else None
    page = fill(
        "page", title=title, heading=heading or title, links=links, content=content, version=__version__, sign_out=end,
        csrf=csrf or "", csrf_header=CSRF_HEADER,
    )  # fmt: skip
    return Answer(page.encode("utf-8", "replace"), status, dict(HEADERS))


def sign_in_page(server: Server, request: Request, trouble: str = "", to: str = "") -> Answer:
    """Return the page that asks for a token, or says that there is none."""
    if not (server.tokens or server.token_store):
        text = "This server has no token, and answers only the user who runs it. Set JOBORCH_TOKEN for it, and load this page again."
        return whole_page(server, request, "Not allowed", tag("p", text, class_="large"), 403)
    path, query = request.environ.get("PATH_INFO", ""), request.environ.get("QUERY_STRING", "")
    return whole_page(server, request, "Sign in", fill("sign_in", trouble=trouble, to=to or path + (f"?{query}" if query else "")), 401)


def page(path: str, takes: Sequence[Parameter] = (), slow: bool = False) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Declare the route of a page. An error is a page too, and so is the question for a token: no handler runs without a caller."""

    def declare(content: Callable[..., Answer]) -> Callable[..., Answer]:
        @functools.wraps(content)
        def handler(server: Server, request: Request, **values: Any) -> Answer:
            if request.caller is None or request.caller.role == "client":
                return sign_in_page(server, request)
            try:
                return content(server, request, **values)
            except HttpError as refusal:
                text = tag("p", capital(refusal.message), class_="large", role="alert")
                return whole_page(server, request, REFUSED.get(refusal.status, "That does not work"), text, refusal.status)

        gives = {**ONE_PAGE, 404: Gives("no such job", "text/html")} if "<" in path else ONE_PAGE
        return route("GET", path, "server", who="anyone", takes=takes, gives=gives, quick=not slow, slow=slow)(handler)

    return declare


# == Overview ==


def remedy_of(request: Request, remedy: str) -> str:
    """Return a remedy of /health; one that is a call of the API in words of this page."""
    resume = re.fullmatch("POST (/clients/(.+)/resume)", remedy)
    if not resume:
        return remedy
    return f"press Resume at {resume[2]} under Clients" if may(request, "POST", resume[1]) else f"an operator can resume {resume[2]}"


def problems(request: Request, found: Sequence[Mapping[str, Any]]) -> Html:
    """Return what is wrong now."""
    if not found:
        return section("problems", "Problems", tag("p", "All is well.", class_="well"))
    shown = []
    for each in found:
        about = [f"{word} {each[word]}" for word in ("service", "client") if each.get(word)]
        since = ["since ", time_of(each["since"])] if each.get("since") else None
        remedy = tag("p", with_code(remedy_of(request, each["remedy"]))) if each.get("remedy") else None
        shown.append(
            tag("li", tag("strong", capital(each["what"])), " ", tag("span", ", ".join(about), " ", since, class_="quiet"), remedy)
        )
    return section("problems", plural(len(found), "problem", "problems"), tag("ul", *shown, class_="problems"))


def services_table(services: Sequence[Mapping[str, Any]], oldest_s: Mapping[str, float]) -> Html:
    """Return the services, with what runs and waits, and their limits."""
    head = ("Service", "Running", "Queued", "Oldest wait", "Users waiting", "Limit per user", "Mean run")
    rows = [
        (
            tag("a", name_of(each["name"]), href="/dashboard/jobs?" + urlencode({"service": each["name"]})),
            whole(f"{each['running']} of {each['max_runs']}"), f"{each['queued']:,}", whole(duration(oldest_s.get(each["name"]))),
            f"{each['users_queued']:,}", each["runs_per_user"], whole(duration(each["mean_run_s"])),
        )
        for each in services
    ]  # fmt: skip
    return section("services", "Services", table("Services", head, rows, "No service is configured."))


def squares(client: Mapping[str, Any]) -> Html:
    """Return a client's slots as squares, those in use filled."""
    slots, free = client["slots"], client["free"]
    if slots is None:
        return html("unknown")
    used, text = slots - free, f"{slots - free} of {slots} in use"
    if slots > SLOTS_DRAWN:
        return html(text)
    drawn = [
        tag("rect", x=12 * (number % 16) + 1, y=12 * (number // 16) + 1, width=9, height=9, class_="used" if number < used else "free")
        for number in range(slots)
    ]
    width, height = 12 * min(16, slots), 12 * math.ceil(slots / 16)
    return tag("svg", *drawn, class_="slots", width=width, height=height, viewBox=f"0 0 {width} {height}", role="img", aria_label=text)


def status_of_client(client: Mapping[str, Any]) -> str:
    """Return whether a client gets jobs, and why not."""
    if client["drained"]:
        return f"draining, {plural(client['jobs'], 'job', 'jobs')} left" if client["jobs"] else "drained"
    return client["trouble"] or "gets jobs"


def clients_table(request: Request, clients: Sequence[Mapping[str, Any]]) -> Html:
    """Return the clients, with their slots and why one gets no jobs."""
    rows, may_drain = [], False
    for each in clients:
        path = f"/clients/{quote(each['name'], safe=':')}/{'resume' if each['drained'] else 'drain'}"
        load = NONE if each["load"] is None else f"{each['load']:.0f} %"
        may_drain = may(request, "POST", path)
        action = button("Resume" if each["drained"] else "Drain", path) if may_drain else NONE
        rows.append((
            name_of(each["name"]), name_of(", ".join(each["services"])), squares(each), whole(load), prose(status_of_client(each)),
            time_of(each["last_seen"]), action,
        ))  # fmt: skip
    head = ("Client", "Services", "Slots", "CPU", "Status", "Last heard", "Action")
    shown = table("Clients", head, rows, "No client is configured.")
    text = "Drain: no new jobs go to this client; what runs there, runs on. Resume ends that."
    return section("clients", "Clients", shown, tag("p", text, class_="quiet") if may_drain else None)


def money(amount: float) -> str:
    """Return an amount of money, a small one with more digits."""
    return f"{amount:,.2f}" if amount >= 1 or not amount else f"{amount:.4f}"


def instance_text(each: Mapping[str, Any]) -> Content:
    """Return what an instance does now."""
    if each["state"] == "joined":
        return "runs " + plural(each["jobs"], "job", "jobs") if each["jobs"] else "is idle"
    if each["state"] == "ended":
        return ["has ended" + (": " if each["reason"] else ""), prose(each["reason"])]
    return {"intended": "is asked for", "booting": "boots", "draining": "gets no more jobs", "ending": "is being ended"}[each["state"]]


def life(each: Mapping[str, Any], begin: float, now: float) -> Html:
    """Return the life of an instance from `begin` until now, to scale: how long it booted, and how long it was a client."""

    def at(stamp: str | None) -> float:
        return 1000 * (max(moment(stamp), begin) - begin) / (now - begin) if stamp else 1000.0

    marks = {"booted": (at(each["made_at"]), at(each["joined_at"] or each["ended_at"]))}
    if each["joined_at"]:
        marks["lived"] = (at(each["joined_at"]), at(each["ended_at"]))
    drawn = [
        tag("rect", x=f"{start:.1f}", y=0, width=f"{max(0.0, end - start):.1f}", height=8, class_=name)
        for name, (start, end) in marks.items()
    ]
    return tag("svg", *drawn, class_="life", viewBox="0 0 1000 8", preserveAspectRatio="none", aria_hidden="true")


def instance_card(cloud: Mapping[str, Any], each: Mapping[str, Any], begin: float, now: float) -> Html:
    """Return one instance: what it does, its slots, its life, and what it has cost."""
    joined = each["state"] in ("joined", "draining")
    slots = squares({"slots": cloud["slots"], "free": max(0, cloud["slots"] - each["jobs"])}) if joined else None
    return tag(
        "li", tag("strong", name_of(each["name"])), " ", tag("span", instance_text(each)), slots, life(each, begin, now),
        tag("span", f"cost {money(each['cost'])}, since ", time_of(each["made_at"]), class_="quiet"),
        class_=f"instance {each['state']}", data_key=each["uuid"],
    )  # fmt: skip


def cloud_part(cloud: Mapping[str, Any], ended: Sequence[Mapping[str, Any]], now: float) -> Html:
    """Return one cloud: its instances as they come and go, and its costs."""
    live = cloud["instances"]
    shown = [*live[:INSTANCES_DRAWN], *ended]
    begin = now - min(max([LIFE_S[0], *(now - moment(each["made_at"]) for each in shown)]), LIFE_S[1])
    budget = f" of {money(cloud['daily_budget'])}" if cloud["daily_budget"] is not None else ""
    most = plural(cloud["max"], "instance", "instances") or "no instances"
    text = f"{len(live)} of at most {most}; cost today {money(cloud['spent_today'])}{budget}, in all {money(cloud['spent'])}"
    cards = tag("ul", *(instance_card(cloud, each, begin, now) for each in shown), class_="instances") if shown else None
    more = tag("p", f"{len(live) - INSTANCES_DRAWN:,} more instances", class_="quiet") if len(live) > INSTANCES_DRAWN else None
    held = tag("p", cloud["held"], class_="alert") if cloud["held"] else None
    return tag("div", tag("h3", name_of(cloud["name"]), " ", tag("span", text, class_="quiet")), held, cards, more)


def costs_table(found: Mapping[str, Any]) -> Html | None:
    """Return what clouds have cost by service and by user; None if nothing yet."""
    rows: list[Sequence[Content]] = []
    for cloud in found["clouds"]:
        parts = [(each["service"], each) for each in cloud["by_service"]]
        parts.append(("boots and idle slots", {"spent_today": cloud["unassigned_today"], "spent": cloud["unassigned"]}))
        rows += [(cloud["name"], what, money(each["spent_today"]), money(each["spent"])) for what, each in parts if each["spent"]]
    users = [(f"user {each['user_id']}", each) for each in found["by_user"]]
    if found["other_users"] is not None:
        users.append((plural(found["other_users"]["users"], "other user", "other users"), found["other_users"]))
    rows += [("", who, money(each["spent_today"]), money(each["spent"])) for who, each in users]
    head = ("Cloud", "Cost of", "Today", "In all")
    return tag("div", tag("h3", "Costs"), table("Costs by service and user", head, rows, "")) if rows else None


def clouds_section(found: Mapping[str, Any], now: float) -> Html | None:
    """Return the clouds with their instances, and what is done next and why; None if there are none. page.js keeps it moving."""
    if not found["clouds"]:
        return None
    ended = [each for each in found["ended"] if now - moment(each["ended_at"]) < ENDED_SHOWN_S]
    parts = [cloud_part(each, [one for one in ended if one["name"].partition("-")[0] == each["name"]], now) for each in found["clouds"]]
    reasons = [tag("li", each) for each in found["plan"]["reasons"]]
    why = tag("ul", *reasons, class_="reasons") if reasons else None
    return section("clouds", "Clouds", tag("div", *parts, data_moving=True), why, costs_table(found))


def chart(title: str, values: Sequence[float], text: str, kind: str) -> Html:
    """Return a bar chart of the last hours, the present at its right."""
    most = max(values, default=0.0) or 1.0
    bars = [
        tag("rect", x=10 * number + 1, y=f"{48 - 46 * value / most:.1f}", width=8, height=f"{46 * value / most:.1f}")
        for number, value in enumerate(values)
        if value
    ]
    line = tag("line", x1=0, x2=10 * len(values), y1=49, y2=49)
    drawing = tag(
        "svg", line, *bars, viewBox=f"0 0 {10 * len(values)} 50", preserveAspectRatio="none", role="img", aria_label=f"{title}: {text}"
    )
    return tag("figure", tag("figcaption", tag("strong", title), " ", text), drawing, class_=f"chart of-{kind}")


@functools.lru_cache(maxsize=1)
def recent(server: Server, _: float) -> list[Html]:
    """Return the charts and failures, which are the dearest part of a page: once in RECENT_S for all who look at it."""
    began = server.clock.wall() - server.store.steady()
    return [charts(server, began), failures(server, began)]


def charts(server: Server, began: float) -> Html:
    """Return what the last hours brought, from the newest 20,000 jobs."""
    steps = int(HOURS * 3600 / STEP_S)
    moments = {"since": server.clock.wall() - HOURS * 3600, "step_s": STEP_S}
    series: dict[str, list[float]] = {name: [0.0] * steps for name in ("submitted", "completed", "failed", "wait")}
    for row in server.store.read(NEWEST_SUBMITTED, **moments):
        at = min(row["step"], steps - 1)
        series["submitted"][at] += row["jobs"]
        series["wait"][at] = max(row["wait_s"] or 0.0, 0.0)
    for row in server.store.read(NEWEST_ENDED, **moments, steady_began=began):
        if row["ended"] != Status.KILLED:
            series["completed" if row["ended"] == Status.COMPLETED else "failed"][min(row["step"], steps - 1)] += row["jobs"]
    sums = {name: f"{sum(values):,.0f}" for name, values in series.items()}
    sums["wait"] = f"up to {duration(max(series['wait']))} on average"
    drawn = [chart(name.capitalize(), values, sums[name], name) for name, values in series.items()]
    return section("charts", f"The last {HOURS} hours", tag("div", *drawn, class_="charts"))


def failures(server: Server, began: float) -> Html:
    """Return the failures of the last day, those with the same reason together."""
    rows = [
        (f"{row['jobs']:,}", prose(row["reason"]), job_link(row["newest"]))
        for row in server.store.read(NEWEST_FAILURES, since=server.clock.wall() - 86400, steady_began=began)
    ]
    shown = table("Failures of the last day by their reason", ("Jobs", "Reason", "Newest"), rows, "No job has failed.")
    return section("failures", "Failures of the last day", shown)


@page("/dashboard")
def overview_page(server: Server, request: Request) -> Answer:
    """Show what is going on: problems, services, clients, the last hours, and failures. Users and portals see only services."""
    now = server.clock.wall()
    oldest_s = {row["service"]: now - row["created_at"] for row in server.store.read(OLDEST_QUEUED)}
    services = services_table(ask(server, request, "/services")["services"], oldest_s)
    if not sees_site(request.caller):
        return whole_page(server, request, "Overview", services)
    content = [
        problems(request, ask(server, request, "/health")["problems"]),
        services,
        clouds_section(ask(server, request, "/clouds"), now) if server.plugins["clouds"].is_wanted() else None,
        clients_table(request, ask(server, request, "/clients")["clients"]),
        *recent(server, server.clock.monotonic() // RECENT_S),
    ]
    return whole_page(server, request, "Overview", content)


# == Jobs ==


def lenient(parameter: Parameter) -> Parameter:
    """Return a filter of GET /jobs as a form sends it: it may be empty. What is wrong with it is said by a page, not here."""
    return Parameter(parameter.name, "query", "string", parameter.help, str(parameter.example), default="")


load_plugin("lists")  # it declares GET /jobs


def declared(method: str, path: str) -> Route:
    """Return a route by its path as it is declared. `find_route` could not be called here: it would miss the routes below."""
    return next(each for each in ROUTES if (each.method, each.path) == (method, path))


FILTERS = tuple(each for each in declared("GET", "/jobs").taken("query") if each.name not in NOT_IN_THE_FORM)
BEFORE = Parameter("before", "query", "string", "the cursor of the page", "42", default="")


def services_for(server: Server, request: Request) -> list[str]:
    """Return the names of the services that the caller may use."""
    return [name for name in server.services if sees_service(request.caller, name)]


def own_user(request: Request) -> int | None:
    """Return the only user whom the caller's token is for, or None."""
    return request.caller.user if request.caller else None


def filter_field(server: Server, request: Request, parameter: Parameter, value: str) -> Html:
    """Return the field of a form for one filter."""
    choices: Sequence[str] = {"service": services_for(server, request), "status": [*Status]}.get(parameter.name, parameter.choices)
    key = f"filter-{parameter.name}"
    if choices:
        options = [tag("option", CAUSES.get(name, name), value=name, selected=name == value) for name in choices]
        field = tag("select", tag("option", "any", value=""), *options, id=key, name=parameter.name)
    else:
        kind = "numeric" if parameter.kind == "integer" else None
        field = tag("input", id=key, name=parameter.name, value=value, inputmode=kind, placeholder=f"as in {parameter.example}")
    return tag("div", tag("label", label_of(parameter.name), for_=key), field, title=parameter.help)


def run_time(job: Mapping[str, Any], now: float) -> str:
    """Return how long a job has run."""
    if not job["started_at"]:
        return NONE
    return duration((moment(job["ended_at"]) if job["ended_at"] else now) - moment(job["started_at"]))


def jobs_table(server: Server, request: Request, jobs: Iterable[Mapping[str, Any]]) -> Html:
    """Return jobs as a table."""
    now = server.clock.wall()
    rows = []
    for each in jobs:
        to = f"/dashboard/jobs/{each['id']}"
        rows.append((
            tag("a", f"{each['id']}", href=to), status_of(each["status"]), name_of(each["service"]), user_link(request, each["user_id"]),
            tag("a", name_of(each["name"]), href=to) if each["name"] else NONE,
            prose(one_line(each["message"], 160)), time_of(each["created_at"]), whole(run_time(each, now)),
        ))  # fmt: skip
    head = ("Job", "Status", "Service", "User", "Name", "Reason", "Submitted", "Run time")
    return table("Jobs, the newest first", head, rows, "No job matches.")


@page("/dashboard/jobs", takes=(*map(lenient, FILTERS), BEFORE))
def jobs_page(server: Server, request: Request, before: str, **filters: str) -> Answer:
    """List jobs, newest first, with the filters of GET /jobs."""
    given = {name: value for name, value in filters.items() if value.strip()}
    shown = [each for each in FILTERS if each.name != "user_id" or own_user(request) is None]
    fields = [filter_field(server, request, each, filters[each.name]) for each in shown]
    form = fill("filters", fields=fields, count=f"Filter ({len(given)} set)" if given else "Filter")
    try:
        found = ask(server, request, "/jobs", limit=str(JOBS_A_PAGE), **given, **({"before": before} if before else {}))
    except HttpError as refusal:
        return whole_page(server, request, "Jobs", [alert(refusal.message), form], refusal.status)
    older = "/dashboard/jobs?" + urlencode({**given, "before": found["next"]})
    newest = "/dashboard/jobs" + ("?" + urlencode(given) if given else "")
    links = [
        tag("a", "Newest jobs", href=newest, class_="button") if before else None,
        tag("a", "Older jobs", href=older, class_="button", rel="next") if found["next"] else None,
    ]
    return whole_page(server, request, "Jobs", [
        form,
        tag("h2", "Jobs that match" if given else "All jobs", id="results", tabindex="-1"),
        tag("div", jobs_table(server, request, found["jobs"]), id="jobs", data_live=not before),
        tag("nav", *links, aria_label="More jobs", class_="actions"),
    ])  # fmt: skip


# == One job ==


def is_over(job: Mapping[str, Any]) -> bool:
    """Tell whether a job has ended."""
    return job["status"] in FINAL


class Span(NamedTuple):
    """A time that a job spent in one state."""

    status: str
    since: str
    seconds: float
    reason: str

    @property
    def is_final(self) -> bool:
        """Whether it is the state in which the job ended, which takes no time."""
        return self.status in FINAL


def spans(job: Mapping[str, Any], now: float) -> list[Span]:
    """Return the states of a job in order."""
    moves = job["history"]
    ends = [moment(move["at"]) for move in moves[1:]] + [now]
    return [
        Span(move["to"], move["at"], 0.0 if move["to"] in FINAL else max(0.0, end - moment(move["at"])), move["reason"])
        for move, end in zip(moves, ends)
    ]


def timeline(found: Sequence[Span]) -> Html:
    """Return the states of a job, drawn to scale in time."""
    total, at, drawn = sum(span.seconds for span in found) or 1.0, 0.0, []
    for span in found:
        width = 1000 * span.seconds / total
        text = tag("title", f"{span.status}: {duration(span.seconds)}")
        drawn.append(tag("rect", text, x=f"{at:.2f}", y=0, width=f"{max(width, 2.0):.2f}", height=30, class_=span.status.lower()))
        at += width
    spoken = ", then ".join(f"{span.status} for {duration(span.seconds)}" for span in found if span.seconds)
    drawing = tag(
        "svg", *drawn, class_="timeline", viewBox="0 0 1002 30", preserveAspectRatio="none", role="img", aria_label=spoken or "no time yet"
    )
    legend = [
        tag("li", tag("svg", tag("circle", cx=6, cy=6, r=6, class_=name.lower()), width=12, height=12, aria_hidden="true"), " ", name)
        for name in dict.fromkeys(span.status for span in found)
    ]
    rows = [
        (status_of(span.status), time_of(span.since), whole(NONE if span.is_final else duration(span.seconds)), prose(span.reason))
        for span in found
    ]
    shown = table("Status over time", ("Status", "Since", "For", "Reason"), rows, "")
    return section("history", "Status over time", drawing, tag("ul", *legend, class_="legend", aria_hidden="true"), shown)


def facts(request: Request, job: Mapping[str, Any]) -> Html:
    """Return what the job was submitted with, and how it ended."""
    place = f"{job['queue_position']} among the jobs of all users for {job['service']}" if job["queue_position"] else None
    shown: dict[str, Content] = {
        "Service": name_of(job["service"]), "User": user_link(request, job["user_id"]),
        "Submitted": time_of(job["created_at"]), "Started": job["started_at"] and time_of(job["started_at"]),
        "Ended": job["ended_at"] and time_of(job["ended_at"]), "Client": job["client"] and name_of(job["client"]),
        "Exit status": job["exit_code"], "Signal": job["signal"], "Cause": CAUSES.get(job["cause"], job["cause"]), "Cores": job["cpus"],
        "CPU time": (job["cpu_time"] is not None and duration(job["cpu_time"])) or None,
        "Peak memory": job["peak_memory"] and size_text(job["peak_memory"]),
        "Memory": job["memory"] and f"{job['memory']:,} MiB", "GPUs": job["gpus"] or None,
        "Time limit": job["timeout"] and duration(job["timeout"]),
        "Priority": job["priority"] or None, "Place in the queue": place,
        "Likely start": job["estimated_start"] and ["about ", time_of(job["estimated_start"])], "Attempt": job["attempt"],
        "Webhooks go to": job["callback_url"] and name_of(job["callback_url"]),
        "Follows": job["after"] and [[", " if number else "", job_link(each)] for number, each in enumerate(job["after"])],
        "Repeats": job["retry_of"] and job_link(job["retry_of"]), "Result": job["result"] and size_text(job["result"]["size"]),
    }  # fmt: skip
    rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in shown.items() if value is not None and value != []]
    return tag("dl", *rows, class_="facts")


def attempts_table(job: Mapping[str, Any]) -> Html | None:
    """Return the attempts of a job, if there were several."""
    rows = [
        (
            each["attempt"],
            name_of(each["client"]),
            time_of(each["started_at"]),
            time_of(each["ended_at"]),
            each["exit_code"],
            prose(each["reason"] or ""),
        )
        for each in job["attempts"]
    ]
    head = ("Attempt", "Client", "Started", "Ended", "Exit status", "Reason")
    return section("attempts", "Attempts", table("Attempts", head, rows, "")) if len(rows) > 1 else None


def webhooks_table(request: Request, job: Mapping[str, Any]) -> Html | None:
    """Return the webhooks of a job with a callback URL, each with its last answer."""
    rows = []
    if not job["callback_url"]:
        return None
    for each in job["webhooks"]:
        last = each["tries"][-1] if each["tries"] else {"code": None, "answer": ""}
        answer = " ".join(str(part) for part in (last["code"], last["answer"]) if part)
        rows.append((
            status_of(each["status"]), time_of(each["at"]), each["state"], each["attempts"], prose(answer or NONE),
            time_of(each["next_attempt"]),
        ))  # fmt: skip
    head = ("Status of the job", "Since", "Webhook", "Attempts", "Last answer", "Next attempt")
    path = f"/jobs/{job['id']}/redeliver"
    send = tag("p", button("Send them again", path), class_="actions") if rows and may(request, "POST", path) else None
    is_open = any(each["state"] == "pending" for each in job["webhooks"])  # a delivery moves no job, so no event tells of it
    return section("webhooks", "Webhooks", tag("div", table("Webhooks", head, rows, "None yet."), data_open=is_open or None), send)


def tail_of(server: Server, request: Request, job: Mapping[str, Any], stream: str) -> str:
    """Return the end of an output stream of a job that has ended."""
    return job_log(server, request, known_job(server, request, job["id"]), stream, -LOG_TAIL_BYTES).text.decode("utf-8", "replace")


def output_part(job: Mapping[str, Any], phase: str, *content: Content) -> Html:
    """Return the section of a job's output, in a phase of the job: it waits, runs or is over."""
    return tag("section", *content, id="output", data_phase=phase, data_attempt=job["attempt"])


def output_section(server: Server, request: Request, job: Mapping[str, Any]) -> Html:
    """Return the output of a job. While it runs, page.js follows it, and it shows what follows when the phase changes."""
    path = f"/jobs/{job['id']}/logs"
    over = is_over(job)
    phase = "over" if over else "runs" if job["started_at"] else "waits"
    if phase == "waits":
        return output_part(job, phase, tag("h2", "Output"), tag("p", "The job has not started yet.", class_="quiet"))
    streams = {"stdout": "Standard output", "stderr": "Standard error"}
    try:
        texts = {stream: tail_of(server, request, job, stream) if over else "" for stream in streams}
    except HttpError as refusal:
        return output_part(job, phase, tag("h2", "Output"), tag("p", refusal.message, class_="quiet"))
    parts = []
    for stream, title in streams.items():
        followed, text = f"{path}?stream={stream}&follow=1", texts[stream]
        if over and not text:
            parts.append(tag("p", f"It wrote nothing to {title.lower()}.", class_="quiet", id=stream))
            continue
        whole = tag("a", "open all of it", href=f"/jobs/{job['id']}/files/.joborch/{stream}?inline=1" if over else followed)
        end = f"its end, {size_text(LOG_TAIL_BYTES)}; " if len(text.encode()) >= LOG_TAIL_BYTES else ""
        box = tag("pre", tag("code", text), tabindex="0", data_log=followed, data_over=over, aria_label=title)
        hint = None if over else tag("noscript", tag("p", "This page shows it with JavaScript; without, open it.", class_="quiet"))
        parts.append(tag("div", tag("h3", title, f" ({end}", whole, ")"), hint, box, class_="log", id=stream))
    return output_part(job, phase, tag("h2", "Output"), fill("search") if any(texts.values()) or not over else None, *parts)


def files_section(server: Server, request: Request, job: Mapping[str, Any], wanted: bool, after: str) -> Html:
    """Return the files of a job, with links. Those of a running job come from its client, which takes time, so only if `wanted`."""
    path, page_path = f"/jobs/{job['id']}/files", f"/dashboard/jobs/{job['id']}?files=1"
    over = is_over(job)
    if not (over or wanted):
        shown: Content = tag("p", tag("a", "Show its files as they are now", href=f"{page_path}#files", class_="button"))
    else:
        try:
            found = ask(server, request, path, limit=str(FILES_A_PAGE), **({"after": after} if after else {}))
        except HttpError as refusal:
            shown = tag("p", refusal.message, class_="quiet")
        else:
            rows = [
                (tag("a", name_of(each["path"]), href=f"{path}/{quote(each['path'])}", data_size=each["size"], data_file=True),
                 whole(size_text(each["size"])))
                for each in found["files"]
            ]  # fmt: skip
            links = [
                tag("a", "First files", href=f"{page_path}#files", class_="button") if after else None,
                tag("a", "More files", href=f"{page_path}&after={found['next']}#files", class_="button", rel="next")
                if found["next"]
                else None,
            ]
            more = tag("nav", *links, aria_label="More files", class_="actions") if any(links) else None
            shown = [table("Files", ("File", "Size"), rows, "There is no further file." if after else "It left no file."), more]
    return tag("section", tag("h2", "Files"), shown, fill("preview"), id="files")


def actions(request: Request, job: Mapping[str, Any]) -> Html | None:
    """Return what the caller can do with a job; None for a caller that may only look."""
    if not may(request, "POST", f"/terminate/{job['id']}"):
        return None
    number, over = job["id"], is_over(job)
    cleaned = job["status"] == Status.CLEANED
    text, no = "It has not started, and will not run.", "Keep it waiting"
    if job["started_at"]:
        text, no = "Its processes are killed. The files that it has written so far are kept.", "Keep it running"
    cancel = Question(f"Cancel job {number}?", text, no)
    again = Question(f"Run job {number} again?", "A new job is sent with the same files and fields.", "Do not send it")
    return tag(
        "div",
        tag("a", "Download the result", href=f"/download/{number}", class_="button main") if job["status"] == Status.COMPLETED else None,
        tag("a", "Download its files", href=f"/download_partial/{number}", class_="button")
        if not cleaned and job["status"] != Status.COMPLETED
        else None,
        button("Run it again", f"/jobs/{number}/retry", again, "/dashboard/jobs/{id}") if over and not cleaned else None,
        None if over else button("Cancel the job", f"/terminate/{number}", cancel, class_="danger"),
        class_="actions",
    )


JOB_ID = Parameter("job_id", "path", "string", "the id of a job", "42", required=True)
SHOW_FILES = Parameter("files", "query", "string", "1: also the files of a running job", "1", default="")


FILES_AFTER = Parameter("after", "query", "string", "the cursor of the page of files", "b3V0L2EudHh0", default="")


@page("/dashboard/jobs/<job_id>", takes=(JOB_ID, SHOW_FILES, FILES_AFTER), slow=True)
def job_page(server: Server, request: Request, job_id: str, files: str, after: str) -> Answer:
    """Show a job: its states in time, why it waits or failed, attempts, output and files."""
    job = ask(server, request, f"/jobs/{job_id}")
    has_files, name, title = may(request, "GET", f"/jobs/{job_id}/files"), job["name"], f"Job {job['id']}"
    heading = [f"{title} · ", name_of(name)] if name else None
    lead = tag(
        "div",
        tag("p", status_of(job["status"])),
        tag("p", job["message"] or f"It is {job['status'].lower()}.", class_="large", role="status"),
        actions(request, job),
        facts(request, job),
    )
    return whole_page(server, request, f"{title} · {one_line(name, 80)}" if name else title, [
        tag("div", lead, id="job", data_live=True, data_status=job["status"]),
        timeline(spans(job, server.clock.wall())),
        attempts_table(job),
        webhooks_table(request, job),
        *([output_section(server, request, job), files_section(server, request, job, files == "1", after)] if has_files else []),
    ], heading=heading)  # fmt: skip


# == Submit and users ==


UPLOAD_FIELDS = [each for each in declared("POST", "/upload").taken("form") if each.kind != "file"]
FIRST_FIELDS = ("user_id", "name")  # the others are below More


def defaults_of(services: Sequence[Service]) -> dict[str, str]:
    """Return what an empty field of an upload means, by its name, if that is known and the same for all `services`."""
    known = {field.name: {str(field.default)} for field in UPLOAD_FIELDS if isinstance(field.default, int)}
    known["retries"] = {str(service.retries) for service in services}
    known["timeout"] = {"no limit" if service.timeout_s is None else duration(service.timeout_s) for service in services}
    return {name: values.pop() for name, values in known.items() if len(values) == 1}


def form_field(parameter: Parameter, default: str | None) -> Html:
    """Return the field of a form for one field of an upload."""
    key, required = f"field-{parameter.name}", parameter.name == "user_id"
    numeric = {"type": "number", "min": parameter.least, "max": parameter.most} if parameter.kind == "integer" else {}
    bounds = {name: f"{value:.0f}" if isinstance(value, float) else value for name, value in numeric.items()}
    if parameter.name == "user_id":
        bounds = {"inputmode": "numeric", "pattern": "-?[0-9]+", "title": "Give a whole number, as in 7"}
    named = {"id": key, "name": parameter.name, "aria_describedby": f"{key}-help"}
    if parameter.name == "crlf":
        field = tag("select", *(tag("option", text, value=value) for value, text in LINE_ENDS.items()), **named)
    else:
        field = tag("input", required=required, **named, **bounds)
    text = HELP.get(parameter.name, parameter.help) + (f" (if empty: {default})" if default else "")
    return tag("div", tag("label", label_of(parameter.name), for_=key), field, tag("small", text, id=f"{key}-help"))


@page("/dashboard/submit")
def submit_page(server: Server, request: Request) -> Answer:
    """Send a job: drop its files, or choose them."""
    if not may(request, "POST", "/upload"):
        raise HttpError(403, "your token does not allow sending jobs")
    hidden = {"service", *(["user_id"] if own_user(request) is not None else [])}
    names = services_for(server, request)
    services, defaults = [tag("option", name, value=name) for name in names], defaults_of([server.services[name] for name in names])
    first, rest = (
        [
            form_field(each, defaults.get(each.name))
            for each in UPLOAD_FIELDS
            if each.name not in hidden and (each.name in FIRST_FIELDS) is wanted
        ]
        for wanted in (True, False)
    )
    return whole_page(server, request, "Submit a job", fill("submit", services=services, fields=first, more=rest))


USER = Parameter("user_id", "query", "string", "only this user", "7", default="")


@page("/dashboard/users", takes=(USER,))
def users_page(server: Server, request: Request, user_id: str) -> Answer:
    """Show users: their share, what they have used, and what they wait for."""
    found = server.store.read(USERS_WITH_JOBS, limit=USERS_SHOWN) if sees_site(request.caller) else []
    known = [str(row["user_id"]) for row in found] or [str(user) for user in (own_user(request),) if user is not None]
    wanted = [user_id.strip()] if user_id.strip() else list(dict.fromkeys(known))[: 2 * USERS_SHOWN]
    rows, form = [], fill("user", user_id=user_id)
    try:
        users = [ask(server, request, f"/users/{quote(each, safe='')}") for each in wanted]
    except HttpError as refusal:
        return whole_page(server, request, "Users", [alert(refusal.message), form], refusal.status)
    for user in users:
        link = tag("a", user["user_id"], href=f"/dashboard/jobs?user_id={user['user_id']}")
        for each in user["services"] or [{}]:
            used = each.get("used_slot_s")
            rows.append((used or 0.0, (
                link, name_of(each.get("name", NONE)), f"{user['weight']:g}", whole(duration(used)), f"{each.get('runs', 0):,}",
                each.get("running", 0), f"{user['queued']:,}", NONE if each.get("turns_before") is None else f"{each['turns_before']:,}",
            )))  # fmt: skip
    rows.sort(key=lambda row: -row[0])
    head = ("User", "Service", "Weight", "Slot time used", "Runs", "Running", "Queued, all services", "Users before")
    shown = table("Users", head, [row for _, row in rows], "Nobody has sent a job.")
    return whole_page(server, request, "Users", [form, tag("div", shown, id="users", data_live=True)])


# == Files and sessions ==

FILE_NAME = Parameter("name", "path", "string", "a file of the page", "page.css", required=True)
FILE_GIVES = {
    200: Gives("the file", "text/css"),
    304: Gives("you have it already (If-None-Match)"),
    404: Gives("no such file", JSON_TYPE, {"message": "the page has no such file"}),
}


@route("GET", "/dashboard/files/<name>", "server", who="anyone", takes=(FILE_NAME,), gives=FILE_GIVES)
def page_file(server: Server, request: Request, name: str) -> Answer:
    """Serve the style or the script of the web page."""
    if name not in FILES:
        raise HttpError(404, "the page has no such file")
    kind, content = FILES[name]
    headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"', "Cache-Control": "no-cache"}
    if request.header("If-None-Match") == headers["ETag"]:
        return Answer(None, 304, headers)
    return Answer(content, 200, {"Content-Type": kind, **headers})


SESSION_GIVES = {
    303: Gives("to the web page, with a cookie that stands for the token for 12 hours; without a token, one that ends the session"),
    401: Gives("the token is wrong", "text/html"),
    403: Gives("a page of another site may not do this", JSON_TYPE, {"message": "a page of another site may not call this server"}),
}


@route("POST", "/session", "server", who="anyone", gives=SESSION_GIVES)
def session(server: Server, request: Request) -> Answer:
    """Turn the token in the field `token` of an HTML form into a cookie for the web page; an empty field ends the session."""
    check_site({name: request.header(name.replace("_", "-")) for name in ("ORIGIN", "HOST", "SEC_FETCH_SITE") if request.header(name)})
    given = dict(parse_qsl(request.stream.read(request.length).decode("latin-1"), keep_blank_values=True))
    token, to = given.get("token", ""), given.get("to", "")
    value = new_session(server, token) if token else ""
    if value is None:
        server.refused.note(request.environ.get("REMOTE_ADDR", ""))
        return sign_in_page(server, request, "The token is wrong.", to)
    over_tls = request.header("Origin").startswith("https://")
    cookie = f"{session_cookie(server)}={value}; Path=/; Max-Age={SESSION_S if value else 0:.0f}; HttpOnly; SameSite=Strict"
    target = to if re.fullmatch(r"/dashboard[/A-Za-z0-9]*(\?[!-~]*)?", to) else "/dashboard"
    return Answer(None, 303, {"Location": target, "Set-Cookie": cookie + ("; Secure" if over_tls else ""), "Cache-Control": "no-store"})
