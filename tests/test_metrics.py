"""What /metrics counts, read by Prometheus' own parser, promtool, and a real Prometheus with its rules and the dashboard's queries."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import MakePair
from harness import ROOT, Pair, Process, free_port, run_to_end, submit, wait_for, wait_status
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from world import BOUNDED, Desk, Disk, ask

import joborch
from joborch import Status
from joborch_plugins.metrics import Family, Histogram

PATIENCE_S = 90.0
Sample = dict[tuple[tuple[str, str], ...], float]


def parsed(text: str) -> dict[str, Sample]:
    """All samples by name and labels; the official parser accepts the text, and no sample is there twice."""
    found: dict[str, Sample] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type != "unknown", family
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), f"{sample} is there twice"
            found[sample.name][labels] = sample.value
    return found


def metrics_of(process: Process) -> dict[str, Sample]:
    """The metrics of a process, as Prometheus reads them."""
    token = process.settings.get("JOBORCH_TOKEN")
    answer = process.get("/metrics", headers={"Authorization": f"Bearer {token}"} if token else {})
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return parsed(answer.text)


def value(found: dict[str, Sample], name: str, **labels: str) -> float:
    """The sum of the samples with these labels."""
    chosen = [number for key, number in found.get(f"joborch_{name}", {}).items() if labels.items() <= dict(key).items()]
    assert chosen, f"joborch_{name}{labels} is missing"
    return sum(chosen)


def test_jobs_are_counted(own_pair: Pair) -> None:
    """Each status once, by service; nothing names a user; after a restart only counters begin anew."""
    server, client = own_pair.server, own_pair.client
    run_to_end(server, "echo yes >out.txt", user_id=424242)
    run_to_end(server, "exit 3", user_id=424242)
    running = submit(server, "sleep 600", user_id=424242)
    wait_status(server, running, "Running", limit_s=PATIENCE_S)
    found = metrics_of(server)
    for status, count in {"Queued": 3, "Processing": 3, "Submitted": 3, "Completed": 1, "Failed": 1, "Killed": 0}.items():
        assert value(found, "jobs_total", service="example", status=status) == count, status
    assert value(found, "jobs_current", service="example") == value(found, "jobs_current", status="Running") == 1
    assert value(found, "failures_total", cause="user") == value(found, "failures_total") == 1
    assert value(found, "run_seconds_count") == value(found, "transfer_seconds_count") == 2
    assert (
        value(found, "wait_seconds_count")
        == value(found, "dispatch_seconds_count")
        == value(found, "dispatch_seconds_bucket", le="+Inf")
        == 3
    )
    assert value(found, "result_bytes_total") > 0
    assert value(found, "http_requests_total", method="POST", route="/upload", code="201") == 3
    assert value(found, "http_received_bytes_total", route="/upload") > 300
    assert value(found, "client_up") == 1 and value(found, "problems") == 0
    theirs = metrics_of(client)
    assert value(theirs, "payloads_total", status="Running") == 3 and value(theirs, "payloads_current") == 1
    text = server.get("/metrics").text
    assert "424242" not in text and "user_id" not in text
    server.restart()
    wait_for(lambda: value(metrics_of(server), "jobs_current", status="Running") == 1, PATIENCE_S, "a count of the jobs")
    assert value(metrics_of(server), "jobs_total", status="Completed") == 0
    server.post(f"/terminate/{running}")
    wait_status(server, running, "Killed", limit_s=PATIENCE_S)
    found = metrics_of(server)
    assert (value(found, "jobs_current"), value(found, "jobs_total", status="Killed")) == (0, 1)


def test_the_first_value_of_a_histogram_is_an_increase(desk: Desk) -> None:
    """Its buckets are there before: what appears with a value has no rate for Prometheus."""
    found = parsed(ask(desk.server, "GET", "/metrics").body.decode())
    for name in ("wait", "dispatch", "run", "transfer"):
        assert value(found, f"{name}_seconds_count", service="example") == value(found, f"{name}_seconds_bucket", le="+Inf") == 0


def test_no_counter_falls_when_a_client_is_gone(desk: Desk) -> None:
    """The errors of its loops stay counted."""
    desk.server.loops = loops = joborch.make_server_loops(desk.server)
    (name,) = [name for name in loops if name.startswith("get:")]
    loops[name].errors = 3

    def counted() -> float:
        return value(parsed(ask(desk.server, "GET", "/metrics").body.decode()), "loop_errors_total", loop="get")

    assert [counted(), counted()] == [3, 3]
    desk.server.loops = {other: loop for other, loop in loops.items() if other != name}
    assert counted() == 3


def test_what_is_refused_is_counted_too(own_pair: Pair) -> None:
    """Whatever strangers send makes no new labels."""
    client = own_pair.client
    assert client.get("/events").status_code == 401
    for path in ("/a", "/b", "/metrics/c"):
        assert client.get(path).status_code == 404
    assert client.call("BREW", "/").status_code == 405
    found = metrics_of(client)
    assert value(found, "http_requests_total", route="/events", code="401") == 1
    assert value(found, "http_requests_total", method="GET", route="", code="404") == 3
    assert value(found, "http_requests_total", method="other", route="", code="405") == 1


def test_a_move_that_is_taken_back_is_not_counted(desk: Desk) -> None:
    """Neither is one whose transaction fails; those beside it in the transaction are."""
    job, count = desk.upload(), desk.server.plugins["metrics"]
    moved = dict(count.moves.values)

    def move_and_fail(db: sqlite3.Connection) -> None:
        assert desk.store.move_in(db, job, Status.KILLED, "asked for")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        desk.store.write(move_and_fail)

    def move_and_half_fail(db: sqlite3.Connection) -> None:
        with contextlib.suppress(ValueError):
            desk.store.core.savepoint(lambda: move_and_fail(db))

    desk.store.write(move_and_half_fail)
    assert count.moves.values == moved
    assert desk.store.move(job, Status.KILLED, "asked for")
    assert count.moves.values["example", "Killed"] == moved["example", "Killed"] + 1


@BOUNDED
@given(st.lists(st.tuples(st.text(max_size=20), st.floats(allow_nan=False)), max_size=5, unique_by=lambda pair: pair[0]))
def test_any_label_can_be_read_again(pairs: list[tuple[str, float]]) -> None:
    """Also quotes, backslashes, line ends, and whatever Unicode has."""
    pairs = [(text.encode("utf-8", "replace").decode(), number) for text, number in pairs]
    family = Family("x", "gauge", "what it means", ("name",))
    for text, number in pairs:
        family.set(text, value=number)
    said = "".join(f"{line}\n" for line in family.lines())
    assert parsed(said).get("joborch_x", {}) == {(("name", text),): number for text, number in dict(pairs).items()}


def test_buckets_hold_all_smaller_ones() -> None:
    times = Histogram("t", "a time", ("service",), (0.1, 1, 10))
    for seconds in (-1.0, 0.1, 0.5, 10.0, 99.0):
        times.observe(("a",), seconds)
    found = parsed("".join(f"{line}\n" for line in times.lines()))
    assert [found["joborch_t_bucket"][("le", bound), ("service", "a")] for bound in ("0.1", "1", "10", "+Inf")] == [2, 3, 4, 5]
    assert (value(found, "t_count"), value(found, "t_sum")) == (5, pytest.approx(109.6))


# == Prometheus itself ==


def command(name: str) -> str:
    """A program of Debian's package `prometheus`."""
    path = shutil.which(name)
    if path is None:
        assert os.environ.get("CI") != "true", f"{name} is missing: install Debian's package prometheus"
        pytest.skip(f"{name} is missing: install Debian's package prometheus")
    return path


