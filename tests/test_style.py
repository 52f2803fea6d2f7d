"""The program is cut into sections, each with a promise; SQL is in Statements, reasons in Reasons, no failure silent.

The checks are functions of a source text, so that each is tried on a text that breaks its rule (second half) as well as
on joborch.py (first half). They return what is wrong, one line each, with its line number.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from string import Formatter
from typing import NamedTuple

import pytest
from harness import BASE, PLUGINS

TESTS = Path(__file__).resolve().parent
MODULE = TESTS.parent / "joborch.py"
FUNCTION_LINES = 40
SECTION_LINES = 600  # a mirror, not a law: a class is not cut in two to please a number
STORE = {"Schema", "Statements"}

BANNER = re.compile(r"^# == (\d+)\. (.+?) ==  (.+)$")
ALMOST_BANNER = re.compile(r"^# *==+ *\d")
# In the docstring a section is "5. Store", ended by two blanks, a comma, a colon or the end of the line.
LISTED = re.compile(r"(?<!\S)(\d+)\. (\S.*?)(?=  |,|:|$)", re.MULTILINE)
SENTENCE = re.compile(r"^[A-Z`].*[.!?]$")
SQL = re.compile(r"\b(SELECT\s|INSERT\s+(OR\s+\w+\s+)?INTO\b|UPDATE\s+(OR\s+\w+\s+)?\w+\s+SET\b|DELETE\s+FROM\b)")
SUPPRESSES_ALL = re.compile(r"(contextlib\.)?suppress\(.*\b(Base)?Exception\b")
EXECUTES = {"execute", "executemany", "executescript"}

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Definition = (*Function, ast.ClassDef)


class Section(NamedTuple):
    """A part of the module: its number, title and promise, and its lines from the banner on."""

    number: int
    title: str
    promise: str
    first_line: int
    last_line: int


# == What a source says ==


def sections(source: str) -> list[Section]:
    """The sections of `source` in the order of their banners."""
    lines = source.splitlines()
    found = [(line, match) for line, text in enumerate(lines, 1) if (match := BANNER.match(text))]
    ends = [line - 1 for line, _ in found[1:]] + [len(lines)]
    return [Section(int(match[1]), match[2], match[3], line, end) for (line, match), end in zip(found, ends)]


def section_at(parts: Iterable[Section], line: int) -> int:
    """The number of the section that holds `line`; 0 before the first banner, where the imports are."""
    return next((part.number for part in parts if part.first_line <= line <= part.last_line), 0)


def strings_of(tree: ast.Module) -> Iterator[ast.Constant]:
    """The string constants of `tree` but its docstrings."""
    documented = (ast.Module, *Definition)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, documented) and node.body]
    docstrings = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node


# == The rules ==


def banner_faults(source: str) -> list[str]:
    """Banners are numbered from 1 on, promise a sentence, and the module's docstring lists them by the same numbers."""
    parts = sections(source)
    faults = [
        f"{line}: a banner is '# == 5. Store ==  A promise.': {text}"
        for line, text in enumerate(source.splitlines(), 1)
        if ALMOST_BANNER.match(text) and not BANNER.match(text)
    ]
    if not parts or [part.number for part in parts] != list(range(1, len(parts) + 1)):
        faults.append(f"sections are not numbered 1, 2, 3...: {[part.number for part in parts]}")
    faults += [f"{part.first_line}: no sentence: {part.promise}" for part in parts if not SENTENCE.match(part.promise)]
    docstring = ast.get_docstring(ast.parse(source)) or ""
    # By number, since the list may stand in two columns.
    listed = sorted((int(number), title) for number, title in LISTED.findall(docstring))
    banners = [(part.number, part.title) for part in parts]
    if listed != banners:
        faults.append(f"the docstring lists {listed}, the banners say {banners}")
    return faults


