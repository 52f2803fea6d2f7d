"""`joborch demo --cloud`: a pool of processes grows and shrinks, on a terminal and on the web page; the page's section of clouds."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from harness import ROOT, alive, processes_below, wait_for
from world import gated

from joborch_base.settings import Cloud
from joborch_plugins import admin, page
from joborch_plugins.cloud_demo import LocalCloud
from joborch_plugins.cloud_providers import SCRIPT

LIMIT_S = 120.0
PATIENCE_MS = 120_000


class SmallDemo(admin.CloudDemo):
    """A demo that is over soon."""

    jobs, job_s, limit_s = 5, 1, LIMIT_S
    cloud: ClassVar[Mapping[str, str]] = {**admin.CloudDemo.cloud, "MAX": "2", "IDLE": "3"}


@pytest.fixture(name="demo")
def demo_fixture(pyz: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SmallDemo]:
    """The demo, not started."""
    monkeypatch.setattr("sys.argv", [str(pyz)])
    made = SmallDemo(tmp_path)
    yield made
    made.stop()
    wait_for(lambda: not processes_below(tmp_path), LIMIT_S, "the end of all processes of the demo")


def test_a_pool_grows_and_shrinks(demo: SmallDemo, capsys: pytest.CaptureFixture[str]) -> None:
    demo.run()
    said = capsys.readouterr().out
    assert re.search(r" 5 wait +0 run +(no instance|\[..\])", said), said
    assert "[##]" in said or "[# ]" in said
    assert said.splitlines()[-1].partition("cost")[0].split()[2:] == ["0", "wait", "0", "run", "no", "instance"]
    assert not list((demo.folder / "server" / "instances").iterdir())


def test_the_page_shows_instances_as_they_come_and_go(
    demo: SmallDemo, browser: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a click: they appear, run jobs and end. Axe finds nothing meanwhile, and a phone need not scroll sideways."""
    monkeypatch.setattr(demo, "script", lambda: gated(tmp_path / "open"))
    demo.start("server")
    demo.wait_ready("server")
    troubles: list[str] = []
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    shown = context.new_page()
    shown.set_default_timeout(PATIENCE_MS)
    shown.on("pageerror", lambda error: troubles.append(str(error)))
    shown.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    shown.goto(f"{demo.base}/dashboard")
    clouds = shown.locator("#clouds")
    clouds.get_by_text("0 of at most 2 instances").wait_for()
    demo.send_jobs()
    clouds.locator(".instance.joined svg.slots").first.wait_for()
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    for width in (360, 1280):
        shown.set_viewport_size({"width": width, "height": 740})
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        shown.evaluate(f"{axe}; void 0")
        found = shown.evaluate("axe.run('#clouds', {resultTypes: ['violations']})")["violations"]
        assert not [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found], width
    (tmp_path / "open").touch()
    clouds.locator(".instance.ended").first.wait_for()
    clouds.get_by_text("0 of at most 2 instances").wait_for()
    context.close()
    assert not troubles


# == The stand-in ==


def stand_in(folder: Path, slots: int = 0) -> LocalCloud:
    """A cloud of processes in a folder."""
    config: Any = SimpleNamespace(data_path=folder)
    return LocalCloud(Cloud("demo", slots=slots), config)


def test_an_instance_is_a_process_until_it_is_destroyed(tmp_path: Path) -> None:
    cloud = stand_in(tmp_path, slots=3)
    assert (cloud.size(), cloud.nodes()) == ((3, None), [])
    made = cloud.create("joborch-a", "uuid-1", "server-1", "echo $$ >pid; echo poweroff; echo said; exec sleep 600")
    (node,) = cloud.nodes()
    assert (node.id, node.state, node.client, node.server) == (made, "running", "uuid-1", "server-1")
    wait_for(lambda: cloud.console(node) == ":\nsaid\n", LIMIT_S, "its output; it cannot switch this machine off")
    pid = int((tmp_path / "instances/joborch-a/pid").read_text())
    assert alive(pid)
    cloud.destroy(node)
    assert cloud.nodes() == [] and not list((tmp_path / "instances").iterdir())
    wait_for(lambda: not alive(pid), LIMIT_S, "its end")


def test_an_instance_that_ends_by_itself_has_stopped(tmp_path: Path) -> None:
    cloud = stand_in(tmp_path)
    cloud.create("joborch-a", "uuid-1", "server-1", "exit 0")
    wait_for(lambda: cloud.nodes()[0].state == "stopped", LIMIT_S, "its end")
    cloud.destroy(cloud.nodes()[0])
    assert cloud.nodes() == []


def test_instances_end_with_their_server(tmp_path: Path) -> None:
    """Also if that is killed."""
    code = (
        "import os, sys, time; from pathlib import Path; from types import SimpleNamespace; from joborch_base.settings import Cloud;"
        "from joborch_plugins.cloud_demo import LocalCloud; folder = Path(sys.argv[1]);"
        "LocalCloud(Cloud('demo'), SimpleNamespace(data_path=folder)).create('a', 'u', 's', 'echo $$ >pid; exec sleep 600');"
        "time.sleep(600)"
    )
    server = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    path = tmp_path / "instances/a/pid"
    wait_for(lambda: path.exists() and path.read_text().strip(), LIMIT_S, "the instance")
    server.kill()
    server.wait()
    wait_for(lambda: not alive(int(path.read_text())), LIMIT_S, "the end of the instance")


