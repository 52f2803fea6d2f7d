"""The generated parts of docs/: made from the declarations of settings, routes, commands, states and messages."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import ROOT

sys.path.insert(0, str(ROOT))  # for a start without pytest, which does it by itself
import joborch
from joborch import Gives, Parameter, Route, routes_of
from joborch_base.settings import CLOUD_SETTINGS, SERVICE_SETTINGS, SETTINGS, Setting
from joborch_base.states import SERVER_MOVES, Reason
from joborch_plugins import commands

Moves = Sequence[tuple[joborch.Status, joborch.Status, str]]
WIDTH = 120
# Headings for settings, each with a pattern of the names below it. A setting is below the first one that fits.
GROUPS = (
    ("Services: clients and limits", r"SERVICE_<NAME>_(?!SLURM|DIRAC|PRELUDE)"),
    ("Batch systems, of a client", r"JOBORCH_(BATCH|VANISH|DIRAC)|SERVICE_<NAME>_"),
    ("Where it listens, and where its files are", r"PORT|JOBORCH_(HOST|HOSTS|SOCKET|SOCKET_MODE|CA_FILE)$|D(B|ATA)_PATH"),
    ("Who may call", r"JOBORCH_(TOKEN|TOKEN_FILE|ALLOW_\w+|AUDIT_LOG)$"),
    ("Calling a server, of a client", r"JOBORCH_(JOIN|SERVICES|FORGET_CLIENT)$"),
    ("How scripts run, of a client", r"JOBORCH_(SLOTS|PIN_CPUS|MEMORY|EXECUTOR|PASS_ENV|KILL_GRACE|LOG_LIMIT|GPUS?\w*)$"),
    ("Scripts apart from each other, of a client", r"JOBORCH_(ISOLATION\w*|NETWORK|BIND|BIND_RW|UIDS|MAX_(PROCESSES|WORK|CPU_TIME))$"),
    ("Whose turn it is", r"JOBORCH_(SHARE_HALF_LIFE|AGEING|WEIGHTS)$"),
    ("Limits", r"JOBORCH_(MAX|MIN|UPLOADS)_"),
    ("How long things are kept", r"MAX_AGE|JOBORCH_KEEP_"),
    ("Webhooks", r"JOBORCH_CALLBACK"),
    ("Clients in a cloud", r"CLOUD_<NAME>_|JOBORCH_(PUBLIC_URL|SCALE_INTERVAL|ORPHAN_\w+)$"),
    ("How often it looks", r"JOBORCH_(RUN|SEND|GET|CLEAN)_INTERVAL$"),
    ("The log", r"JOBORCH_(LOG|LOG_FORMAT|ACCESS_LOG)$"),
    ("Others", ""),
)


def table(*heads: str, rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# == Settings ==


def named_settings() -> Iterator[tuple[str, Setting]]:
    """All settings with their full names."""
    yield from ((setting.name, setting) for setting in SETTINGS)
    yield from ((f"SERVICE_<NAME>_{setting.name}", setting) for setting in SERVICE_SETTINGS)
    yield from ((f"CLOUD_<NAME>_{setting.name}", setting) for setting in CLOUD_SETTINGS)


def settings_tables() -> str:
    """Every setting in a table of its group."""
    groups: dict[str, list[list[str]]] = {title: [] for title, _ in GROUPS}
    for name, setting in named_settings():
        title = next(title for title, names in GROUPS if re.match(names, name))
        flag = "" if name.startswith(("SERVICE_", "CLOUD_")) else f"`{setting.flag}`"
        default = setting.default and f"`{setting.default}`"
        groups[title].append([f"`{name}`", flag, default, setting.modes.replace(" ", ", "), setting.help])
    parts = [f"### {title}\n\n{table('name', 'flag', 'default', 'of', 'meaning', rows=rows)}" for title, rows in groups.items() if rows]
    return "\n\n".join(parts)


# == Commands ==


def shown_flag(names: Sequence[str], how: Mapping[str, Any]) -> str:
    """A flag or word as a person types it."""
    value = f" {how['metavar']}" if "metavar" in how and names[0][0] == "-" else ""
    return f"`{', '.join(names) if names[0][0] == '-' else how['metavar']}{value}`"


def commands_text() -> str:
    """Every command with its flags and examples."""
    parts = []
    for name, word in commands.WORDS.items():
        own = commands.FLAGS[name] if word.here else [((flag,), how) for flag, how in joborch.OWN_FLAGS.get(name, ())]
        said = f"{word.help[0].upper()}{word.help[1:]}."
        flags = table("flag", "meaning", rows=[[shown_flag(names, how), how["help"]] for names, how in own]) if own else ""
        examples = "\n".join(line.strip() for line in word.examples.splitlines())
        parts += [f"### joborch {name}", said, *filter(None, [flags]), f"```text\n{examples}\n```"]
    return "\n\n".join(parts)


# == Routes ==


def allowed(parameter: Parameter) -> str:
    """What a parameter may be, in words."""
    bounds = (("from", parameter.least), ("to", parameter.most))
    words = " ".join(f"{word} {bound:,}" for word, bound in bounds if bound is not None and abs(bound) < 2**62)
    if parameter.choices:
        words = " or ".join(f"`{choice}`" for choice in parameter.choices)
    if parameter.longest is not None:
        words = f"at most {parameter.longest} characters"
    return ", ".join(filter(None, ("required" if parameter.required else "", words)))


def parameters_table(parameters: Sequence[Parameter], head: str) -> str:
    """A table of parameters or fields."""
    rows = [
        [f"`{each.name}`", each.help, allowed(each), "" if each.example is None else f"`{each.example}`"]
        for each in parameters
    ]  # fmt: skip
    return table(head, "meaning", "allowed", "example", rows=rows)


def upload_fields() -> str:
    """The fields of an upload, with those of its headers that people set."""
    (upload,) = (each for each in routes_of("server") if each.path == "/upload")
    return parameters_table(upload.taken("form"), "field")


def path_of(declared: Route) -> str:
    """A route's path as people write it."""
    return re.sub(r"<(?:job_id|user_id)>", "ID", declared.path.replace("<name:path>", "NAME").replace("<path:path>", "PATH"))


