"""Settings: how each is read, which of several sources counts, what is said of a wrong one, and that secrets stay hidden."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import string
from pathlib import Path
from typing import Any

import pytest
import reference
from hypothesis import assume, example, given
from hypothesis import strategies as st
from world import BOUNDED, tried

import joborch
from joborch import SETTINGS, ConfigError, load_config
from joborch_base.settings import (
    CLOUD_SETTINGS,
    SERVICE_SETTINGS,
    Setting,
    check_certificates,
    client_address,
    one_of,
    read_bytes,
    read_env_file,
    read_gpus,
    read_mode,
    read_names,
    read_networks,
    read_paths,
    read_period,
    read_port,
    read_positive,
    read_text,
    read_token,
    read_uids,
    read_url,
    read_urls,
    read_weights,
    read_whole,
    split_service_name,
)
from joborch_plugins import admin

MODES = ("server", "client")
SUFFIXES = sorted(setting.name for setting in SERVICE_SETTINGS)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own: default folders lie in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DATA", "CONFIG", "CACHE", "STATE"):
        monkeypatch.delenv(f"XDG_{name}_HOME", raising=False)
    return tmp_path


def load(mode: str = "server", environment: dict[str, str] | None = None, **flags: str | None) -> joborch.Config:
    """The configuration of a process with this environment and these flags, by field."""
    return load_config(mode, flags, environment or {})


def refused(mode: str = "server", environment: dict[str, str] | None = None, **flags: str | None) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load(mode, environment, **flags)
    text = str(caught.value)
    assert text.isprintable(), f"more than one line: {text!r}"
    return text


# == Reading values ==

NUMBERS = st.integers(0, 10**9)


@BOUNDED
@given(NUMBERS, st.sampled_from(["", "s", "m", "h", "d"]))
def test_seconds(number: int, unit: str) -> None:
    assert joborch.read_seconds(f"{number}{unit}") == number * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[unit]


@BOUNDED
@given(NUMBERS, st.sampled_from(["", "K", "M", "G", "k", "m", "g"]), st.sampled_from(["", "B", "b", "iB"]))
def test_bytes(number: int, unit: str, tail: str) -> None:
    assume(unit or tail != "iB")
    assert read_bytes(f"{number}{unit}{tail}") == number * 1024 ** " KMG".index(unit.upper() or " ")


def test_fractions_of_a_second() -> None:
    assert joborch.read_seconds("0.5") == 0.5
    assert joborch.read_seconds("1.5h") == 5400
    assert read_period("0.01") == 0.01


GRAMMAR = {
    joborch.read_seconds: r"[0-9]{1,12}(\.[0-9]{1,6})?[smhd]?",
    read_bytes: r"[0-9]{1,15}[KMGkmg]?(i?[Bb])?",
    read_whole: r"[0-9]{1,10}",
    joborch.read_switch: r"[01]",
}


@pytest.mark.parametrize("read", GRAMMAR, ids=lambda read: read.__name__)
@given(text=st.text(st.sampled_from("0123456789.smhdKMGiB-+e _\n٣²") | st.characters(), max_size=8))
@example(text="-1")
@example(text="1e3")
@example(text="1_000")
@example(text=" 1")
@example(text="1\n")
@example(text="٣")
@example(text="")
@BOUNDED
def test_what_is_no_number_is_refused_with_what_would_be_right(read: Any, text: str) -> None:
    value = tried(lambda: read(text), ValueError)
    if isinstance(value, ValueError):
        assert str(value).startswith("give ")
        assert not re.fullmatch(GRAMMAR[read], text) or read is read_whole
    else:
        assert re.fullmatch(GRAMMAR[read], text)
        assert value >= 0


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (read_port, ["0", "1", "65535"], ["65536", "-1", "http"]),
        (read_positive, ["1", "2147483647"], ["0", "2147483648"]),
        (read_whole, ["0", "2147483647"], ["2147483648", "12345678901"]),
        (read_period, ["0.01", "24h"], ["0", "0.009", "0d"]),
        (joborch.read_switch, ["0", "1"], ["yes", "true", "", "01"]),
        (one_of("text", "json"), ["text", "JSON"], ["xml", ""]),
        (read_token, ["a", "a,b", "!~" * 2048], ["", "a b", "a\nb", "tokén", "a" * 4097]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bounds(read: Any, good: list[str], bad: list[str]) -> None:
    for text in good:
        read(text)
    for text in bad:
        with pytest.raises(ValueError, match=r"^give "):
            read(text)


# == The table ==


def test_every_setting_fills_a_field() -> None:
    fields = {item.name for item in dataclasses.fields(joborch.Config)} - {
        "mode",
        "services",
        "batch",
        "clouds",
        "sources",
        "warnings",
        "env_file",
        "origin",
    }
    assert [setting.field for setting in SETTINGS if setting.field not in fields] == []
    assert fields - {setting.field for setting in SETTINGS} == set()
    for names in ([s.name for s in SETTINGS], [s.flag for s in SETTINGS], [s.field for s in SETTINGS], SUFFIXES):
        assert len(names) == len(set(names))


@pytest.mark.parametrize("setting", [*SETTINGS, *SERVICE_SETTINGS], ids=lambda setting: setting.name)
def test_every_default_can_be_read_and_every_setting_is_explained(setting: Setting) -> None:
    if setting.default:
        setting.read(setting.default)
    assert len(setting.help) > 5
    assert set(setting.modes.split()) <= set(MODES)
    named = re.match(r"(?:JOBORCH_)?(SLURM|DIRAC|CALLBACK|ISOLATION|NETWORK|BIND|UIDS|SCALE|ORPHAN_GRACE)(_|$)", setting.name)
    others = {"CALLBACK": "webhooks", **dict.fromkeys(("ISOLATION", "NETWORK", "BIND", "UIDS"), "sandbox")}
    others.update(dict.fromkeys(("SCALE", "ORPHAN_GRACE"), "clouds"))
    plugin = others.get(named[1], named[1].lower()) if named else ""
    assert setting.plugin == (plugin if named else "compat22" if setting.name == "JOBORCH_COMPAT" else "")
    assert re.fullmatch(r"--[a-z]+(-[a-z]+)*", setting.flag)


def test_weights_are_shown_as_they_are_written() -> None:
    rows = {name: value for name, value, _ in admin.config_rows(load(environment={"JOBORCH_WEIGHTS": "7=2, 8=0.5"}))}
    assert rows["JOBORCH_WEIGHTS"] == "7=2,8=0.5"
    assert {name: value for name, value, _ in admin.config_rows(load())}["JOBORCH_WEIGHTS"] == ""


@pytest.mark.parametrize("text", ["7", "7=", "=2", "7=x", "7=0", "x=1", "7=2;8=1", "7=1e3"])
def test_what_is_no_list_of_weights_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="JOBORCH_WEIGHTS"):
        load(environment={"JOBORCH_WEIGHTS": text})


def test_the_references_tables_have_every_setting_once() -> None:
    rows = [line for line in reference.settings_tables().splitlines() if line.startswith("| `")]
    names = [s.name for s in SETTINGS] + [f"SERVICE_<NAME>_{s.name}" for s in SERVICE_SETTINGS]
    names += [f"CLOUD_<NAME>_{s.name}" for s in CLOUD_SETTINGS]
    assert sorted(row.split("`")[1] for row in rows) == sorted(names)
    assert {row.replace("\\|", "").count("|") for row in rows} == {6}


SPECIFIED_DEFAULTS = {
    "host": "127.0.0.1,::1", "max_age_s": 172800, "allow_anonymous": False, "executor": "local", "send_interval_s": 0.5,
    "get_interval_s": 0.5, "run_interval_s": 0.5, "clean_interval_s": 60, "keep_rows_s": 365 * 86400, "max_upload_bytes": 10 * 2**30,
    "min_free_bytes": 2**30, "kill_grace_s": 10, "log_limit_bytes": 64 * 2**20, "compat": "1.2", "log_level": "info",
    "log_format": "text", "token": "", "hosts": "", "share_half_life_s": 21600, "ageing_s": 60, "weights": {},
    "max_queued_per_user": 10_000, "pass_env": (),
}  # fmt: skip


def test_defaults_are_those_of_the_specification(home: Path) -> None:
    server, client = load("server"), load("client")
    assert (server.port, client.port) == (5000, 9000)
    for name, value in SPECIFIED_DEFAULTS.items():
        assert getattr(server, name) == getattr(client, name) == value, name
    assert server.data_path == str(home / ".local/share/joborch/server")
    assert client.db_path == str(home / ".local/share/joborch/client/joborch.db")
    service = load(environment={"SERVICE_A_CLIENTS": "http://h:1"}).services["a"]
    assert dataclasses.astuple(service)[6:] == ("", "", "joborch", 5, 10, "share", None, 2, True, 86400.0, 3600.0, "")


THREE_URLS = {
    f"SERVICE_A_{name}_URL": f"http://h:1/{path}" for name, path in (("UPLOAD", "submit"), ("DOWNLOAD", "get"), ("TERMINATE", "kill"))
}


@pytest.mark.parametrize(
    ("environment", "peer"),
    [
        ({"SERVICE_A_CLIENTS": "http://h:1"}, "joborch"),
        (THREE_URLS, "2.2"),
        ({**THREE_URLS, "SERVICE_A_TOKEN": "t"}, "joborch"),
        ({**THREE_URLS, "SERVICE_A_CLIENTS": "http://h:2"}, "joborch"),
        ({**THREE_URLS, "SERVICE_A_TOKEN": "t", "SERVICE_A_PEER": "2.2"}, "2.2"),
        ({"SERVICE_A_CLIENTS": "http://h:1", "SERVICE_A_PEER": "2.2"}, "2.2"),
        ({**THREE_URLS, "SERVICE_A_PEER": "joborch"}, "joborch"),
    ],
)
def test_which_clients_may_be_22(environment: dict[str, str], peer: str) -> None:
    """What cannot prove who it is, is called only where the settings say so, or have always meant so."""
    assert load("server", environment).services["a"].peer == peer
    assert "SERVICE_A_PEER" in refused("server", {**environment, "SERVICE_A_PEER": "3"})


# == Which source counts ==

VALUES: dict[Any, tuple[str, str, str]] = {
    read_port: ("1", "2", "3"),
    read_whole: ("1", "2", "3"),
    read_positive: ("1", "2", "3"),
    joborch.read_seconds: ("1", "2m", "3h"),
    read_period: ("1", "2m", "3h"),
    read_bytes: ("1", "2K", "3G"),
    joborch.read_switch: ("1", "1", "1"),
    read_networks: ("10.0.0.1", "192.0.2.0/24,::1", "127.0.0.0/8"),
    read_mode: ("0600", "0660", "666"),
    read_text: ("a", "b", "c"),
    read_url: ("http://a", "https://b/c", "http://c:8000"),
    read_urls: ("http://a", "https://b/c, http://d", "http://c:8000"),
    read_token: ("a", "b", "c"),
    read_weights: ("7=2", "7=2,8=0.5", "9=1"),
    read_names: ("A", "A_*,B", "C"),
    read_paths: ("/a", "/a,/b", "/c"),
    read_gpus: ("0", "0,1", "none"),
    read_uids: ("1-2", "20001-20064", "7-7"),
}
WORDS = {
    "executor": ("local", "slurm", "dirac"),
    "compat": ("1.2", "2.2", "2.2"),
    "log_level": ("debug", "info", "error"),
    "log_format": ("json",) * 3,
    "isolation": ("none", "process", "user"),
    "network": ("none", "host", "host"),
    "callback_hosts": ("a.example", "*.example,10.0.0.0/8", "*"),
    "callback_on": ("failed", "Failed,killed", "Running"),
    "callback_secret": tuple(f"whsec_{letter * 32}" for letter in "abc"),
}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
@pytest.mark.parametrize("given_in", range(8))
def test_flag_before_environment_before_file_before_default(setting: Setting, given_in: int, tmp_path: Path) -> None:
    flag, variable, line = WORDS.get(setting.field) or VALUES[setting.read]
    if setting.field == "token_file":
        for name in (flag, variable, line):
            (tmp_path / name).write_text("secret\n")
        flag, variable, line = (str(tmp_path / name) for name in (flag, variable, line))
    flags: dict[str, str | None] = {setting.field: flag if given_in & 4 else None, "env_file": str(tmp_path / "env")}
    (tmp_path / "env").write_text(f"{setting.name}={line}\n" if given_in & 1 else "\n")
    config = load_config("client", flags, {setting.name: variable} if given_in & 2 else {})
    if given_in:
        text, source = {4: (flag, f"flag {setting.flag}"), 2: (variable, "environment"), 1: (line, "--env-file")}[
            1 << given_in.bit_length() - 1
        ]
        wanted = setting.read(text)
        assert getattr(config, setting.field) == (str(Path(wanted).resolve()) if setting.field in ("data_path", "db_path") else wanted)
        assert config.sources[setting.name] == source
    else:
        assert config.sources[setting.name] == "default"


def test_an_empty_variable_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("PORT=1234\nSERVICE_A_CLIENTS=http://a:1\nSERVICE_A_MAX_RUNS=3\n")
    empty = {"PORT": "", "MAX_AGE": "", "SERVICE_A_MAX_RUNS": ""}
    config = load(environment=empty, env_file=str(tmp_path / "env"))
    assert (config.port, config.max_age_s) == (1234, 172800)
    assert config.services["a"].max_runs == 3


def test_an_empty_flag_is_the_default_or_refused() -> None:
    """`--slots ""`, as a script writes it whose variable is empty, must not become a value of another type."""
    wrong = []
    for setting in SETTINGS:
        config = tried(lambda: load("client", **{setting.field: ""}), ConfigError)  # noqa: B023 - called at once
        if isinstance(config, ConfigError):
            assert setting.flag in str(config)
        elif setting.default and getattr(config, setting.field) != setting.read(setting.default):
            wrong.append(f"{setting.flag} is {getattr(config, setting.field)!r}")
    assert wrong == []


def test_services_from_both_sources_are_one(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("SERVICE_A_CLIENTS=http://file:1\nSERVICE_A_MAX_RUNS=3\n")
    config = load(environment={"SERVICE_A_CLIENTS": "http://environment:1"}, env_file=str(tmp_path / "env"))
    service = config.services["a"]
    assert (service.addresses[0].name, service.max_runs) == ("environment:1", 3)


@pytest.mark.parametrize("from_file", [False, True])
def test_config_says_where_each_value_came_from(from_file: bool, tmp_path: Path) -> None:
    """Also for the settings of a service."""
    (tmp_path / "env").write_text("SERVICE_A_CLIENTS=http://a:1\nSERVICE_A_MAX_RUNS=3\nMAX_AGE=5\n" if from_file else "")
    given = {} if from_file else {"SERVICE_A_CLIENTS": "http://a:1", "SERVICE_A_MAX_RUNS": "3", "MAX_AGE": "5"}
    rows = {name: source for name, _, source in admin.config_rows(load(environment=given, env_file=str(tmp_path / "env")))}
    source = "--env-file" if from_file else "environment"
    assert {rows[name] for name in ("MAX_AGE", "SERVICE_A_MAX_RUNS", "SERVICE_A_CLIENTS")} == {source}
    assert {rows[name] for name in ("PORT", "SERVICE_A_RUNS_PER_USER")} == {"default"}


# == --env-file ==


def test_env_file_as_systemd_and_shells_read_it(tmp_path: Path) -> None:
    text = "# a comment\r\n; another\r\n\r\nPORT=7\r\n  DATA_PATH = '/a b' \nX=\nQ=\"a=b\"\nU=a'\nJ=a#b\nexport K=1 # a\n"
    (tmp_path / "env").write_text(text, newline="")
    read = read_env_file(str(tmp_path / "env"))
    assert read == {"PORT": "7", "DATA_PATH": "/a b", "X": "", "Q": "a=b", "U": "a'", "J": "a#b", "K": "1"}


@given(st.dictionaries(st.text(string.ascii_uppercase + "_", min_size=1), st.text(st.characters(exclude_categories=["C", "Z"]))))
@BOUNDED
def test_env_file_reads_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, str]) -> None:
    path = tmp_path_factory.getbasetemp() / "env"
    for quote in ("", "'", '"'):
        assume(quote or not any(value[:1] in ("'", '"') for value in pairs.values()))
        assume(quote != "'" or not any("'" in value for value in pairs.values()))
        written = {name: re.sub(r'(["\\$`])', r"\\\1", value) if quote == '"' else value for name, value in pairs.items()}
        path.write_text("".join(f"{name}={quote}{value}{quote}\n" for name, value in written.items()), encoding="utf-8")
        assert read_env_file(str(path)) == pairs


@pytest.mark.parametrize(("text", "line"), [("PORT\n", 1), ("\nA=1\nexport B\n", 3), ("=1\n", 1), ("A-B=1\n", 1)])
def test_env_file_with_a_wrong_line(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "env").write_text(text)
    assert f"line {line}: write NAME=VALUE" in refused(env_file=str(tmp_path / "env"))


def test_env_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "--env-file" in refused(env_file=str(tmp_path / "none"))
    (tmp_path / "latin").write_bytes(b"A=\xe9\n")
    assert str(tmp_path / "latin") in refused(env_file=str(tmp_path / "latin"))


# == Services ==

SERVICE_NAMES = st.text(string.ascii_uppercase + string.digits + "_", min_size=1, max_size=20)


@BOUNDED
@given(SERVICE_NAMES | st.sampled_from(SUFFIXES), st.sampled_from(SERVICE_SETTINGS))
@example("MAX_RUNS", SERVICE_SETTINGS[-1])
@example("A_TOKEN", next(s for s in SERVICE_SETTINGS if s.name == "TOKEN_FILE"))
def test_the_longest_known_suffix_is_the_setting(name: str, setting: Setting) -> None:
    variable = f"SERVICE_{name}_{setting.name}"
    longest = max((suffix for suffix in SUFFIXES if variable.endswith("_" + suffix)), key=len)
    found = split_service_name(variable)
    assert found is not None
    assert found[1].name == longest
    assert found[0] == variable[len("SERVICE_") : -len(longest) - 1].lower()


@pytest.mark.parametrize("name", ["SERVICE_CLIENTS", "SERVICE__CLIENTS", "SERVICE_A", "SERVICE_A_CLIENT", "A_CLIENTS", "SERVICE_", ""])
def test_names_of_no_service(name: str) -> None:
    assert split_service_name(name) is None


def test_a_service_whose_name_has_underscores_and_any_case() -> None:
    given = {"SERVICE_My_Docking_2_CLIENTS": "http://gpu1:9000, http://gpu2:9000/joborch/", "service_my_docking_2_max_runs": "7"}
    services = load(environment=given).services
    assert list(services) == ["my_docking_2"]
    assert services["my_docking_2"].max_runs == 7
    assert [address.name for address in services["my_docking_2"].addresses] == ["gpu1:9000", "gpu2:9000/joborch"]
    assert services["my_docking_2"].addresses[1] == joborch.Address(
        *(f"http://gpu2:9000/joborch/{place}" for place in ("submit", "retrieve", "kill")), "http://gpu2:9000/joborch"
    )


def test_without_any_service_there_is_the_example_on_this_machine() -> None:
    services = load().services
    assert list(services) == ["example"]
    assert services["example"].addresses == (client_address("http://127.0.0.1:9000"),)
    assert load("client", {"SERVICE_A_CLIENTS": "rubbish"}).services == {}, "services are the server's"


UPLOAD, DOWNLOAD, TERMINATE = "http://h:1/submit", "http://h:1/retrieve", "http://h:1/kill"


@pytest.mark.parametrize(
    ("urls", "wanted"),
    [
        ((UPLOAD, "", ""), (UPLOAD, DOWNLOAD, TERMINATE, "http://h:1")),
        ((UPLOAD + "/", DOWNLOAD, TERMINATE), (UPLOAD, DOWNLOAD, TERMINATE, "http://h:1")),
        ((UPLOAD, "http://other:2/get", ""), (UPLOAD, "http://other:2/get", TERMINATE, "http://h:1")),
        (("http://h:1/in", "http://h:1/out", "http://h:1/end"), ("http://h:1/in", "http://h:1/out", "http://h:1/end", "")),
    ],
)
def test_the_three_urls_of_the_reference(urls: tuple[str, str, str], wanted: tuple[str, str, str, str]) -> None:
    given = {f"SERVICE_A_{name}_URL": url for name, url in zip(("UPLOAD", "DOWNLOAD", "TERMINATE"), urls) if url}
    assert load(environment=given).services["a"].addresses == (joborch.Address(*wanted),)


@pytest.mark.parametrize("given", [{"CLIENTS": ""}, {"CLIENTS": ","}, {"MAX_RUNS": "3"}])
@pytest.mark.parametrize("name", ["a", "example"])
def test_a_service_without_a_client_of_its_own(name: str, given: dict[str, str]) -> None:
    """Clients that call in serve it. Only the service example has a client by default."""
    service = load(environment={f"SERVICE_{name.upper()}_{key}": text for key, text in given.items()}).services[name]
    default = [client_address("http://127.0.0.1:9000")] if name == "example" and "CLIENTS" not in given else []
    assert list(service.addresses) == default


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"DOWNLOAD_URL": DOWNLOAD}, "SERVICE_A_UPLOAD_URL is missing"),
        ({"UPLOAD_URL": "http://h:1/in", "DOWNLOAD_URL": "http://h:1/out"}, "SERVICE_A_DOWNLOAD_URL and _TERMINATE_URL are needed"),
        ({"CLIENTS": "gpu1:9000"}, "SERVICE_A_CLIENTS is 'gpu1:9000"),
        ({"CLIENTS": "http://"}, "SERVICE_A_CLIENTS is"),
        ({"CLIENTS": "ftp://gpu1"}, "give a URL"),
        ({"CLIENTS": "http://[::1"}, "give a URL"),
        ({"CLIENTS": "http://gpu1:http"}, "give a URL"),
        ({"CLIENTS": "http://gpu1:99999"}, "give a URL"),
        ({"UPLOAD_URL": "h:1/submit"}, "SERVICE_A_UPLOAD_URL is"),
        ({"CLIENTS": "http://h:1", "MAX_RUNS": "0"}, "SERVICE_A_MAX_RUNS is '0': give a whole number from 1"),
        ({"CLIENTS": "http://h:1", "TIMEOUT": "0"}, "SERVICE_A_TIMEOUT is '0'"),
        ({"CLIENTS": "http://h:1", "RETURN_INPUTS": "no"}, "SERVICE_A_RETURN_INPUTS is 'no': give 1 or 0"),
        ({"CLIENTS": "http://h:1", "TOKEN_FILE": "/does/not/exist"}, "SERVICE_A_TOKEN_FILE /does/not/exist cannot be read"),
    ],
)
def test_services_that_cannot_be(given: dict[str, str], word: str) -> None:
    assert word in refused(environment={f"SERVICE_A_{name}": value for name, value in given.items()})


@pytest.mark.parametrize(("kind", "word"), [("large", "it has more than 64 KiB"), ("pipe", "cannot be read"), ("folder", "is a directory")])
def test_a_token_file_that_is_none(kind: str, word: str, tmp_path: Path) -> None:
    """It is neither read without end, such as a device, nor waited for; a pipe with a writer is read, as in <(pass show joborch)."""
    path = tmp_path / "file"
    if kind == "large":
        with path.open("wb") as file:
            file.truncate(1 << 20)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert word.lower() in refused(environment={"SERVICE_A_CLIENTS": "http://h:1", "SERVICE_A_TOKEN_FILE": str(path)}).lower()
    assert "JOBORCH_TOKEN_FILE" in refused(environment={"JOBORCH_TOKEN_FILE": str(path)})


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    assert "--env-file /dev/zero cannot be read: it has more than 1024 KiB" in refused(env_file="/dev/zero")
    with pytest.raises(ConfigError, match="JOBORCH_CA_FILE is '/dev/zero': it is no regular file; give a file of certificates"):
        check_certificates("/dev/zero")


def test_a_token_comes_through_a_pipe() -> None:
    near, far = os.pipe()
    try:
        os.write(far, b"a-token-of-20-letters\n")
        os.close(far)
        config = load(environment={"JOBORCH_TOKEN_FILE": f"/dev/fd/{near}"})
    finally:
        os.close(near)
    assert config.token == "a-token-of-20-letters"


# == Wrong values ==

WRONG = {
    read_port: "http",
    read_whole: "many",
    read_positive: "0",
    joborch.read_seconds: "soon",
    read_period: "0",
    read_bytes: "1T",
    joborch.read_switch: "yes",
}
NOT_WRONG = ("callback_hosts", "callback_secret")  # "rubbish" may be a host; a secret is hidden
TYPED = [each for each in SETTINGS if each.read in WRONG or (each.field in WORDS and each.field not in NOT_WRONG)]


@pytest.mark.parametrize("setting", TYPED, ids=lambda setting: setting.name)
@pytest.mark.parametrize("way", ["flag", "environment", "file"])
def test_a_wrong_value_is_named_with_setting_value_and_remedy(setting: Setting, way: str, tmp_path: Path) -> None:
    value = WRONG.get(setting.read, "rubbish")
    (tmp_path / "env").write_text(f"{setting.name}={value}\n" if way == "file" else "")
    flags: dict[str, str | None] = {setting.field: value if way == "flag" else None, "env_file": str(tmp_path / "env")}
    said = refused("client", {setting.name: value} if way == "environment" else {}, **flags)
    assert said.startswith(f"{setting.flag if way == 'flag' else setting.name} is {value!r}: give ")


def test_a_value_with_line_breaks_is_shown_on_one_line() -> None:
    assert refused(environment={"PORT": "1\nWARNING all is lost\x1b[31m"}).startswith("PORT is '1 WARNING")
    assert len(refused(environment={"PORT": "9" * 100_000})) < 300


def test_a_server_does_not_forget() -> None:
    assert ":memory:" in refused("server", {"DB_PATH": ":memory:"})
    assert load("client", {"DB_PATH": ":memory:"}).db_path == ":memory:"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", "1270.0.0.1", "localhost.example.org"])
def test_a_server_for_others_needs_a_token_or_a_decision(host: str) -> None:
    said = refused("server", {"JOBORCH_HOST": host})
    assert "JOBORCH_TOKEN" in said
    assert "JOBORCH_ALLOW_ANONYMOUS=1" in said
    assert load("server", {"JOBORCH_HOST": host, "JOBORCH_TOKEN": "t"}).host == host
    assert "JOBORCH_ALLOW_FROM" in refused("server", {"JOBORCH_HOST": host, "JOBORCH_ALLOW_ANONYMOUS": "1"})
    assert "JOBORCH_ALLOW_FROM" in refused("client", {"JOBORCH_HOST": f"127.0.0.1,{host}", "JOBORCH_ALLOW_ANONYMOUS": "1"})
    anonymous = {"JOBORCH_HOST": host, "JOBORCH_ALLOW_ANONYMOUS": "1", "JOBORCH_ALLOW_FROM": "192.0.2.0/24"}
    assert load("server", anonymous).host == load("client", anonymous).host == host


@pytest.mark.parametrize("tokens", [",", ",,"])
def test_commas_alone_are_no_token(tokens: str) -> None:
    """They pass for a token at the start, and then there is none."""
    assert "JOBORCH_TOKEN" in refused("server", {"JOBORCH_HOST": "0.0.0.0", "JOBORCH_TOKEN": tokens})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_needs_no_token(host: str) -> None:
    assert joborch.is_loopback(host)
    assert load("server", {"JOBORCH_HOST": host}).token == ""


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """platformdirs gives `~` back where there is none: that would be a folder of this name in the current one."""
    monkeypatch.setattr("platformdirs.user_data_dir", lambda _: "~/.local/share/joborch")
    assert "set DATA_PATH" in refused("client")
    assert load("client", {"DATA_PATH": "data"}).data_path == str(Path("data").resolve())


# == Unknown names ==


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("JOBORCH_SLOT", "JOBORCH_SLOTS"),
        ("JOBORCH_MAXUPLOAD", "JOBORCH_MAX_UPLOAD"),
        ("JOBORCH_LOGLEVEL", "JOBORCH_LOG"),
        ("SERVICE_DOCKING_CLIENT", "CLIENTS"),
        ("SERVICE_DOCKING_MAX_RUN", "MAX_RUNS"),
        ("SERVICE_DOCKING_RUN_PER_USER", "RUNS_PER_USER"),
        ("SERVICE_DOCKING_UPLOAD_URI", "UPLOAD_URL"),
        ("JOBORCH_", ""),
        ("SERVICE_QQQ", ""),
    ],
)
def test_an_unknown_name_is_warned_of_with_the_nearest(name: str, hint: str) -> None:
    warnings = load(environment={name: "1", "SERVICE_A_CLIENTS": "http://h:1"}).warnings
    assert [warning.split()[0] for warning in warnings] == [name]
    assert f"(did you mean {hint}?)" in warnings[0] or not hint


def test_known_names_and_those_of_others_are_not_warned_of(tmp_path: Path) -> None:
    known = {
        setting.name: "1s" if setting.read in (joborch.read_seconds, read_period) else "1"
        for setting in SETTINGS
        if setting.read in WRONG and setting.field != "allow_anonymous"
    }
    others = {"JOBORCH_SERVER": "http://h", "JOBORCH_TOKEN": "t", "SERVICES": "1", "PATH": "/bin", "JOB": "1"}
    assert load("client", {**known, **others, "SERVICE_A_CLIENTS": "http://h:1"}).warnings == ()
    (tmp_path / "env").write_text("JOBORCH_SLOT=1\n")
    assert len(load("client", env_file=str(tmp_path / "env")).warnings) == 1, "those of the file are"


# == Secrets ==

SECRETS = st.text(string.ascii_letters + string.digits, min_size=12, max_size=40)


def shown(config: joborch.Config, capsys: pytest.CaptureFixture[str]) -> str:
    """All that `joborch config` prints, in both forms."""
    for as_json in (False, True):
        assert admin.command_config(config, as_json) == 0
    return "".join(capsys.readouterr())


@given(own=SECRETS, theirs=SECRETS, in_files=st.booleans())
@BOUNDED
def test_config_prints_no_secret(own: str, theirs: str, in_files: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    given = {"JOBORCH_TOKEN": own, "SERVICE_A_TOKEN": theirs}
    if in_files:
        for name, secret in given.items():
            (folder / name).write_text(secret + "\n")
        given = {f"{name}_FILE": str(folder / name) for name in given}
    config = load("server", {**given, "SERVICE_A_CLIENTS": "http://h:1"})
    assert (config.token, config.services["a"].token) == (own, theirs)
    printed = " ".join(" ".join(row) for row in admin.config_rows(config))
    assert own not in printed
    assert theirs not in printed
    assert printed.count("***") == 2


def test_both_forms_of_config_agree_and_mask(capsys: pytest.CaptureFixture[str]) -> None:
    config = load("server", {"JOBORCH_TOKEN": "hide-me-please", "SERVICE_A_TOKEN": "hide-me-too", "SERVICE_A_CLIENTS": "http://h:1"})
    admin.command_config(config, True)
    values = {name: said["value"] for name, said in json.loads(capsys.readouterr().out).items()}
    admin.command_config(config, False)
    lines = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert lines == {name: value or "-" for name, value in values.items()}
    assert (values["JOBORCH_TOKEN"], values["SERVICE_A_TOKEN"], values["PORT"]) == ("***", "***", "5000")
    assert "hide-me" not in str(values)


def test_a_password_in_a_url_is_refused_or_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    """The name of a client goes into logs and into every job."""
    config = tried(lambda: load("server", {"SERVICE_A_CLIENTS": "http://me:hide-me-please@h:1"}), ConfigError)
    if isinstance(config, ConfigError):
        assert "hide-me-please" not in str(config)
    else:
        assert "hide-me-please" not in shown(config, capsys) + config.services["a"].addresses[0].name


def test_a_wrong_token_is_not_shown() -> None:
    for name in ("JOBORCH_TOKEN", "SERVICE_A_TOKEN"):
        said = refused("server", {name: "two words", "SERVICE_A_CLIENTS": "http://h:1"})
        assert said.startswith(name)
        assert "words" not in said


@pytest.mark.parametrize("name", ["JOBORCH_TOKEN_FILE", "SERVICE_A_TOKEN_FILE"])
@pytest.mark.parametrize("content", ["", "\n", "two words\n", "tokén\n"])
def test_a_token_file_without_a_token_is_refused(name: str, content: str, tmp_path: Path) -> None:
    """An empty file must not mean: no token is needed."""
    (tmp_path / "token").write_text(content)
    said = refused("server", {name: str(tmp_path / "token"), "SERVICE_A_CLIENTS": "http://h:1"})
    assert said.startswith(f"{name} {tmp_path / 'token'}")


def test_a_token_of_its_own_goes_before_the_file(tmp_path: Path) -> None:
    assert load("client", {"JOBORCH_TOKEN": "own", "JOBORCH_TOKEN_FILE": str(tmp_path / "none")}).token == "own"


@pytest.mark.parametrize("text", ["diracx", "ftp://x", "http://", "http://a b", "http://[", "http://ü"])
def test_a_url_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"JOBORCH_DIRAC_URL is .*: give a URL"):
        load_config("client", {}, {"JOBORCH_DIRAC_URL": text})


@pytest.mark.parametrize(("executor", "slots"), [("local", os.cpu_count()), ("slurm", 100), ("dirac", 100)])
def test_slots_are_cores_or_jobs(executor: str, slots: int) -> None:
    assert load_config("client", {}, {"JOBORCH_EXECUTOR": executor}).slots == slots


@pytest.mark.parametrize("name", ["SLURM_PARTITION", "SLURM_ACCOUNT", "SLURM_QOS", "SLURM_CONSTRAINT", "SLURM_GRES"])
@pytest.mark.parametrize("text", ["two words", "--uid=0", "a\nb", "ü"])
def test_a_word_for_sbatch_is_one_word(name: str, text: str) -> None:
    """No setting becomes another option."""
    with pytest.raises(ConfigError, match=f"SERVICE_DOCK_{name} is"):
        load_config("client", {}, {f"SERVICE_DOCK_{name}": text})


def test_settings_of_a_batch_system_are_a_clients_and_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that has them in its environment knows them, and makes no service of them."""
    environment = {"SERVICE_DOCK_SLURM_PARTITION": "gpu", "SERVICE_DOCK_SLURM_ARGS": "--nice=1 --comment='a b'"}
    server = load_config("server", {}, environment)
    assert (list(server.services), server.warnings) == (["example"], ())
    admin.command_config(load_config("client", {}, environment), as_json=False)
    said = capsys.readouterr().out
    assert re.search(r"SERVICE_DOCK_SLURM_PARTITION +gpu +\(environment\)", said)
    assert "SERVICE_DOCK_SLURM_ARGS" in said and "--nice=1 '--comment=a b'" in said