@pytest.mark.parametrize(("parent", "is_off"), [("/usr/bin/cloud-init", True), ("nova-compute", False), ("bash", False)])
def test_only_an_instance_switches_itself_off(parent: str, is_off: bool, tmp_path: Path) -> None:
    """The end of the user data, with a systemd that only says so; cloud-init would be its parent."""
    off = re.search(r"^off\(\) .*?^}}\n", SCRIPT, re.MULTILINE | re.DOTALL)
    assert off
    text = off[0].replace("{{", "{").replace("}}", "}").replace("/run/systemd/system", str(tmp_path))
    (tmp_path / "user-data").write_text(f"systemctl() {{ echo switched off; }}\n{text}off 3\n")
    done = subprocess.run(["sh", "-c", 'sh "$1"; exit $?', parent, str(tmp_path / "user-data")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "switched off\n" if is_off else ""), done.stderr


# == The section of clouds ==

NOW = 1_800_000_000.0
MADE = {
    "uuid": "u", "name": "lab-1", "state": "joined", "node": "i-1", "jobs": 1, "made_at": "2027-01-15T07:59:00.000Z",
    "joined_at": "2027-01-15T07:59:30.000Z", "ended_at": None, "cost": 0.5, "reason": "", "console": None,
}  # fmt: skip
LAB = {
    "name": "lab", "slots": 2, "max": 3, "daily_budget": 5.0, "spent_today": 1.25, "spent": 40.0, "held": None, "instances": [MADE],
    "by_service": [], "unassigned_today": 0.0, "unassigned": 0.0,
}  # fmt: skip
NOBODY: dict[str, Any] = {"by_user": [], "other_users": None, "ended": [], "stopped": None}


def clouds_of(*instances: dict[str, Any], ended: tuple[dict[str, Any], ...] = (), **changes: Any) -> str:
    """The section for one cloud."""
    lab = {**LAB, "instances": list(instances), **changes}
    plan = {"create": {}, "drain": [], "reasons": ["because"]}
    return str(page.clouds_section({**NOBODY, "clouds": [lab], "ended": list(ended), "plan": plan}, NOW) or "")


def test_what_an_instance_does_costs_and_has_done() -> None:
    shown = clouds_of(MADE)
    assert "1 of at most 3 instances; cost today 1.25 of 5.00, in all 40.00" in shown
    assert "runs 1 job" in shown and 'aria-label="1 of 2 in use"' in shown and "because" in shown
    bars = re.findall(r'<rect x="([\d.]+)" y="0" width="([\d.]+)"', shown)
    assert bars == [("0.0", "500.0"), ("500.0", "500.0")], "half of its life it booted"


@pytest.mark.parametrize(
    ("state", "said"),
    [("intended", "is asked for"), ("booting", "boots"), ("draining", "gets no more jobs"), ("ending", "is being ended")],
)
def test_each_state_has_words_and_a_style(state: str, said: str) -> None:
    shown = clouds_of({**MADE, "state": state, "joined_at": None, "jobs": 0})
    assert said in shown and f'class="instance {state}"' in shown and 'class="lived"' not in shown
    assert f".{state}" in (ROOT / "joborch_plugins/page/page.css").read_text()


def test_one_that_has_ended_is_shown_for_a_minute() -> None:
    ended = {**MADE, "state": "ended", "ended_at": "2027-01-15T07:59:40.000Z", "reason": "<b>it was idle</b>"}
    shown = clouds_of(ended=(ended,))
    assert "has ended: " in shown and "&lt;b&gt;it was idle" in shown
    assert "has ended" not in clouds_of(ended=({**ended, "ended_at": "2027-01-15T07:58:40.000Z"},))
    assert "has ended" not in clouds_of(ended=({**ended, "name": "other-1"},))


def test_a_thousand_instances_are_counted_not_drawn() -> None:
    shown = clouds_of(*({**MADE, "uuid": str(number)} for number in range(1000)), max=2000, held="the quota <is> reached")
    assert shown.count("data-key") == page.INSTANCES_DRAWN and "940 more instances" in shown and "the quota &lt;is&gt; reached" in shown


def test_there_is_no_section_without_clouds() -> None:
    assert page.clouds_section({**NOBODY, "clouds": [], "plan": {"reasons": []}}, NOW) is None


def test_costs_are_listed_by_service_and_user() -> None:
    by_service = [{"service": "docking", "spent_today": 1.0, "spent": 30.0}, {"service": "new", "spent_today": 0.0, "spent": 0.0}]
    lab = {**LAB, "by_service": by_service, "unassigned_today": 0.25, "unassigned": 10.0}
    users = {"by_user": [{"user_id": 7, "spent_today": 1.0, "spent": 22.0}], "other_users": {"users": 2, "spent_today": 0.0, "spent": 8.0}}
    shown = str(page.clouds_section({**NOBODY, **users, "clouds": [lab], "plan": {"reasons": []}}, NOW))
    cells = re.findall(r"<td[^>]*><div>([^<]*)", shown)
    assert cells == [
        *("lab", "docking", "1.00", "30.00", "lab", "boots and idle slots", "0.2500", "10.00"),
        *("", "user 7", "1.00", "22.00", "", "2 other users", "0.00", "8.00"),
    ]
    assert "Costs" not in clouds_of(MADE), "nothing to tell yet"