def called(declared: Route) -> str:
    """The command that calls a route, with its examples."""
    named = {each.name: each.example for each in declared.takes}
    path = re.sub(r"<(\w+)(?::path)?>", lambda found: str(named.get(found[1], found[1].upper())), declared.path)
    words = ["curl"] if declared.method == "GET" else ["curl", "-X", declared.method]
    form = [each for each in declared.taken("form") if each.required or each.name == "file"]
    if form:
        fields = (f"-F {each.name}={'@run.sh' if each.kind == 'file' else each.example}" for each in form)
        words = ["curl", *fields]
    query = "&".join(f"{each.name}={each.example}" for each in declared.taken("query") if each.required)
    url = f"127.0.0.1:5000{path}" + (f"?{query}" if query else "")
    return " ".join([*words, f"'{url}'" if re.search(r"[^\w.:/-]", url) else url])


def pretty(value: Any, indent: str = "") -> str:
    """JSON in lines of at most WIDTH characters, if it can be broken there."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent + line) <= WIDTH or not isinstance(value, (dict, list)) or not value:
        return line
    deeper = indent + "  "
    items = [json.dumps(name) + ": " + pretty(each, deeper) for name, each in value.items()] if isinstance(value, dict) else []
    items = items or [pretty(each, deeper) for each in value]
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return "\n".join([opening, ",\n".join(deeper + item for item in items), indent + closing])


def shown_example(said: Gives) -> str:
    """The example of an answer, as a block."""
    if said.content != joborch.JSON_TYPE or said.example is None:
        return ""
    return f"```json\n{pretty(said.example)}\n```"


def route_text(declared: Route, with_call: bool) -> str:
    """All about one route: who may call it, its parameters, its answers, and an example of the first."""
    roles = {"anyone": "everybody", "server": "a server that proves its token"}.get(declared.who, declared.who.replace(" ", ", "))
    parts = [f"#### {declared.method} {path_of(declared)}", f"{declared.summary} For: {roles}."]
    for place, head in (("query", "query parameter"), ("header", "header"), ("form", "field")):
        if taken := declared.taken(place):
            parts.append(parameters_table(taken, head))
    parts.append("\n".join(f"- {code}: {said.meaning}" for code, said in sorted(declared.gives.items())))
    first = declared.gives[min(declared.gives)]
    if with_call:
        parts.append(f"```text\n{called(declared)}\n```")
    parts.append(shown_example(first))
    return "\n\n".join(filter(None, parts))


def routes_table(mode: str) -> str:
    """The routes of one mode, each in a line."""
    rows = []
    for each in routes_of(mode):
        codes = ", ".join(str(code) for code in sorted(each.gives))
        rows.append([f"`{each.method} {path_of(each)}`", each.summary, codes])
    return table("method and path", "what it does", "answers", rows=rows)


def routes_text(mode: str) -> str:
    """The routes of one mode: a table, then all about each."""
    return "\n\n".join([routes_table(mode), *(route_text(each, mode == "server") for each in routes_of(mode))])


# == States and messages ==


def diagram(moves: Moves = SERVER_MOVES) -> str:
    """A table of moves as a Mermaid state diagram."""
    lines = [f"    {source} --> {to}" for source, to, _ in moves]
    return "\n".join(["stateDiagram-v2", "    [*] --> " + str(moves[0][0]), *lines])


def moves_table(moves: Moves = SERVER_MOVES) -> str:
    """Why a job moves from each state to another."""
    return table("from", "to", "when", rows=[[str(source), str(to), why] for source, to, why in moves])


def plain(template: str) -> str:
    """A template of a message with its facts as words in capitals."""
    template = template.replace("{words}", "")
    return re.sub(r"\{(\w+)[^}]*\}", lambda found: found[1].upper().replace("_", " "), template)


def reasons_text() -> str:
    """Every reason of a job, below the comment that groups it in the source."""
    lines, rows = [], {}
    for line in inspect.getsource(Reason).splitlines():
        if comment := re.match(r"    # (.+)\.$", line):
            rows[comment[1]] = lines = []
        elif named := re.match(r"    ([A-Z_0-9]+) = ", line):
            lines.append(f"- {plain(getattr(Reason, named[1]))}")
    return "\n\n".join(f"**{title}.**\n\n" + "\n".join(texts) for title, texts in rows.items())


def message_of(node: ast.expr | None) -> str:
    """The text of a message in the source, with what is filled in as ...; empty if it is made elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return ""


