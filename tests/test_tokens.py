"""The tokens that a server makes for its callers: what they look like, how they are kept, and how they end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import MakeProcess
from harness import Process
from hypothesis import given
from hypothesis import strategies as st
from shell import Shell
from world import Desk, HandClock, ask, serving

import joborch
from joborch import DataFolder, Status, Store
from joborch_base import statements
from joborch_base.identity import TOKEN_SHAPE, is_whole_token, link_key, new_token
from joborch_base.routes import ROLES, Caller
from joborch_base.tokens import TokenStore

RELEASED = Path(__file__).parent / "joborch-0.1.0.sql"


def bearer(token: str) -> dict[str, str]:
    """The header with a token."""
    return {"Authorization": f"Bearer {token}"}


def add(desk: Desk, name: str = "x", role: str = "operator", **more: str) -> str:
    """Make a token by the route; return its text."""
    query = "&".join(f"{key}={value}" for key, value in {"name": name, "role": role, **more}.items())
    said = ask(desk.server, "POST", f"/tokens?{query}")
    assert said.status == 201, said
    return str(said.json["token"])


@pytest.fixture(name="url")
def url_fixture(desk: Desk) -> Iterator[str]:
    """The URL of the desk's server, whose operator is the user of these tests."""
    with serving(desk.server) as url:
        yield url


# == A token's text ==


def test_a_token_can_be_found_by_its_beginning_and_is_never_made_twice() -> None:
    made = {new_token() for _ in range(1000)}
    assert len(made) == 1000
    assert all(TOKEN_SHAPE.fullmatch(text) and is_whole_token(text) for text in made)


@given(st.integers(0, 55), st.sampled_from("0aZ_é \n"))
def test_a_token_that_was_cut_or_changed_is_noticed(at: int, letter: str) -> None:
    text = new_token()
    assert not is_whole_token(text[:at])
    assert not is_whole_token(text + letter)
    assert text[at] == letter or not is_whole_token(text[:at] + letter + text[at + 1 :])


# == How it is kept ==


def test_only_digests_are_stored_and_they_survive_a_restart(desk: Desk, data: DataFolder) -> None:
    texts = [
        add(desk, "ward", "user", user_id="7"),
        add(desk, "portal", "portal", services="example"),
        add(desk, "node", "client", services="example"),
    ]
    desk.store.read("PRAGMA wal_checkpoint(TRUNCATE)")
    stored = b"".join(path.read_bytes() for path in data.path.glob("server.db*"))
    assert not any(text.encode() in stored for text in texts)
    assert hashlib.sha256(texts[0].encode()).hexdigest().encode() in stored
    desk.restart()
    callers = [token.caller("token")._replace(digest="") for token, _ in map(desk.server.token_store.find, texts) if token]
    assert callers == [
        Caller("ward", "token", "user", (), 7),
        Caller("portal", "token", "portal", ("example",)),
        Caller("node", "token", "client", ("example",)),
    ]
    keys = {name: token.key for name, token in desk.server.token_store.by_name.items()}
    assert keys == {"ward": None, "portal": None, "node": link_key(texts[2]).hex()}, "what server and client prove themselves with"


def test_a_client_has_no_tokens_of_callers(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "db"), "client", HandClock())
    assert not TokenStore(store, HandClock())
    store.close()