def test_promtool_finds_nothing(pair: Pair) -> None:
    """In the metrics of both, and in the rules."""
    run_to_end(pair.server, "exit 3")
    for process in (pair.server, pair.client):
        token = {"Authorization": f"Bearer {process.settings.get('JOBORCH_TOKEN')}"}
        text = process.get("/metrics", headers=token if process is pair.client else {}).content
        done = subprocess.run([command("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, b""), done
    subprocess.run([command("promtool"), "check", "rules", str(ROOT / "deploy" / "prometheus-rules.yml")], check=True)
    subprocess.run([command("promtool"), "check", "config", "--syntax-only", str(ROOT / "deploy" / "prometheus.yml")], check=True)


def test_every_kind_of_problem_has_an_alert_and_a_row_in_the_documents() -> None:
    """Also one that is new: the alert for the rest names what it leaves to others."""
    kinds = set(re.findall(r'Problem\(\s*"(\w+)"', (ROOT / "joborch_plugins" / "health.py").read_text()))
    assert {"client_gone", "webhooks", "cloud", "settings", "service_stopped"} <= kinds
    assert kinds == set(re.findall(r"^\| `(\w+)` \| [A-Z`]", (ROOT / "docs" / "operate.md").read_text(), re.MULTILINE))
    chosen = re.findall(r'joborch_problem{kind(=|=~|!~)"([^"]+)"}', (ROOT / "deploy" / "prometheus-rules.yml").read_text())
    named = [name for how, names in chosen if how != "!~" for name in names.split("|")]
    assert [sorted(names.split("|")) for how, names in chosen if how == "!~"] == [sorted(named)], "each kind has exactly one alert"
    assert set(named) <= kinds


class Prometheus:
    """A real Prometheus that scrapes one server each second, with the rules of deploy/ and no patience."""

    def __init__(self, folder: Path, target: Process) -> None:
        folder.mkdir()
        rules = (ROOT / "deploy" / "prometheus-rules.yml").read_text()
        self.alerts = set(re.findall(r"alert: (\w+)", rules))
        (folder / "rules.yml").write_text(re.sub(r"for: \w+", "for: 0s", rules))
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [{"job_name": "joborch", "scrape_timeout": "1s", "static_configs": [{"targets": [target.url[7:]]}]}],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self.url = f"http://127.0.0.1:{free_port()}"
        words = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={self.url[7:]}"]
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen([command("prometheus"), *words], stdout=self.log, stderr=self.log)
        wait_for(self.is_ready, PATIENCE_S, "Prometheus")

    def is_ready(self) -> bool:
        """Whether it answers."""
        assert self.process.poll() is None, "Prometheus ended"
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{self.url}/-/ready", timeout=10).ok
        return False

    def ask(self, path: str, **parameters: str) -> Any:
        """What its API answers."""
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        return {alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing"}

    def fires(self, *names: str) -> None:
        """Wait until these alerts fire."""
        assert self.alerts >= set(names)
        wait_for(lambda: self.firing() >= set(names), PATIENCE_S, f"{names} firing")

    def is_calm(self) -> None:
        """Wait until no alert fires, and the server is scraped."""
        wait_for(lambda: self.ask("query", query="up == 1")["result"] and not self.firing(), PATIENCE_S, "no alert")

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(PATIENCE_S)
        self.log.close()


@pytest.fixture
def disk(root: None, tmp_path: Path) -> Iterator[Disk]:
    """A small disk."""
    made = Disk(tmp_path / "disk", "size=48m")
    yield made
    made.close()


def let_first_job_have_waited(server: Process, seconds: float) -> None:
    """Stop a server, and let its queued jobs have arrived earlier than they did."""
    server.stop()
    with closing(sqlite3.connect(server.data / "joborch.db")) as db:
        db.execute("UPDATE jobs SET arrived_at = arrived_at - ? WHERE status = 'Queued'", (seconds,))
        db.commit()
    server.start()


def queries_of(dashboard: Path) -> list[str]:
    """Every query of a dashboard, with a short time for rates."""
    panels = json.loads(dashboard.read_text())["panels"]
    return [target["expr"].replace("$__rate_interval", "1m") for panel in panels for target in panel["targets"]]


def test_alerts_and_dashboard_in_a_real_prometheus(disk: Disk, make_pair: MakePair, tmp_path: Path) -> None:
    """Each of the six alerts fires when its fault is made, and is over after it; each query of the dashboard finds something."""
    pair = make_pair(server={"DATA_PATH": str(disk.path / "data"), "JOBORCH_MIN_FREE": "4M", "SERVICE_EXAMPLE_MAX_RUNS": "1"})
    server, client = pair.server, pair.client
    server.data = disk.path / "data"
    pair.start()
    watch = Prometheus(tmp_path / "prometheus", server)
    try:
        watch.is_calm()
        for script in ("true", "exit 3", "echo yes"):
            run_to_end(server, script)
        queries = queries_of(ROOT / "deploy" / "grafana.json")
        assert len(queries) > 20
        wait_for(
            lambda: not [query for query in queries if not watch.ask("query", query=query)["result"]], PATIENCE_S, "data for each query"
        )

        disk.fill(256)
        watch.fires("JoborchUploadsRefused")
        disk.free()
        watch.is_calm()

        with closing(sqlite3.connect(server.data / "joborch.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            watch.fires("JoborchDatabase")
            other.execute("ROLLBACK")
        watch.is_calm()

        client.settings["JOBORCH_TOKEN"] = "another-token-for-tests-only"
        client.restart()
        watch.fires("JoborchServiceStopped", "JoborchNeedsCare")
        client.settings["JOBORCH_TOKEN"] = Pair.TOKEN
        client.restart()
        watch.is_calm()

        first, second = submit(server, "sleep 600"), submit(server, "sleep 600")
        wait_status(server, first, "Running", limit_s=PATIENCE_S)
        let_first_job_have_waited(server, 7200)
        watch.fires("JoborchJobsWait")
        for number in (second, first):
            server.post(f"/terminate/{number}")
        watch.is_calm()

        server.stop()
        watch.fires("JoborchDown")
        server.start()
        watch.is_calm()
    finally:
        watch.close()