@functools.cache
def made_in(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call of a plain name in a file, by the name."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return [(node.func.id, node) for node in calls if isinstance(node.func, ast.Name)]


def raised(name: str) -> Iterator[ast.Call]:
    """Every place in the program that makes an error of this class."""
    for path in sorted([ROOT / "joborch.py", *ROOT.glob("joborch_*/*.py")]):
        yield from (node for called_name, node in made_in(path) if called_name == name)


def refusals_table() -> str:
    """Every text with which a request is refused, by its code."""
    said = {
        (node.args[0].value, message_of(node.args[1]))
        for node in raised("HttpError")
        if len(node.args) > 1 and isinstance(node.args[0], ast.Constant)
    }
    rows = [[str(code), text] for code, text in sorted(said) if len(text.replace("...", "").split()) > 2]
    return table("code", "message", rows=rows)


def start_errors() -> str:
    """Every text with which a start or a reload is refused."""
    texts = {message_of(node.args[0]) for node in raised("ConfigError") if node.args}
    return "\n".join(f"- {text}" for text in sorted(texts, key=str.lower) if len(text.replace("...", "").split()) > 3)


PARTS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "reference.md": {
        "diagram": lambda: f"```mermaid\n{diagram()}\n```",
        "moves": moves_table,
        "commands": commands_text,
        "settings": settings_tables,
        "routes server": lambda: routes_text("server"),
        "routes client": lambda: routes_text("client"),
        "reasons": reasons_text,
        "refusals": refusals_table,
        "start errors": start_errors,
    },
    "use.md": {"upload fields": upload_fields},
}