def schema_5(path: Path) -> None:
    """Make a database of the last schema without tokens."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(RELEASED.read_text())
        for older in (3, 4):
            db.executescript(statements.MIGRATIONS[older])
        assert db.execute("PRAGMA user_version").fetchone()[0] == 5


@pytest.mark.parametrize("cut_off", [False, True])
def test_an_older_database_gets_its_table(cut_off: bool, tmp_path: Path) -> None:
    """In one transaction: whoever is killed in it leaves the database as it was."""
    schema_5(tmp_path / "db")
    if cut_off:
        with contextlib.closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as db:
            db.executescript(statements.MIGRATIONS[5].replace("COMMIT;", ""))
    store = Store(str(tmp_path / "db"), "server", HandClock())
    text = TokenStore(store, HandClock()).add("x", "reader", "", None, None)
    assert TokenStore(store, HandClock()).find(text)[0] is not None
    assert store.number("SELECT count(*) FROM jobs") == 7
    store.close()


# == How it ends ==


def status_of(url: str, token: str, path: str = "/tokens") -> tuple[int, str]:
    """The status that a token gets, and the message of an error."""
    answer = requests.get(url + path, headers=bearer(token), timeout=60)
    return answer.status_code, str(answer.json().get("message", ""))


def test_a_token_is_valid_until_it_is_revoked_or_has_expired(desk: Desk, url: str) -> None:
    text, short = add(desk), add(desk, "short", days="1")
    assert (status_of(url, text)[0], status_of(url, short)[0]) == (200, 200)
    desk.clock.pass_s(86_400)
    code, said = status_of(url, short)
    assert (code, said[:30]) == (401, "the token short expired at 202"), said
    assert ask(desk.server, "DELETE", "/tokens/x").json == {"name": "x"}
    assert status_of(url, text) == (401, "this server does not know the token: it was revoked, or another server made it: " + SEND)
    assert ask(desk.server, "DELETE", "/tokens/x").status == 404
    again = add(desk)
    assert (status_of(url, again)[0], status_of(url, text)[0]) == (200, 401), "a new one of the same name is another one"


def test_what_waits_for_the_holder_of_a_token_ends_also_if_its_name_is_given_again(desk: Desk) -> None:
    """Who replaces a token that leaked gives the new one the same name, and the other user must not see on."""
    store = desk.server.token_store
    for role, more in (("user", {"user_id": "7"}), ("client", {"services": "example"})):
        token, _ = store.find(add(desk, "ward", role, **more))
        assert token is not None
        callers = [token.caller(proof) for proof in ("token", "session", "link")]
        assert all(map(store.is_valid, callers))
        store.bind("ward", "an-instance")
        assert all(map(store.is_valid, callers)), "a token that was bound is the same one"
        assert store.revoke("ward")
        assert not any(map(store.is_valid, callers))
        add(desk, "ward", role, **more)
        assert not any(map(store.is_valid, callers))
        assert store.revoke("ward")
    assert all(map(store.is_valid, (None, Caller("default", "token"), Caller("uid 7", "same user"), Caller("server", "link", "server"))))


SEND = "send the header Authorization: Bearer TOKEN"


def test_what_is_wrong_with_a_token_is_said(desk: Desk, url: str) -> None:
    text = add(desk)
    desk.server.tokens = ("a-default-token",)
    for wrong, said in (
        (text[:-1], "the token is incomplete or was changed: copy all of it, from joborch_ to its end"),
        (text.swapcase(), "the token is wrong"),
        (f"{text},{text}", "there are several tokens: send one"),
        (new_token(), "this server does not know the token: it was revoked, or another server made it"),
        ("joborch_", "the token is incomplete or was changed: copy all of it, from joborch_ to its end"),
    ):
        assert status_of(url, wrong) == (401, f"{said}: {SEND}"), wrong
    answer = requests.get(f"{url}/tokens", headers={"Authorization": f"Basic {text}"}, timeout=60)
    assert (answer.status_code, answer.json()["message"]) == (401, f"the token is wrong: {SEND}")


# == What it allows ==


def test_a_token_counts_also_where_none_is_needed(desk: Desk, url: str) -> None:
    """The user who runs the server may do all; with a token, as little as its holder."""
    text = add(desk, "eye", "reader")
    assert requests.get(f"{url}/tokens", timeout=60).status_code == 200
    assert status_of(url, text) == (403, "the token eye has the role reader, and this needs the role operator")
    assert requests.get(f"{url}/tokens", headers=bearer("another-program-s"), timeout=60).status_code == 200


def test_the_tokens_of_the_settings_are_an_operator_s(desk: Desk, url: str) -> None:
    text = add(desk)
    desk.server.tokens = ("old-token", "older-token")
    assert [status_of(url, token)[0] for token in ("old-token", "older-token", text, "wrong")] == [200, 200, 200, 401]
    assert ask(desk.server, "DELETE", "/tokens/default").json["message"].endswith("it is in JOBORCH_TOKEN, so change that setting")


def test_a_session_has_the_role_of_its_token(desk: Desk, url: str) -> None:
    """Also what it may not do; and it ends with the token."""
    texts = {
        role: add(desk, role, role, **({"services": "example"} if role == "client" else {})) for role in ("operator", "reader", "client")
    }
    codes = {}
    for role, text in texts.items():
        with requests.Session() as browser:
            signed_in = browser.post(f"{url}/session", data={"token": text}, headers={"Origin": url}, timeout=60, allow_redirects=False)
            codes[role] = signed_in.status_code, browser.get(f"{url}/tokens", timeout=60).status_code if browser.cookies else None
            if role == "operator":
                ask(desk.server, "DELETE", "/tokens/operator")
                desk.server.tokens = ("default-token",)
                assert browser.get(f"{url}/tokens", timeout=60).status_code == 401
                desk.server.tokens = ()
    assert codes == {"operator": (303, 200), "reader": (303, 403), "client": (401, None)}


# == The routes ==


BAD: list[tuple[str, str]] = [
    ("role=reader", "name is missing: give the token a name"),
    ("name=x", "role is missing: give one of user, portal, reader, operator, client"),
    ("name=x&role=king", "role is 'king': give one of user, portal, reader, operator, client"),
    ("name=&role=reader", "name is ''"),
    ("name=default&role=reader", "name is 'default': this name is taken: give another one"),
    ("name=server&role=reader", "name is 'server': this name is taken"),
    *((f"name={name}&role=reader", "give at most 63 of a-z") for name in ("X", "1a", "a b", "a.b", "a%2Fb", "%C3%BC", "a" * 64, "a%0A")),
    ("name=x&role=user", "user_id is missing: give the user's number"),
    ("name=x&role=user&user_id=seven", "user_id is 'seven': give a whole number"),
    ("name=x&role=user&user_id=9999999999999999999", "user_id is '9999999999999999999': give a whole number"),
    ("name=x&role=portal&user_id=7", "user_id is given: leave it out, because portal tokens are for no single user"),
    ("name=x&role=client", "services is missing: name those that the client serves"),
    ("name=x&role=reader&services=example", "services is given: leave it out, because reader tokens are for all services"),
    ("name=x&role=portal&services=dockin", "service 'dockin' is not known: give one of example"),
    ("name=x&role=client&services=,", "services is missing: name those that the client serves"),
    *((f"name=x&role=portal&services={none}", "services names none: name some, or leave it out") for none in ("", ",", "%20", ",%20,")),
    *((f"name=x&role=reader&days={days}", "days is") for days in ("0", "-1", "x", "1.5", "36501", "9" * 40)),
    ("name=x&role=reader&dayz=1", "'dayz' is not a parameter of POST /tokens (did you mean days?)"),
    ("name=x&name=y&role=reader", "name is in the URL 2 times"),
]


@pytest.mark.parametrize(("query", "said"), BAD)
def test_what_makes_no_token(query: str, said: str, desk: Desk) -> None:
    answer = ask(desk.server, "POST", f"/tokens?{query}")
    assert (answer.status == 400 and answer.json["message"].startswith(said)) or said in answer.json["message"], answer
    assert ask(desk.server, "GET", "/tokens").json == {"tokens": []} and not desk.server.token_store.by_digest


def test_tokens_are_listed_without_their_texts(desk: Desk) -> None:
    text = add(desk, "portal-1", "portal", services="EXAMPLE,example", days="30")
    add(desk, "eye", "reader")
    said = ask(desk.server, "GET", "/tokens")
    assert text.encode() not in said.body
    assert [(each["name"], each["role"], each["services"], each["expires_at"] is None) for each in said.json["tokens"]] == [
        ("eye", "reader", [], True),
        ("portal-1", "portal", ["example"], False),
    ]
    taken = ask(desk.server, "POST", "/tokens?name=eye&role=operator")
    assert (taken.status, taken.json["field"]) == (409, "name")
    assert taken.json["message"].startswith("there is a token called eye: revoke it")
    assert ask(desk.server, "GET", "/tokens").json == said.json, "it is as it was"


def test_a_token_that_cannot_be_stored_does_not_exist(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise joborch.StorageError("the database cannot be written: disk I/O error")

    monkeypatch.setattr(desk.store, "write", full)
    assert ask(desk.server, "POST", "/tokens?name=x&role=reader").status == 503
    assert not desk.server.token_store
    monkeypatch.undo()
    add(desk)
    monkeypatch.setattr(desk.store, "write", full)
    assert ask(desk.server, "DELETE", "/tokens/x").status == 503
    assert desk.server.token_store.named("x") is not None, "it is still valid, as the answer says"


def test_roles_have_a_fitting_token_each(desk: Desk) -> None:
    fields = {"user": {"user_id": "-7"}, "client": {"services": "example"}}
    assert [len(add(desk, role, role, **fields.get(role, {}))) for role in ROLES] == [56] * 5


def test_a_route_must_name_roles_that_there_are() -> None:
    with pytest.raises(ValueError, match="who is 'caller': give roles separated by blanks"):
        joborch.route("GET", "/x", "server", who="caller", gives={})


# == The command ==


@pytest.fixture(name="site")
def site_fixture(make_process: MakeProcess) -> Process:
    """A server that nobody has set a token for."""
    return make_process("server", {"SERVICE_DOCKING_CLIENTS": "http://127.0.0.1:1"}).start()


def test_an_operator_makes_and_revokes_tokens(site: Process, tmp_path: Path) -> None:
    shell = Shell(tmp_path / "here", site.url)
    done = shell.run("token", "add", "ward-7", "--role", "user", "--user", "7", "--days", "30")
    text = done.stdout.strip()
    assert is_whole_token(text), done
    assert re.fullmatch(
        r"This is shown once\. The token ward-7 is valid until 20\S+Z, with the role user of user 7\.\n"
        r"Callers send it as `Authorization: Bearer TOKEN`; people store it with `joborch login URL`\.\n",
        done.stderr,
    )
    assert re.fullmatch(r"ward-7\tuser of user 7\t20\S+\t20\S+\n", shell("token", "list"))
    assert [each["user_id"] for each in json.loads(shell("token", "list", "--json"))] == [7]
    assert site.get("/tokens", headers=bearer(text)).status_code == 403
    assert shell("token", "revoke", "ward-7") == "token ward-7 is revoked\n"
    assert site.get("/tokens", headers=bearer(text)).status_code == 401
    assert text not in site.log and "token ward-7 (user) was made" in site.log


def test_a_client_s_token_comes_as_the_line_to_paste(site: Process, tmp_path: Path) -> None:
    shell = Shell(tmp_path / "here", site.url)
    done = shell.run("token", "add", "login-1", "--role", "client", "--services", "docking")
    assert "listens only on its own machine" in done.stderr and "JOBORCH_PUBLIC_URL" in done.stderr
    line = done.stdout.strip()
    writing, command = line.split("; python3 joborch.pyz ")
    words = shlex.split(command)
    assert words[:2] == ["client", "--join"] and words[3:] == ["--token-file", "joborch-token"]
    assert re.fullmatch(rf"http://[^/]+:{site.port}", words[2]) and "127.0.0.1" not in words[2]
    text = re.findall(r"joborch_\w{48}", writing)[0]
    assert writing == f"(umask 077; echo {text} >joborch-token)" and is_whole_token(text)


def test_the_line_to_paste_has_the_address_for_other_machines(make_process: MakeProcess, tmp_path: Path) -> None:
    server = make_process("server", {"JOBORCH_PUBLIC_URL": "https://jobs.example.org/"}).start()
    done = Shell(tmp_path / "here", server.url).run("token", "add", "login-1", "--role", "client", "--services", "example")
    assert " --join https://jobs.example.org --token-file " in done.stdout and "only on its own machine" not in done.stderr


def test_commands_are_for_the_user_of_the_token(site: Process, tmp_path: Path) -> None:
    """And say what it does not allow."""
    shell = Shell(tmp_path / "here", site.url)
    del shell.environment["JOBORCH_USER"]
    text = shell.run("token", "add", "ward-7", "--role", "user", "--user", "7").stdout.strip()
    shell.environment["JOBORCH_TOKEN"] = text
    number = shell("submit", "--", "true").strip()
    assert json.loads(shell("list", "--json"))[0]["user_id"] == 7 and shell("list", "--all").startswith(f"{number}\t")
    assert json.loads(shell("quota", "--json"))["user_id"] == 7
    assert json.loads(shell("top", "--json"))["clients"] == [], "clients are the site's affair"
    for words, said in (
        (("list", "--user", "8"), "the token ward-7 is for user 7, and knows no user 8"),
        (("submit", "--user", "8", "--", "true"), "the token ward-7 is for user 7: leave user_id out, or give 7"),
        (("token", "list"), "the token ward-7 has the role user, and this needs the role operator"),
    ):
        printed = shell(*words, status=2)
        assert said in printed and len(printed.splitlines()) == 1, printed
    shell("login", site.url)
    stored = json.loads((shell.folder / ".config/joborch/login.json").read_text())
    assert (stored["user"], stored["token"]) == (7, text)


def test_what_is_wrong_with_a_command_is_one_line(site: Process, tmp_path: Path) -> None:
    shell = Shell(tmp_path / "here", site.url)
    for words, said in (
        (("add",), "token add needs a name, as in joborch token add portal-1"),
        (("add", "x"), "role is missing: give one of user"),
        (("add", "x", "--role", "user"), "user_id is missing"),
        (("add", "x", "--role", "user", "--user", "seven"), "--user: 'seven' is no whole number"),
        (("add", "X", "--role", "reader"), "name is 'X': give at most 63 of a-z"),
        (("revoke", "x y"), "no token is called x y: `joborch token list` shows all"),
        (("lits",), "'lits' is none of add, list, revoke (did you mean list?)"),
        ((), "the following arguments are required"),
    ):
        printed = shell("token", *words, status=2)
        assert said in printed and len(printed.splitlines()) == 1, (words, printed)
    assert shell("token", "list") == ""


def test_a_role_that_is_not_named_at_a_route_is_refused_there(desk: Desk, url: str) -> None:
    desk.with_client(Status.RUNNING)
    code, said = status_of(url, add(desk, "node", "client", services="example"), "/jobs/1")
    assert (code, said.startswith("the token node has the role client")) == (403, True)