def guard_faults(source: str) -> list[str]:
    """The module ends with `if __name__ == "__main__":`, and `main` stands in the last section."""
    parts, body = sections(source), ast.parse(source).body
    faults = []
    last = body[-1]
    if not isinstance(last, ast.If) or ast.unparse(last.test) != "__name__ == '__main__'":
        faults.append(f"{last.lineno}: the last statement is not the __main__ guard")
    mains = [section_at(parts, node.lineno) for node in body if isinstance(node, Function) and node.name == "main"]
    if mains != [len(parts)]:
        faults.append(f"main is defined in sections {mains}, not once in the last, {len(parts)}")
    return faults


def statement_faults(source: str) -> list[str]:
    """What is executed is a constant: no f-string, no concatenation, no formatting."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        if node.func.attr in EXECUTES and any(map(is_composed, ast.walk(node.args[0]))):
            faults.append(f"{node.lineno}: composed SQL: {ast.unparse(node.args[0])}")
    return faults


def is_composed(node: ast.AST) -> bool:
    """Whether `node` makes a text out of others."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr in {"format", "join"}
    return isinstance(node, (ast.JoinedStr, ast.BinOp))


def sql_faults(source: str) -> list[str]:
    """SQL stands in the Store alone, and there in no f-string."""
    parts, tree = sections(source), ast.parse(source)
    store = {part.number for part in parts if part.title in STORE}
    composed = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    sql = [node for node in strings_of(tree) if SQL.search(node.value)]
    faults = [f"{node.lineno}: SQL outside the Store" for node in sql if section_at(parts, node.lineno) not in store]
    return faults + [f"{node.lineno}: SQL in an f-string" for node in sql if id(node) in composed]


def silence_faults(source: str) -> list[str]:
    """No bare except, and nothing that catches every Exception and then does nothing."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            idle = all(isinstance(inner, (ast.Pass, ast.Continue)) or is_ellipsis(inner) for inner in node.body)
            if not caught or (idle and re.search(r"\b(Base)?Exception\b", caught)):
                faults.append(f"{node.lineno}: silent except {caught}")
        elif isinstance(node, ast.Call) and SUPPRESSES_ALL.match(ast.unparse(node)):
            faults.append(f"{node.lineno}: silent {ast.unparse(node)}")
    return faults


def is_ellipsis(node: ast.stmt) -> bool:
    """Whether `node` is the statement `...`."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


def length_faults(source: str) -> list[str]:
    """Functions have FUNCTION_LINES lines at most, docstring included, and sections SECTION_LINES."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function)]
    spans = [(node.name, node.lineno, node.end_lineno or node.lineno, FUNCTION_LINES) for node in functions]
    spans += [(part.title, part.first_line, part.last_line, SECTION_LINES) for part in sections(source)]
    return [f"{first}: {name} has {last - first + 1} lines, {most} at most" for name, first, last, most in spans if last - first + 1 > most]


def docstring_faults(source: str) -> list[str]:
    """Every public function and class of the module has a docstring, and so has the module."""
    tree = ast.parse(source)
    public = [node for node in tree.body if isinstance(node, Definition) and not node.name.startswith("_")]
    faults = [] if ast.get_docstring(tree) else ["1: the module has no docstring"]
    return faults + [f"{node.lineno}: {node.name} has no docstring" for node in public if not ast.get_docstring(node)]


# Who moves a job, or says how a payload ended, and which argument is the reason.
MOVERS = {
    **dict.fromkeys(("move", "new_attempt", "payload_gone", "become_unknown", "judge_silence", "fail_to_start"), 2),
    **dict.fromkeys(("move_row", "move_in", "end_busy"), 3),
}


def reason_faults(source: str) -> list[str]:
    """A job moves with a reason that the section Reasons has worded: no text stands where a job is moved or a payload judged.

    A text is an f-string, or a constant with a blank in it. A plug-in may word what its batch system alone can say, in functions
    of the module, not of its executor.
    """
    tree, parts, faults = ast.parse(source), sections(source), []
    home = {part.number for part in parts if part.title == "Reasons"}
    judged = tree.body if parts else [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for function in [node for top in judged for node in ast.walk(top) if isinstance(node, Function)]:
        if section_at(parts, function.lineno) in home:
            continue
        nodes = list(ast.walk(function))
        reasons = [reason for node in nodes if isinstance(node, ast.Call) and (reason := reason_of(node)) is not None]
        names = {node.id for reason in reasons for node in ast.walk(reason) if isinstance(node, ast.Name)}
        reasons += [node.value for node in nodes if isinstance(node, (ast.Assign, ast.AugAssign)) and assigned_to(node) & names]
        texts = [reason for reason in reasons if any(map(is_text, ast.walk(reason)))]
        faults += [f"{text.lineno}: {function.name} words a reason: {ast.unparse(text)}" for text in texts]
    return faults


def reason_of(call: ast.Call) -> ast.expr | None:
    """The reason that a call moves a job with, or says that a payload ended for."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""
    named = [keyword.value for keyword in call.keywords if keyword.arg == "reason" and name in {"Outcome", "replace", *MOVERS}]
    return named[0] if named else call.args[MOVERS[name]] if name in MOVERS and len(call.args) > MOVERS[name] else None


def assigned_to(node: ast.Assign | ast.AugAssign) -> set[str]:
    """The names that a statement gives a value."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}


def is_text(node: ast.AST) -> bool:
    """Whether `node` is a text that a person would read."""
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value)


REMOVES = {"unlink", "rmdir", "rmtree", "remove_tree", "removedirs"}
MAY_REMOVE = {  # no files of jobs
    "make_scratch": "the link to a TMPDIR, to be made anew",
    "drop_reserve": "the reserve of the disk",
    "remove_stale_socket": "the socket of a server that runs no more",
    "remove_socket_file": "our own socket",
    "command_demo": "the folder of a demo",
    "destroy": "the home of a process that plays an instance",
    "refreshed": "a copy of the login",
    "write_member": "while an output sandbox is unpacked",
    "make_links": "while an output sandbox is unpacked",
    "unpack_outputs": "while an output sandbox is unpacked",
    "unpack": "what a caller fetched, once it is unpacked",
    "write_private": "the partial file of a login",
    "forget_login": "the login",
    "arriving": "what a caller fetched, if nothing of it can be resumed",
    "unpack_as": "a caller's own folder, if unpacking fails",
    "remove_group": "a control group, which has no files of its own",
}


def removal_faults(source: str) -> list[str]:
    """Files are removed in the sections Cleaning and Removal alone, except by the functions that are named above."""
    parts, faults = sections(source), []
    for function in [node for node in ast.walk(ast.parse(source)) if isinstance(node, Function) and node.name not in MAY_REMOVE]:
        if not any(part.title in {"Cleaning", "Removal"} and part.number == section_at(parts, function.lineno) for part in parts):
            called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
            faults += [f"{function.lineno}: {function.name} calls {name}" for name in called if name.rpartition(".")[2] in REMOVES]
            faults += [f"{function.lineno}: {function.name} calls {name}" for name in called if name == "os.remove"]
    return faults


Rule = Callable[[str], list[str]]
RULES: list[Rule] = [
    banner_faults,
    guard_faults,
    statement_faults,
    sql_faults,
    silence_faults,
    length_faults,
    docstring_faults,
    reason_faults,
    removal_faults,
]

OF_PLUGINS: list[Rule] = [statement_faults, sql_faults, silence_faults, length_faults, docstring_faults, reason_faults, removal_faults]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_joborch_keeps_the_rule(rule: Rule) -> None:
    faults = rule(MODULE.read_text(encoding="utf-8"))
    assert not faults, "\n".join(["", *(f"{MODULE.name}:{fault}" for fault in faults)])


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule is not guard_faults], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("module", [path for path in BASE if path.stem != "__init__"], ids=lambda path: path.stem)
def test_what_it_is_built_on_keeps_the_rules(module: Path, rule: Rule) -> None:
    assert rule(module.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("rule", OF_PLUGINS, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.stem)
def test_plugins_keep_the_rules(plugin: Path, rule: Rule) -> None:
    assert rule(plugin.read_text(encoding="utf-8")) == []


def test_every_reason_is_used_with_its_facts() -> None:
    """Each sentence of `Reason` is used, in a function that gives `format` every fact in its braces."""
    import joborch

    sentences = {name: text for name, text in vars(joborch.Reason).items() if name.isupper()}
    used: set[str] = set()
    for path in [MODULE, *BASE, *PLUGINS]:
        for function in [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, Function)]:
            nodes = list(ast.walk(function))
            facts = {keyword.arg for node in nodes if isinstance(node, ast.Call) and is_composed(node) for keyword in node.keywords}
            for node in nodes:
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason":
                    used.add(node.attr)
                    needed = {field for _, field, _, _ in Formatter().parse(sentences[node.attr]) if field}
                    assert needed <= facts, f"{path.name}:{node.lineno}: Reason.{node.attr} needs {needed - facts}"
    assert used == set(sentences)


def imported_tests(source: str) -> list[str]:
    """The test files that a source imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(alias.name for alias in node.names)]
    return [name for name in found if name.rpartition(".")[2].startswith("test_")]


def test_no_test_file_imports_another() -> None:
    """What several of them share stands in world.py, conftest.py and harness.py."""
    faults = {path.name: found for path in TESTS.glob("*.py") if (found := imported_tests(path.read_text(encoding="utf-8")))}
    assert not faults
    assert imported_tests("def f():\n    from test_a import b") == ["test_a"]
    assert imported_tests("import os, tests.test_a\nfrom tests import test_b") == ["tests.test_a", "test_b"]


# == The rules bite ==

GOOD = '''"""A program.

  1. Statements  All SQL.
  2. Commands    The end.
"""

# == 1. Statements ==  All SQL of the program stands here.

GET = "SELECT * FROM jobs WHERE id = :id"


def get(database, number):
    """The row."""
    return database.execute(GET, {"id": number}).fetchone()


# == 2. Commands ==  What a person types is read here.


def main():
    """Select from the table, INSERT INTO nothing."""
    try:
        get(None, 1)
    except KeyError:
        pass
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
'''

BAD: list[tuple[Rule, str, str, str]] = [
    (banner_faults, "stands here.", "stands here", "no sentence"),
    (banner_faults, "Statements ==  All", "Statements == All", "a banner is"),
    (banner_faults, "# == 2. Commands", "# == 3. Commands", "numbered"),
    (banner_faults, "  1. Statements ", "  1. Storage ", "the docstring lists"),
    (guard_faults, 'if __name__ == "__main__":', "if True:", "guard"),
    (guard_faults, "def main()", "def start()", "main is defined"),
    (statement_faults, "execute(GET,", 'execute(f"{GET}",', "composed SQL"),
    (statement_faults, "execute(GET,", "executemany(GET + LIMIT,", "composed SQL"),
    (statement_faults, "execute(GET,", 'executescript("{}".format(GET),', "composed SQL"),
    (sql_faults, "return 0", 'return "UPDATE jobs SET x = 1"', "outside the Store"),
    (sql_faults, 'GET = "', 'GET = f"', "f-string"),
    (silence_faults, "except KeyError", "except", "silent"),
    (silence_faults, "except KeyError", "except (ValueError, Exception)", "silent"),
    (silence_faults, "return 0", "with contextlib.suppress(Exception): pass", "silent"),
    (length_faults, "    return 0", "    print()\n" * FUNCTION_LINES + "    return 0", "main has"),
    (reason_faults, "return 0", 'store.move(job, to, f"{job} failed")', "words a reason"),
    (reason_faults, "return 0", 'text = "it failed"; end_busy(server, job, to, text)', "words a reason"),
    (reason_faults, "return 0", 'return Outcome(False, reason="it failed")', "words a reason"),
    (removal_faults, "return 0", "os.unlink(path)", "main calls os.unlink"),
    (removal_faults, "return 0", "path.parent.rmdir()", "main calls path.parent.rmdir"),
    (removal_faults, "return 0", "remove_tree(path)", "main calls remove_tree"),
    (docstring_faults, '"""The row."""', "", "get has no docstring"),
]


def test_a_broken_rule_is_found() -> None:
    assert [rule.__name__ for rule in RULES if rule(GOOD)] == []
    for rule, good, bad, said in BAD:
        source = GOOD.replace(good, bad, 1)
        assert source != GOOD
        assert said in "\n".join(rule(source)), (rule.__name__, bad)
