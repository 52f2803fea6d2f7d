"""Clouds: jobs wait, instances appear, join, run them, and are ended; against a real OpenStack and an EC2 endpoint."""

from __future__ import annotations

import email
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from cloudbed import CloudBed, Ec2, OddCloud, OpenStack, processes_of
from conftest import MakeProcess
from harness import JoinedClient, Process, problems, program_text, replace, submit, wait_for, wait_status
from libcloud.common.exceptions import BaseHTTPError
from proxy import Fault, Proxy
from world import Desk, ask, command

from joborch import Caller, ConfigError, DataFolder, Job, Status, link_key, load_config, mask, new_token, statements, waiting_texts
from joborch_base.weak_setups import weak_setups
from joborch_plugins.cloud_providers import CloudError, LibcloudProvider, guarded, user_data
from joborch_plugins.joined import JoinedLink, Poll

LIMIT_S = 90.0  # machines are slow now and then
pytestmark = pytest.mark.timeout(400)  # a start of OpenStack takes 15 s, and minutes beside other work


@pytest.fixture(scope="module")
def openstack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenStack]:
    """An OpenStack for all tests; each leaves it empty."""
    bed = OpenStack(tmp_path_factory.mktemp("openstack"))
    yield bed
    bed.stop()


@pytest.fixture(scope="module")
def ec2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ec2]:
    """An EC2 endpoint for all tests; each leaves it empty."""
    bed = Ec2(tmp_path_factory.mktemp("ec2"))
    yield bed
    bed.stop()


MakeServer = Callable[..., Process]


@pytest.fixture
def make_server(tmp_path: Path, pyz: Path) -> Iterator[MakeServer]:
    """Makes servers (not started) with a cloud `lab` that serves `example`, which has no other clients."""
    made: list[tuple[Process, CloudBed]] = []

    def make(bed: CloudBed, **settings: str | None) -> Process:
        folder = tmp_path / f"server{len(made)}"
        server = Process("server", folder, program=[sys.executable, str(pyz)])
        limits = {"SERVICE_EXAMPLE_RUNS_PER_USER": "50", "SERVICE_EXAMPLE_MAX_RUNS": "100"}
        cloud = {"CLOUD_LAB_MAX": "3", "CLOUD_LAB_SLOTS": "2", "CLOUD_LAB_IDLE": "1", "JOBORCH_SCALE_INTERVAL": "0.5"}
        server.settings.update({**limits, **bed.settings(folder), **cloud, "JOBORCH_PUBLIC_URL": server.url, **settings})
        made.append((server, bed))
        return server

    yield make
    for server, bed in made:
        server.close()
        bed.resume()
        empty(bed)


def empty(bed: CloudBed) -> None:
    """End all instances of a cloud, as its owner could."""
    provider = bed.provider()
    for node in provider.nodes():
        if node.state != "gone":
            provider.destroy(node)
    wait_for(lambda: not bed.instances(), LIMIT_S, "an empty cloud")


def lab(server: Process) -> dict[str, Any]:
    """What GET /clouds says of the cloud."""
    (cloud,) = server.get("/clouds").json()["clouds"]
    return dict(cloud)


def all_gone(server: Process, bed: CloudBed) -> bool:
    """Whether neither the server nor the cloud knows an instance any more."""
    return not lab(server)["instances"] and not bed.instances()


@pytest.mark.parametrize("kind", ["openstack", "ec2"])
def test_the_whole_way(kind: str, request: pytest.FixtureRequest, make_server: MakeServer) -> None:
    """Jobs without a client: instances appear, join, run all of them, drain, and vanish, with all that they started."""
    bed: CloudBed = request.getfixturevalue(kind)
    server = make_server(bed, CLOUD_LAB_HOURLY_COST="3600").start()
    assert server.health()["problems"] == []
    numbers = [submit(server, "sleep 0.2; echo $HOSTNAME > out", user_id=number % 3) for number in range(10)]
    jobs = [wait_status(server, number, "Completed", limit_s=LIMIT_S) for number in numbers]
    assert {len(job["attempts"]) for job in jobs} == {1}
    wait_for(lambda: all_gone(server, bed), LIMIT_S, "the end of all instances")
    wait_for(lambda: not [*processes_of(bed)], LIMIT_S, "the end of their processes")
    ended = server.get("/clouds").json()["ended"]
    assert 1 <= len(ended) <= 3, ended
    assert {each["name"] for each in ended} >= {job["client"] for job in jobs}
    assert all(each["joined_at"] and each["ended_at"] for each in ended), ended
    assert server.get("/tokens").json()["tokens"] == [], "each token went with its instance"
    lines = command(server, "clouds", "--server", server.url).stdout.splitlines()
    assert {"lab: example", "lab: boots and idle slots", "user 0", "user 1", "user 2"} <= {line.split("\t")[0] for line in lines}, lines


CRASHES = [
    *("cloud.intended", "cloud.asked", "cloud.created", "cloud.bound", "cloud.renewed", "cloud.joined"),
    *("cloud.drained", "cloud.ending", "cloud.destroyed", "cloud.gone"),
]


def database(server: Process, sql: str) -> list[Any]:
    """What a statement finds or changes in the database of a server that does not run."""
    with closing(sqlite3.connect(server.data / "joborch.db")) as db, db:
        return db.execute(sql).fetchall()


def assert_accounted(server: Process, ec2: Ec2, before: set[str]) -> None:
    """Each instance that the cloud has made meanwhile belongs to one row, and the costs add up within the budget."""
    made = [node for node in ec2.driver().list_nodes() if node.id not in before]
    rows = dict(database(server, "SELECT node, cost FROM instances WHERE node IS NOT NULL"))
    assert len(made) == len(rows) and {node.id for node in made} == rows.keys()
    cloud = lab(server)
    assert cloud["spent"] == pytest.approx(sum(rows.values()), abs=0.001) and 0 < cloud["spent"] <= 5
    assert cloud["spent"] == pytest.approx(cloud["unassigned"] + sum(each["spent"] for each in cloud["by_service"]), abs=0.001)
    assert database(server, "SELECT uuid FROM instances WHERE state <> 'ended'") == []
    assert server.get("/tokens").json()["tokens"] == []


PRICED = {"CLOUD_LAB_HOURLY_COST": "36", "CLOUD_LAB_DAILY_BUDGET": "5"}


def test_a_server_that_is_killed_at_every_point(ec2: Ec2, make_server: MakeServer) -> None:
    """Of create, join, drain and destroy: no instance without a row, no row without an instance, and no job is lost."""
    assert {*CRASHES} == set(re.findall(r'crash_point\("(cloud[\w.]+)"\)', program_text()))
    before = {node.id for node in ec2.driver().list_nodes()}
    server = make_server(ec2, CLOUD_LAB_MAX="0", **PRICED).start()
    numbers = [submit(server, "sleep 0.2") for _ in range(3)]
    server.kill()
    server.settings["CLOUD_LAB_MAX"] = "2"
    left = [*CRASHES]

    def look() -> bool:
        """Start it again where it has died, to die at the next point; whether all is over."""
        assert server.process is not None
        if server.process.poll() is not None:
            assert server.process.returncode == -signal.SIGKILL, server.log[-3000:]
            database(server, "UPDATE instances SET asked_at = asked_at - 60 WHERE node IS NULL")  # it is looked for no longer
            server.settings["JOBORCH_TEST_CRASH"] = left.pop(0) if left else "none"
            server.spawn()
        with suppress(requests.RequestException):
            done = all(server.job(number)["status"] == "Completed" for number in numbers)
            return done and not left and all_gone(server, ec2) and bool(server.get("/clouds").json()["ended"])
        return False

    wait_for(look, 3 * LIMIT_S, f"the end of all jobs and instances; points that were not reached: {left}")
    assert [len(server.job(number)["attempts"]) for number in numbers] == [1, 1, 1]
    assert_accounted(server, ec2, before)


def test_a_server_that_is_killed_before_the_answer(ec2: Ec2, make_server: MakeServer) -> None:
    """The cloud has made the instance, and nobody heard: the next start finds it, and no second one is made."""
    before = {node.id for node in ec2.driver().list_nodes()}
    server = make_server(ec2, **PRICED)
    path = Path(str(server.settings["CLOUD_LAB_CREDENTIALS"]))
    with Proxy(ec2.port) as proxy:
        path.write_text(json.dumps({**json.loads(path.read_text()), "port": proxy.port}))
        proxy.plant(Fault("stall", ".*RunInstances", seconds=600))
        number = submit(server.start(), "sleep 0.2")
        wait_for(lambda: proxy.counts()["stall"], LIMIT_S, "the answer that does not come")
        server.kill()
        assert database(server, "SELECT state, node, asked_at > 0 FROM instances") == [("intended", None, 1)]
        assert len(ec2.instances()) == 1
        server.start()
        assert len(wait_status(server, number, "Completed", limit_s=LIMIT_S)["attempts"]) == 1
        wait_for(lambda: all_gone(server, ec2), LIMIT_S, "the end of the instance")
    assert len(database(server, "SELECT uuid FROM instances")) == 1
    assert_accounted(server, ec2, before)


def test_credentials_that_do_not_work_and_instances_of_others(ec2: Ec2, make_server: MakeServer) -> None:
    """Jobs wait and say why, and go on with the right credentials; an orphan is ended, and what is not ours stays."""
    server = make_server(ec2, JOBORCH_ORPHAN_GRACE="1")
    path = Path(str(server.settings["CLOUD_LAB_CREDENTIALS"]))
    right = path.read_text()
    path.write_text(json.dumps({**json.loads(right), "secret": "wrong"}))
    server.start()
    number = submit(server, "true")
    wait_for(lambda: "refuses the credentials" in server.job(number)["message"], LIMIT_S, "the reason why it waits")
    assert problems(server, "cloud")
    assert "wrong" not in server.log
    path.write_text(right)
    wait_status(server, number, "Completed", limit_s=LIMIT_S)
    wait_for(lambda: not problems(server, "cloud"), LIMIT_S, "the end of the problem")
    provider = ec2.provider()
    provider.create("orphan", "11111111-1111-1111-1111-111111111111", server_tag(server), "")
    stranger = provider.create("stranger", "22222222-2222-2222-2222-222222222222", "another-server", "")
    wait_for(lambda: [each["id"] for each in ec2.instances()] == [stranger], LIMIT_S, "the end of the orphan")
    assert "instance orphan" in server.log


def server_tag(server: Process) -> str:
    """What the server writes into the tag of its instances."""
    with closing(sqlite3.connect(server.data / "joborch.db")) as db:
        return str(db.execute("SELECT instance FROM heartbeat").fetchone()[0])


# == A real cloud in trouble ==  With ticks that the test calls, so that nobody waits for a time-out or the end of a pause.


class RealRoom:
    """A server whose ticks a test calls, with jobs that wait for instances of a real cloud, one for each slot."""

    def __init__(self, bed: CloudBed, data: DataFolder, jobs: int, **settings: str | None) -> None:
        own = {name: str(value) for name, value in bed.settings(data.path, SLOTS="1", BOOT_LIMIT="100h", **settings).items()}
        limits = {"SERVICE_EXAMPLE_RUNS_PER_USER": "50", "SERVICE_EXAMPLE_MAX_RUNS": "50"}
        self.bed, self.credentials = bed, Path(own["CLOUD_LAB_CREDENTIALS"])
        self.desk = Desk(data, "", JOBORCH_PUBLIC_URL="http://127.0.0.1:1", **own, **limits)
        self.clouds = self.desk.server.plugins["clouds"]
        self.clouds.program = (b"", "0" * 64)
        self.desk.server.loops["cloud lab"] = self.clouds.loop_of("cloud lab", "lab")  # not started
        self.jobs = [self.desk.upload(user_id=number) for number in range(jobs)]
        self.clouds.tick()

    def tick(self) -> None:
        """Let a minute pass: pauses are over then."""
        self.desk.clock.pass_s(61)
        self.clouds.cloud_tick("lab")
        self.clouds.tick()
        self.clouds.cloud_tick("lab")
        self.clouds.tick()

    @property
    def provider(self) -> Any:
        return self.clouds.sites["lab"].provider

    def patience(self, seconds: float) -> None:
        """How long a call waits for an answer from now on."""
        self.provider.made.connection.timeout = self.provider.made.connection.connection.session.timeout = seconds

    def assert_said(self, text: str) -> None:
        """The reason is shown on jobs, in /clouds and in /health, and all jobs wait."""
        shown = waiting_texts(self.desk.server, [self.desk[job] for job in self.jobs])
        assert all(text in str(each) for each in shown), "\n".join(map(str, shown))
        assert text in ask(self.desk.server, "GET", "/clouds").json["clouds"][0]["held"]
        assert text in str(self.desk.server.plugins["health"].report())
        assert {self.desk[job].status for job in self.jobs} == {Status.QUEUED}

    def assert_each_once(self, count: int) -> None:
        """The cloud has so many instances, each that of one row."""
        made = sorted(each["tags"]["joborch-client"] for each in self.bed.instances())
        assert made == sorted(row.uuid for row in self.clouds.rows()) and len(made) == count

    def states(self) -> list[str]:
        return sorted(row.state for row in self.clouds.rows())

    def close(self) -> None:
        self.bed.resume()
        ask(self.desk.server, "POST", "/clouds/end-all")
        wait_for(lambda: self.tick() or not (self.clouds.rows() or self.bed.instances()), LIMIT_S, "the end of all instances")
        self.desk.store.close()


def test_a_quota_and_a_revoked_credential_in_the_middle_of_growing(openstack: OpenStack, data: DataFolder) -> None:
    """Nova's own quota of two: the third is refused. Then the credential ends. Nothing is lost, and with both mended it goes on."""
    credentials = openstack.new_credentials("to-be-revoked")
    room = RealRoom(openstack, data, jobs=3, MAX="3")
    room.credentials.write_text(json.dumps(credentials))
    openstack.quota(2)
    try:
        wait_for(lambda: room.tick() or len(room.clouds.rows()) == 2, LIMIT_S, "two instances")
        room.tick()
        room.assert_said("the quota of the cloud is reached: 403 Forbidden Quota exceeded for instances")
        room.assert_each_once(2)
        openstack.revoke(credentials)
        room.provider.made = None  # as when its token has ended, in an hour or so
        room.tick()
        room.assert_said("the cloud refuses the credentials")
        assert (room.states(), credentials["credential_secret"] in str(room.clouds.sites["lab"].held())) == (["booting"] * 2, False)
    finally:
        openstack.quota(10)
        room.credentials.write_text(json.dumps(openstack.credentials()))
    wait_for(lambda: room.tick() or room.states() == ["booting"] * 3, LIMIT_S, "the third instance")
    assert room.clouds.sites["lab"].held() == ""
    room.assert_each_once(3)
    room.close()


def test_a_cloud_that_hangs_in_the_middle_of_growing(openstack: OpenStack, data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nova stands still after the first of two creates: the second hangs, and then the list. It is made late, or anew, but not twice."""
    room = RealRoom(openstack, data, jobs=2, MAX="3")

    def stop(name: str) -> None:
        if name == "cloud.created" and len(room.states()) == 2:
            os.kill(int((openstack.folder / "run/0-compute.pid").read_text()), signal.SIGSTOP)
            room.patience(1)

    replace(monkeypatch, "crash_point", stop)
    room.tick()
    assert room.states() == ["booting", "intended"]
    room.assert_said("the cloud cannot be reached or answers badly")
    room.tick()
    assert room.states() == ["booting", "intended"]
    room.assert_said("the cloud cannot be reached or answers badly")
    monkeypatch.undo()
    openstack.resume()
    room.patience(LIMIT_S)
    wait_for(lambda: room.tick() or room.states() == ["booting"] * 2 == len(openstack.instances()) * ["booting"], LIMIT_S, "both instances")
    room.assert_each_once(2)
    room.close()


@pytest.mark.parametrize(
    ("kind", "setting", "said"),
    [
        ("openstack", "IMAGE=nope", "the cloud has no image 'nope': it has fakeimage123456"),
        ("openstack", "SIZE=nope", "the cloud has no size 'nope': it has m1.large"),
        ("openstack", "NETWORK=nope", "the cloud has no network 'nope': it has private"),
        ("openstack", "KEY=nope", "the cloud refuses: 400 Bad Request Invalid key_name provided"),
        ("ec2", "IMAGE=ami-nope", "the cloud refuses: InvalidAMIID.NotFound"),
        ("ec2", "SIZE=t3.nope", "the cloud has no size 't3.nope': it has a1.2xlarge"),
        ("ec2", "NETWORK=nope", "the cloud refuses: InvalidSubnetID.NotFound: The subnet ID 'nope' does not exist"),
        ("ec2", "SECURITY_GROUP=nope", "the cloud has no security group 'nope': it has default"),
        ("ec2", "SECURITY_GROUP=default,nope", "the cloud has no security group 'nope': it has default"),
    ],
)
def test_a_name_that_a_cloud_does_not_have(kind: str, setting: str, said: str, request: pytest.FixtureRequest, data: DataFolder) -> None:
    """One clear line, and no instance."""
    refused(request.getfixturevalue(kind), data, setting, said)


def test_a_name_that_a_cloud_has_twice(openstack: OpenStack, data: DataFolder) -> None:
    """The line has ids to choose from, sorted, as many as it has room for."""
    ids = sorted(image.id for image in openstack.driver().list_images() if image.name == "fakeimage123456")
    said = f"the cloud has {len(ids)} images called 'fakeimage123456': give the id of one: {', '.join(ids[:5])}, "
    refused(openstack, data, "IMAGE=fakeimage123456", said)


def refused(bed: CloudBed, data: DataFolder, setting: str, said: str) -> None:
    """With this setting, the reason is `said`, and the cloud makes no instance."""
    room = RealRoom(bed, data, 1, **dict([setting.split("=")]))
    room.tick()
    room.assert_said(said)
    room.assert_each_once(0)
    room.desk.store.close()


def test_a_security_group_that_an_openstack_does_not_have(openstack: OpenStack, data: DataFolder) -> None:
    """Nova lists none here, and answers 500: it is not known whether it made the instance, but the reason is clear."""
    room = RealRoom(openstack, data, 1, SECURITY_GROUP="default,nope")
    room.tick()
    room.assert_said("does the cloud have the security groups default, nope? This credential cannot list them; the cloud")
    assert (room.states(), openstack.instances()) == (["intended"], [])
    room.desk.store.close()


@pytest.mark.parametrize("kind", ["openstack", "ec2"])
def test_a_network_a_group_and_a_key_that_are_there(kind: str, request: pytest.FixtureRequest, data: DataFolder) -> None:
    bed: CloudBed = request.getfixturevalue(kind)
    driver = bed.driver()
    key = driver.create_key_pair("joborch").name
    own = {"SECURITY_GROUP": "default", "NETWORK": "private"} if kind == "openstack" else {"NETWORK": driver.ex_list_subnets()[0].id}
    room = RealRoom(bed, data, 1, KEY=key, **own)
    room.tick()
    assert (room.states(), room.clouds.sites["lab"].held()) == (["booting"], "")
    (node,) = [node for node in driver.list_nodes() if str(node.state) not in ("terminated", "unknown")]
    assert node.extra["key_name"] == key
    driver.delete_key_pair(driver.get_key_pair("joborch"))
    room.close()


# == What a cloud may do ==  Ticks, a clock in the hand, and a cloud that behaves badly.

UNKNOWN, NO_MORE = CloudError("unknown", "read timed out"), CloudError("quota", "Quota exceeded for instances")
TICK_S = 10.0


class Room:
    """A server with one cloud, whose ticks a test calls."""

    def __init__(self, data: DataFolder, **settings: str) -> None:
        cloud = {"PROVIDER": "cloudbed:OddCloud", "MAX": "2", "IDLE": "100", "BOOT_LIMIT": "900", "HOURLY_COST": "3600", **settings}
        named = {f"CLOUD_LAB_{name}": value for name, value in cloud.items()}
        self.desk = Desk(data, "", JOBORCH_PUBLIC_URL="http://127.0.0.1:5000", **named)
        self.open()

    def open(self) -> None:
        self.clouds = self.desk.server.plugins["clouds"]
        self.clouds.program = (b"", "0" * 64)
        for name in ("lab", "zoo"):
            self.desk.server.loops[f"cloud {name}"] = self.clouds.loop_of(f"cloud {name}", name)  # not started
        self.clouds.tick()

    def restart(self) -> None:
        """End the server, and start it again; the cloud goes on."""
        cloud = self.cloud
        self.desk.restart()
        self.open()
        self.clouds.sites["lab"].provider = cloud

    @property
    def cloud(self) -> OddCloud:
        found: OddCloud = self.clouds.sites["lab"].provider
        return found

    def tick(self, times: int = 1) -> None:
        """Let the intervals of some looks pass."""
        for _ in range(times):
            self.desk.clock.pass_s(TICK_S)
            self.clouds.cloud_tick("lab")
            self.clouds.tick()
            self.clouds.cloud_tick("lab")

    def states(self) -> list[str]:
        return [row.state for row in self.clouds.rows()]

    def join(self) -> JoinedLink:
        """Let the client of the only instance join, as far as the server sees."""
        (row,) = self.clouds.rows()
        link: JoinedLink = self.desk.server.plugins["joined"].add(row.name, ["example"])
        link.heard()
        return link


@pytest.fixture
def room(data: DataFolder) -> Iterator[Room]:
    """A server with one cloud and a job that waits."""
    made = Room(data)
    made.desk.upload()
    yield made
    made.desk.store.close()


def test_a_create_that_timed_out_is_looked_up(room: Room) -> None:
    """The cloud made it, and nobody heard: it is found by its tag, and no second one is made."""
    room.cloud.fails["created"] = UNKNOWN
    room.tick()
    assert (room.states(), room.cloud.creates) == (["intended"], 1)
    room.cloud.fails.clear()
    room.tick(4)
    assert (room.states(), room.cloud.creates, len(room.cloud.made)) == (["booting"], 1, 1)


def test_an_instance_that_was_never_made_is_given_up(room: Room) -> None:
    room.cloud.fails["create"] = UNKNOWN
    room.tick()
    (row,) = room.clouds.rows()
    room.cloud.fails.clear()
    room.tick(10)
    assert room.clouds.row(row.uuid).state == "ended"
    assert (room.clouds.row(row.uuid).cost, room.clouds.spent_today()["lab"]) == (0, 30), "only the one made in its place costs"
    assert (room.states(), room.cloud.creates) == (["booting"], 2)
    room.cloud.made.append(room.cloud.made[0]._replace(id="late", client=row.uuid))
    room.tick()
    assert [node.id for node in room.cloud.made if node.id == "late"] == [], "one that comes late after all is ended"
    assert room.states() == ["booting"]


def test_a_cloud_that_makes_two_for_one(room: Room) -> None:
    room.cloud.twice = True
    room.tick(2)
    assert (room.states(), len(room.cloud.made)) == (["booting"], 1)
    assert room.clouds.rows()[0].node == room.cloud.made[0].id


@pytest.mark.parametrize("state", ["unknown", "building", "running"])
def test_a_state_that_nobody_knows_counts_as_alive(room: Room, state: str) -> None:
    room.tick()
    room.join()
    room.cloud.set(state=state)
    room.tick(3)
    assert (room.states(), room.cloud.creates) == (["joined"], 1)


def test_orphans_are_ended_and_strangers_are_not(room: Room) -> None:
    """With this server's tag and no row: ended after JOBORCH_ORPHAN_GRACE. All others are somebody's."""
    room.tick()
    (own,) = room.cloud.made
    others = [
        own._replace(id="other-server", client="c2", server="another"),
        own._replace(id="untagged", client="", server=""),
        own._replace(id="a-token-of-its-creation", client="", server="", token="c3"),
    ]
    room.cloud.made += [own._replace(id="orphan", client="c1"), *others]
    room.tick(30)
    assert [node.id for node in room.cloud.made] == [own.id, "orphan", *(node.id for node in others)]
    room.tick(40)
    assert [node.id for node in room.cloud.made] == [own.id, *(node.id for node in others)]


def test_an_error_is_removed_and_said(room: Room) -> None:
    room.tick()
    room.cloud.set(state="error", fault="No valid host was found")
    room.tick(2)
    assert (room.states(), room.cloud.made) == ([], [])
    (ended,) = room.clouds.ended(5)
    assert ended.reason == "the cloud reports an error: No valid host was found"
    assert "No valid host" in room.clouds.sites["lab"].held()
    assert "No valid host" in str(room.desk.server.plugins["health"].report())


def test_a_quota_holds_back_and_says_so(room: Room) -> None:
    room.cloud.fails["create"] = NO_MORE
    room.tick(3)
    assert (room.states(), room.cloud.creates, room.clouds.ended(5)) == ([], 1, [])
    (job,) = room.desk.store.jobs(statements.QUEUED_OF_SERVICE, service="example", before=float("inf"))
    (text,) = waiting_texts(room.desk.server, [job])
    assert text is not None and "lab is held back: Quota exceeded for instances" in text
    room.cloud.fails.clear()
    room.tick(8)
    assert room.states() == ["booting"]
    (text,) = waiting_texts(room.desk.server, [job])
    assert text is not None and "1 instance boots in lab since" in text


def test_one_that_never_joins_leaves_its_console_log(room: Room) -> None:
    """And no secret in it, whatever it printed."""
    room.tick()
    (token,) = {word for word in room.cloud.scripts[0].split() if word.startswith("joborch_")}
    room.desk.clock.pass_s(900)
    room.tick(2)
    assert (room.states(), room.cloud.made) == ([], [])
    (ended,) = room.clouds.ended(5)
    assert ended.reason == "it did not join within 15 min"
    assert "no Python here" in ended.console
    assert token not in ended.console
    assert "did not join" in room.clouds.sites["lab"].held()
    assert not room.desk.server.token_store, "its token is not valid any more"


def test_its_console_log_is_shown_to_operators_alone(room: Room) -> None:
    room.tick()
    room.desk.clock.pass_s(900)
    room.tick(2)
    for role, is_shown in (("operator", True), ("reader", False)):
        (ended,) = ask(room.desk.server, "GET", "/clouds", caller=Caller("somebody", "token", role)).json["ended"]
        assert ended["reason"] == "it did not join within 15 min"
        assert ("no Python here" in str(ended["console"])) is is_shown


def test_user_data_has_no_secret_that_outlives_the_boot(data: DataFolder) -> None:
    """One token, which works once and for BOOT_LIMIT; none of this server's, of its other clients, or of the cloud."""
    credentials = data.path / "credentials"
    credentials.write_text('{"key": "cloud-key", "secret": "cloud-secret"}')
    credentials.chmod(0o600)
    room = Room(data, CREDENTIALS=str(credentials))
    store = room.desk.server.token_store
    other = [store.add(name, role, "", None, None) for name, role in (("gpu", "client"), ("root", "operator"))]
    room.desk.environment["JOBORCH_TOKEN"] = "the-servers-own-token"
    room.desk.upload()
    room.restart()
    room.tick()
    (script,), (row,), store = room.cloud.scripts, room.clouds.rows(), room.desk.server.token_store
    for secret in (*other, "the-servers-own-token", "a-token", "cloud-key", "cloud-secret"):
        assert secret not in script, secret
    (token,) = set(re.findall(r"joborch_[0-9A-Za-z]{20,}", script))
    found = store.find(token)[0]
    assert found is not None and (found.name, found.role, found.once) == (row.name, "client", 1)
    caller = found.caller("link")
    assert ask(room.desk.server, "POST", "/join/calls", caller=caller).status in (404, 405)
    assert ask(room.desk.server, "GET", "/join/calls?session=x", caller=caller).status == 410, "it is good for nothing but its replacement"
    room.desk.clock.pass_s(899)
    assert store.find(token)[0] is not None
    room.desk.clock.pass_s(2)
    assert store.find(token)[0] is None, "an instance that never called leaves nothing behind"
    room.desk.store.close()


def test_an_instance_that_vanishes_loses_no_job(room: Room) -> None:
    room.tick()
    link = room.join()
    room.tick()
    (job,) = room.desk.store.jobs(statements.QUEUED_OF_SERVICE, service="example", before=float("inf"))
    assert room.desk.store.claim(job.id, link.name, 100)
    assert room.desk.store.move(room.desk[job], Status.SUBMITTED, "", dest_id="7")
    room.cloud.made.clear()
    room.tick(2)
    assert (room.desk[job].status, room.desk[job].attempt) == (Status.QUEUED, 2)
    assert f"the instance {link.name} is gone: the cloud does not have it any more" in room.desk.reasons(job)


def queued(room: Room) -> Job:
    """The only job that waits."""
    (job,) = room.desk.store.jobs(statements.QUEUED_OF_SERVICE, service="example", before=float("inf"))
    return job


def test_no_job_waits_for_an_instance_that_has_fallen_silent(room: Room) -> None:
    """The cloud says that it runs, but its client does not answer: its system has crashed. After the time of a boot, another is made."""
    room.tick()
    link = room.join()
    room.tick()
    assert room.states() == ["joined"]
    link.failed("did not answer")
    room.tick(14)
    assert "booting" in room.states()


def test_an_instance_that_has_fallen_silent_is_ended(data: DataFolder) -> None:
    """Also if the minimum of its cloud would keep it."""
    room = Room(data, MIN="1")
    room.tick()
    link = room.join()
    room.tick()
    link.failed("did not answer")
    room.tick(88)
    assert room.states() == ["joined"]
    room.tick(4)
    assert [row.reason for row in room.clouds.ended(5)] == ["its client has not answered for 15 min"]
    assert room.states() == ["booting"]
    room.desk.store.close()


def test_an_instance_that_is_not_heard_after_a_restart_is_ended(room: Room) -> None:
    room.tick()
    name = room.join().name
    room.tick()
    room.restart()
    room.tick(95)
    assert name not in {row.name for row in room.clouds.rows()}


def test_an_instance_whose_client_calls_has_not_vanished(room: Room) -> None:
    """The list may be of another project or region, after a change of settings, or lack a page: its jobs run, and run once."""
    room.tick()
    link = room.join()
    calls, job = link.calls, queued(room)
    calls.begin("start")
    room.tick()
    assert room.desk.store.claim(job.id, link.name, 100)
    assert room.desk.store.move(room.desk[job], Status.SUBMITTED, "", dest_id="7")
    made, room.cloud.made = room.cloud.made, []

    def poll() -> None:
        """Call, and call again when the call is answered."""
        calls.park(0, Poll(SimpleNamespace(closed=False), answered, room.desk.clock.monotonic() + 600))

    def answered() -> None:
        calls.take(0)
        if calls.session:
            room.desk.clock.pass_s(0.1)
            poll()

    poll()
    room.tick(6)
    assert (room.states(), room.desk[job].attempt) == (["joined"], 1)
    assert f"does not list the instance {link.name}, whose client calls" in str(room.desk.server.plugins["health"].report())
    room.cloud.made = made
    room.tick()
    assert "does not list" not in str(room.desk.server.plugins["health"].report())
    room.cloud.made, calls.session = [], ""
    room.tick(3)
    assert (room.desk[job].status, room.desk[job].attempt) == (Status.QUEUED, 2), "a client that does not answer the poll is gone"


def test_an_idle_client_is_asked_whether_it_is_there_before_its_instance_counts_as_vanished(room: Room) -> None:
    room.tick()
    link, served = room.join(), list[int]()
    link.calls.begin("start")
    room.tick()
    link.calls.park(0, Poll(SimpleNamespace(closed=False), lambda: served.append(1), room.desk.clock.monotonic() + 600))
    room.cloud.made = []
    room.tick()
    assert served, "its poll is answered, so that it calls again if it lives"


def test_an_instance_that_is_not_made_yet_keeps_no_job_from_another_cloud(data: DataFolder) -> None:
    """The first cloud fails in the middle of a create, and does not answer for hours: the other one takes over."""
    other = {"CLOUD_ZOO_PROVIDER": "cloudbed:OddCloud", "CLOUD_ZOO_HOURLY_COST": "9000"}
    room = Room(data, HOURLY_COST="1")
    room.desk.environment.update(other)
    room.desk.upload()
    room.restart()
    room.clouds.sites["lab"].provider.fails["create"] = UNKNOWN
    room.tick()
    assert [(row.cloud, row.state) for row in room.clouds.rows()] == [("lab", "intended")]
    room.clouds.sites["lab"].provider.fails["nodes"] = UNKNOWN
    for _ in range(2):
        room.clouds.cloud_tick("zoo")
        room.tick()
    room.clouds.cloud_tick("zoo")
    states = {row.cloud: row.state for row in room.clouds.rows()}
    assert states == {"lab": "intended", "zoo": "booting"}
    room.desk.store.close()


def test_an_instance_that_names_no_server_is_somebodys(room: Room) -> None:
    """Its owner may have lost a tag. It is ended only if a row knows it."""
    room.tick()
    (own,) = room.cloud.made
    room.cloud.made.append(own._replace(id="stripped", client="c1", server=""))
    room.tick(70)
    assert "stripped" in [node.id for node in room.cloud.made]


def test_a_cloud_that_raises_anything_is_held_back_and_says_so(room: Room) -> None:
    """A class of the site's own may have faults."""
    room.tick()
    room.cloud.fails["nodes"] = KeyError("id")
    room.tick()
    assert room.states() == ["booting"]
    assert "KeyError: 'id'" in room.clouds.sites["lab"].held()
    assert "KeyError: 'id'" in str(room.desk.server.plugins["health"].report())
    room.cloud.fails.clear()
    room.tick(30)
    assert room.clouds.sites["lab"].held() == ""


def test_a_create_that_raises_anything_may_have_made_one(room: Room) -> None:
    room.cloud.fails["created"] = KeyError("id")
    room.tick()
    assert room.states() == ["intended"]
    room.cloud.fails.clear()
    room.tick(30)
    assert (room.states(), room.cloud.creates) == (["booting"], 1)


def test_instances_of_a_cloud_that_was_removed_from_the_settings_are_not_forgotten(room: Room) -> None:
    """After a restart nobody can end them any more: somebody must learn of it."""
    room.tick()
    (row,) = room.clouds.rows()
    room.desk.environment["CLOUD_ZOO_PROVIDER"] = room.desk.environment.pop("CLOUD_LAB_PROVIDER")
    for name in [name for name in room.desk.environment if name.startswith("CLOUD_LAB_")]:
        del room.desk.environment[name]
    room.desk.restart()
    room.clouds = room.desk.server.plugins["clouds"]
    room.clouds.program = (b"", "0" * 64)
    room.clouds.tick()
    said = str(room.desk.server.plugins["health"].report())
    assert f"1 instance is in the cloud lab, which is no longer in the settings: {row.name}" in said, said


def test_it_is_ended_when_it_has_no_jobs(room: Room) -> None:
    """Not before: an instance with a job stays, and one that is drained goes once its job is over."""
    room.tick()
    link = room.join()
    room.tick()
    (job,) = room.desk.store.jobs(statements.QUEUED_OF_SERVICE, service="example", before=float("inf"))
    assert room.desk.store.claim(job.id, link.name, 100)
    room.tick(30)
    assert room.states() == ["joined"]
    room.desk.server.drain(link, True)
    room.tick(30)
    assert room.states() == ["draining"]
    room.desk.store.move(room.desk[job], Status.SUBMITTED, "", dest_id="7")
    room.desk.store.move(room.desk[job], Status.COMPLETED, "")
    room.tick(2)
    assert (room.states(), room.cloud.made) == ([], [])
    assert room.desk.store.read(statements.DRAINED_ALL) == []


def test_a_clock_that_is_set_ends_nothing(room: Room) -> None:
    room.tick()
    room.join()
    for seconds in (86_400, -2 * 86_400):
        room.desk.clock.set_s(seconds)
        room.tick(2)
        assert room.states() == ["joined"]
    room.restart()
    room.tick()
    assert (room.states(), room.cloud.creates) == (["joined"], 1)


def test_the_budget_is_kept(data: DataFolder) -> None:
    """An instance costs 1 a second: with 200 for the day there is no second one, and the jobs say why."""
    room = Room(data, DAILY_BUDGET="300", MAX="5")
    jobs = [room.desk.upload(user_id=user) for user in range(8)]
    room.tick(2)
    assert len(room.states()) <= 2
    (text,) = waiting_texts(room.desk.server, jobs[-1:])
    assert text is not None
    room.tick(60)
    assert room.clouds.spent_today()["lab"] > 300
    assert "300 for today" in str(room.clouds.plan().reasons)
    made = room.cloud.creates
    room.tick(10)
    assert room.cloud.creates == made
    room.desk.store.close()


# == Money ==


def test_at_the_budget_payloads_end_by_themselves(paying: Room) -> None:
    """The instance gets no more jobs, and is ended once its payload has ended, however long that takes."""
    (row,) = paying.clouds.rows()
    paying.desk.restart(CLOUD_LAB_DAILY_BUDGET="100", CLOUD_LAB_MAX="2")
    cloud = paying.cloud
    paying.open()
    paying.clouds.sites["lab"].provider = cloud
    job = run(paying, paying.join().name, 7)
    paying.tick(2)
    assert paying.states() == ["joined"]
    paying.desk.clock.pass_s(2 * 86_400)
    paying.tick(20)
    assert (paying.states(), len(paying.cloud.made)) == (["draining"], 1)
    assert (paying.desk[job].status, paying.desk[job].attempt, paying.desk[job].kill_requested_at) == (Status.RUNNING, 1, None)
    waits = paying.desk.upload()
    paying.tick(2)
    (text,) = waiting_texts(paying.desk.server, [waits])
    assert text is not None and "lab has spent" in text and "of 100 for today" in text
    assert paying.desk.store.move(paying.desk[job], Status.COMPLETED, "", run_s=2 * 86_400.0)
    paying.tick(2)
    assert (paying.states(), paying.cloud.made, paying.clouds.row(row.uuid).reason) == ([], [], "no job needs it")


def spent(room: Room, query: str = "") -> dict[str, Any]:
    """What GET /clouds says; the parts add up."""
    said: dict[str, Any] = ask(room.desk.server, "GET", f"/clouds{query}").json
    (cloud,) = said["clouds"]
    for when in ("", "_today"):
        services, users = (sum(each[f"spent{when}"] for each in part) for part in (cloud["by_service"], said["by_user"]))
        others = said["other_users"][f"spent{when}"] if said["other_users"] else 0.0
        assert services + cloud[f"unassigned{when}"] == pytest.approx(cloud[f"spent{when}"], abs=0.001)
        assert users + others == pytest.approx(services, abs=0.001)
    return said


def run(room: Room, client: str, user: int, **changes: Any) -> Job:
    """A job that runs at a client from now on."""
    job = room.desk.upload(user_id=user, **changes)
    assert room.desk.store.claim(job.id, client, 100)
    assert room.desk.store.move(room.desk[job], Status.SUBMITTED, "", dest_id="7")
    assert room.desk.store.move(room.desk[job], Status.RUNNING, "", started_at=room.desk.clock.wall())
    return room.desk[job]


@pytest.fixture
def paying(data: DataFolder) -> Iterator[Room]:
    """A cloud with an instance of two slots that has joined after 30 s; it costs 1 a second."""
    made = Room(data, MAX="1", IDLE="100000")
    clock = made.desk.clock
    clock.pass_s(86_400 - clock.wall() % 86_400 - 100)  # 100 s before midnight
    waits = made.desk.upload()
    made.clouds.cloud_tick("lab")
    made.clouds.tick()
    made.clouds.cloud_tick("lab")
    clock.pass_s(30)
    made.join().slots = 2
    made.clouds.tick()
    assert made.desk.store.move(waits, Status.KILLED, "")
    yield made
    made.desk.store.close()


def test_a_run_costs_its_share_and_the_rest_is_unassigned(paying: Room) -> None:
    """While it runs, over midnight, once it has ended, and after a restart; a run elsewhere costs nothing."""
    (row,) = paying.clouds.rows()
    assert (spent(paying)["clouds"][0]["unassigned"], spent(paying)["by_user"]) == (pytest.approx(30), [])
    job, elsewhere = run(paying, row.name, 7), run(paying, "127.0.0.1:9000", 8)
    paying.desk.clock.pass_s(90)  # 20 of them after midnight
    said = spent(paying)
    assert said["by_user"] == [{"user_id": 7, "spent_today": pytest.approx(10), "spent": pytest.approx(45)}]
    assert (said["clouds"][0]["spent_today"], said["clouds"][0]["unassigned_today"]) == (pytest.approx(20), pytest.approx(10))
    for each in (paying.desk[job], paying.desk[elsewhere]):
        assert paying.desk.store.move(each, Status.COMPLETED, "", run_s=90.0)
    ended = spent(paying)
    assert ended["by_user"] == said["by_user"]
    assert ended["clouds"][0]["by_service"] == said["clouds"][0]["by_service"], "as while it ran"
    wide = run(paying, row.name, 7, cpus=2)
    paying.desk.clock.pass_s(10)
    assert paying.desk.store.move(paying.desk[wide], Status.FAILED, "", cause="user", run_s=86_400.0), "by a clock that was set"
    paying.desk.clock.pass_s(30)
    (cost,) = spent(paying)["by_user"]
    assert cost["spent"] <= 45 + 130, "never more than the time since it joined"
    paying.restart()
    assert spent(paying)["by_user"] == [cost]
    text = ask(paying.desk.server, "GET", "/metrics").body.decode()
    assert 'joborch_cloud_service_cost{cloud="lab",service="example"}' in text
    assert 'joborch_cloud_unassigned_cost_today{cloud="lab"}' in text


def test_a_run_that_is_lost_with_its_instance_is_nobodys_cost(paying: Room) -> None:
    (row,) = paying.clouds.rows()
    job = run(paying, row.name, 7)
    paying.desk.clock.pass_s(50)
    paying.cloud.made.clear()
    paying.tick(2)
    assert (paying.clouds.rows(), paying.desk[job].attempt) == ([], 2)
    said = spent(paying)
    assert said["by_user"] == [] and said["clouds"][0]["unassigned"] == said["clouds"][0]["spent"] > 80


def test_the_dearest_users_are_listed_and_any_can_be_asked_for(paying: Room) -> None:
    (row,) = paying.clouds.rows()
    for user in range(25):
        job = run(paying, row.name, user)
        paying.desk.clock.pass_s(1 + user)
        assert paying.desk.store.move(paying.desk[job], Status.COMPLETED, "", run_s=1.0 + user)
    said = spent(paying)
    assert [each["user_id"] for each in said["by_user"]] == [*range(24, 4, -1)]
    assert said["other_users"] == {"users": 5, "spent_today": pytest.approx(0), "spent": pytest.approx(7.5)}
    said = spent(paying, "?user_id=3")
    assert said["by_user"] == [{"user_id": 3, "spent_today": pytest.approx(0), "spent": pytest.approx(2)}]
    assert said["other_users"]["users"] == 24
    assert (spent(paying, "?user_id=99")["by_user"], ask(paying.desk.server, "GET", "/clouds?user_id=x").status) == ([], 400)


def test_costs_are_forgotten_with_their_instances(paying: Room) -> None:
    (row,) = paying.clouds.rows()
    job = run(paying, row.name, 7)
    paying.desk.clock.pass_s(50)
    assert paying.desk.store.move(paying.desk[job], Status.COMPLETED, "", run_s=50.0)
    ask(paying.desk.server, "POST", "/clouds/end-all")
    paying.tick(2)
    assert spent(paying)["by_user"] and paying.clouds.rows() == []
    paying.desk.clock.pass_s(367 * 86_400)
    paying.tick()
    assert (spent(paying)["by_user"], spent(paying)["clouds"][0]["spent"]) == ([], 0)


def test_all_are_ended_on_request(room: Room) -> None:
    """None is made until somebody resumes, even after a restart. Jobs that wait say so."""
    room.tick()
    room.join()
    room.tick()
    said = ask(room.desk.server, "POST", "/clouds/end-all").json
    assert [each["state"] for each in said["clouds"][0]["instances"]] == ["ending"]
    room.tick(5)
    assert (room.states(), room.cloud.made, room.cloud.creates) == ([], [], 1)
    room.restart()
    room.tick(2)
    assert (room.states(), room.cloud.creates) == ([], 1)
    why = "all instances were ended by default at 20"
    assert why in ask(room.desk.server, "GET", "/clouds").json["clouds"][0]["held"]
    (job,) = room.desk.store.jobs(statements.QUEUED_OF_SERVICE, service="example", before=float("inf"))
    (text,) = waiting_texts(room.desk.server, [job])
    assert text is not None and why in text and "joborch clouds --resume" in text
    assert why in str(room.desk.server.plugins["health"].report())
    assert ask(room.desk.server, "GET", "/services").json["services"][0]["paused"] is None
    assert ask(room.desk.server, "POST", "/clouds/resume").json["stopped"] is None
    room.restart()
    room.tick()
    assert room.states() == ["booting"]


# == What Libcloud may say ==


@pytest.mark.parametrize("named", ["nope", "web,nope", "web"])
def test_a_security_group_is_looked_up_if_the_credential_may(named: str) -> None:
    """OpenStack answers 500 for one that it does not have."""
    config = load_config("server", {}, {**GOOD, "CLOUD_LAB_SECURITY_GROUP": named})
    provider = LibcloudProvider(config.clouds["lab"], config)
    if named == "web":
        assert provider.groups(lambda: [SimpleNamespace(id="7", name="web")]) == ["web"]
        return
    with pytest.raises(CloudError, match="the cloud has no security group 'nope': it has web") as caught:
        provider.groups(lambda: [SimpleNamespace(id="7", name="web")])
    assert (caught.value.kind, provider.unchecked) == ("refused", "")


@pytest.mark.parametrize(
    ("code", "text", "kind", "said"),
    [
        (401, "Unauthorized", "credentials", "the cloud refuses the credentials"),
        (403, "Policy doesn't allow it", "refused", "the cloud refuses: "),
        (403, "Quota exceeded for instances", "quota", "the quota of the cloud is reached"),
        (400, "InstanceLimitExceeded: you have 5", "quota", "the quota of the cloud is reached"),
        (429, "Too Many Requests", "refused", "the cloud takes no more calls for a while"),
        (503, "RequestLimitExceeded: Request limit exceeded.", "refused", "the cloud takes no more calls for a while"),
        (413, "This request was rate-limited.", "refused", "the cloud takes no more calls for a while"),
        (408, "Request Timeout", "unknown", "the cloud cannot be reached or answers badly"),
        (500, "Unexpected API Error", "unknown", "the cloud cannot be reached or answers badly"),
        (504, "Gateway Time-out", "unknown", "the cloud cannot be reached or answers badly"),
    ],
)
def test_what_an_error_of_a_cloud_means(code: int, text: str, kind: str, said: str) -> None:
    """Only `unknown` may have had an effect."""
    with pytest.raises(CloudError) as caught, guarded():
        raise BaseHTTPError(code, text)
    assert caught.value.kind == kind
    assert said in str(caught.value)


@pytest.mark.parametrize("extra", [None, {"tags": ["web", "db"]}, {"tags": None, "metadata": "odd"}, {"tags": {1: None}, "fault": ["x"]}])
def test_an_instance_with_odd_tags_is_somebodys_and_no_fault(extra: Any) -> None:
    """Providers list tags as they like; an account has instances of others."""
    config = load_config("server", {}, GOOD)
    node = LibcloudProvider(config.clouds["lab"], config).node(SimpleNamespace(id=7, name="web", state="odd", extra=extra))
    assert (node.id, node.name, node.state, node.client, node.server) == ("7", "web", "unknown", "", "")


# == Bad settings ==

GOOD = {"CLOUD_LAB_PROVIDER": "cloudbed:OddCloud", "JOBORCH_PUBLIC_URL": "http://127.0.0.1:5000"}
REAL = {**GOOD, "CLOUD_LAB_PROVIDER": "openstack", "CLOUD_LAB_IMAGE": "debian", "CLOUD_LAB_SIZE": "m1.tiny"}
EC2 = {"CLOUD_LAB_PROVIDER": "ec2", "CLOUD_LAB_CREDENTIALS": "given"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"JOBORCH_PUBLIC_URL": ""}, "JOBORCH_PUBLIC_URL is missing"),
        ({"CLOUD_LAB_PROVIDER": "opnstack"}, "CLOUD_LAB_PROVIDER is 'opnstack', which Libcloud does not have"),
        (
            {**REAL, "CLOUD_LAB_PROVIDER": "digitalocean"},
            "'digitalocean', whose driver in Libcloud takes no user data and no tags: name a class",
        ),
        ({**REAL, "CLOUD_LAB_PROVIDER": "exoscale"}, "'exoscale', whose driver in Libcloud takes no tags: name a class"),
        ({"CLOUD_LAB_PROVIDER": "no.such:Cloud"}, "CLOUD_LAB_PROVIDER is 'no.such:Cloud', which cannot be imported"),
        ({"CLOUD_LAB_PROVIDER": "open stack"}, "CLOUD_LAB_PROVIDER is 'open stack': give a name"),
        ({"CLOUD_LAB_PROVIDER": "", "CLOUD_LAB_SERVICES": "example"}, "CLOUD_LAB_PROVIDER is missing"),
        ({"CLOUD_LAB_HOURLY_COST": "cheap"}, "CLOUD_LAB_HOURLY_COST is 'cheap': give a number"),
        ({"CLOUD_LAB_HOURLY_COST": "nan"}, "CLOUD_LAB_HOURLY_COST is 'nan': give a number"),
        ({"CLOUD_LAB_DAILY_BUDGET": "inf"}, "CLOUD_LAB_DAILY_BUDGET is 'inf': give a number"),
        ({"CLOUD_LAB_DAILY_BUDGET": "-1"}, "CLOUD_LAB_DAILY_BUDGET is '-1': give a number"),
        ({"CLOUD_LAB_SERVICES": "exmaple"}, "CLOUD_LAB_SERVICES names 'exmaple': this server has example"),
        ({"CLOUD_LAB_MIN": "3", "CLOUD_LAB_MAX": "2"}, "CLOUD_LAB_MIN is 3, which is more than CLOUD_LAB_MAX, 2"),
        ({**REAL, **EC2, "CLOUD_LAB_SECURITY_GROUP": "sg-1"}, "CLOUD_LAB_NETWORK is missing: ids in CLOUD_LAB_SECURITY_GROUP need the id"),
        ({**REAL, **EC2, "CLOUD_LAB_SECURITY_GROUP": "sg-1, web"}, "CLOUD_LAB_SECURITY_GROUP has ids and names"),
        ({"CLOUD_LAB_USER_DATA": "/no/such/file"}, "CLOUD_LAB_USER_DATA /no/such/file cannot be read"),
        ({"CLOUD_LAB_USER_DATA": "/dev/zero"}, "CLOUD_LAB_USER_DATA /dev/zero cannot be read: it has more than 1024 KiB"),
        ({**REAL, "CLOUD_LAB_USER_DATA": "true\n" * 10_000}, "CLOUD_LAB_USER_DATA is too long"),
        ({**REAL, "CLOUD_LAB_PROVIDER": "ec2", "CLOUD_LAB_USER_DATA": "true\n" * 3_000}, "ec2 takes 16,384"),
        (REAL, "CLOUD_LAB_CREDENTIALS is missing"),
        ({**REAL, "CLOUD_LAB_CREDENTIALS": "/no/such/file"}, "CLOUD_LAB_CREDENTIALS /no/such/file cannot be read: No such file"),
    ],
)
def test_one_clear_line_for_each_mistake(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("server", {}, {**GOOD, **settings})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("{}", 0o644, "can be read by others: chmod 600"),
        ("not JSON: s3cret", 0o600, "is no JSON"),
        ('["s3cret"]', 0o600, "is no JSON object"),
        ('{"auth_url": "http://h/v3", "credential_secret": "s3cret"}', 0o600, "lacks something: give auth_url, credential_id"),
    ],
)
def test_credentials_are_checked_and_never_shown(content: str, mode: int, said: str, tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        load_config("server", {}, {**REAL, "CLOUD_LAB_CREDENTIALS": str(path)})
    assert said in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "is_weak"), [("http://keystone.example.org:5000/v3", True), ("https://k/v3", False), ("http://127.0.0.1:5000", False)]
)
def test_credentials_that_others_can_read_on_their_way_are_named_at_every_start(url: str, is_weak: bool, tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    path.touch(0o600)
    path.write_text(json.dumps({"auth_url": url, "credential_id": "1", "credential_secret": "s3cret"}))
    config = load_config("server", {}, {**REAL, "CLOUD_LAB_CREDENTIALS": str(path), "DATA_PATH": str(tmp_path)})
    found = [finding for finding in weak_setups(config) if "without encryption" in finding.text]
    assert [finding.good for finding in found] == [None] * is_weak
    assert "s3cret" not in str(found)


def test_credentials_in_a_pipe_to_which_nobody_writes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "credentials", 0o600)
    with pytest.raises(ConfigError, match="is no JSON"):
        load_config("server", {}, {**REAL, "CLOUD_LAB_CREDENTIALS": str(tmp_path / "credentials")})


def test_a_cloud_config_and_a_script_travel_together() -> None:
    """And what the site adds to the script runs before the client."""
    config = load_config("server", {}, {**GOOD, "CLOUD_LAB_USER_DATA": "#cloud-config\npackages: [python3]\n"})
    message = email.message_from_string(user_data(config, config.clouds["lab"], "lab-1", "joborch_x", "0" * 64))
    assert [part.get_content_type() for part in message.walk()][1:] == ["text/cloud-config", "text/x-shellscript"]
    parts = [str(part.get_payload()) for part in message.walk()][1:]
    assert parts[0].startswith("#cloud-config\npackages") and parts[1].startswith("#!/bin/sh\n")
    config = load_config("server", {}, {**GOOD, "CLOUD_LAB_USER_DATA": "export HTTPS_PROXY=http://proxy"})
    script = user_data(config, config.clouds["lab"], "lab-1", "joborch_x", "0" * 64)
    assert script.index("export HTTPS_PROXY") < script.index("joborch.pyz client")
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0


# == The token in the user data ==


def renewal(server: Any, name: str, old: str, new: str) -> Any:
    """POST /join/token by the client `name`, as one that knows its old token."""
    salt = b"0123456789abcdef"
    body = json.dumps({"salt": salt.hex(), "token": mask(link_key(old), salt, new.encode()).hex()}).encode()
    caller = server.token_store.named(name).caller("link")
    return ask(server, "POST", "/join/token", body, caller=caller)


def test_a_token_that_works_once(desk: Desk) -> None:
    """Its client gets no session before it has replaced it; the old one is worth nothing then, and does not come back."""
    server, store = desk.server, desk.server.token_store
    old, new = store.add("lab-1", "client", "example", None, 900.0, once=True), new_token()
    caller = store.named("lab-1").caller("link")
    offer = json.dumps({"instance": "i1", "start": "s1", "services": []}).encode()
    said = ask(server, "POST", "/join", offer, caller=caller).json
    assert (said["renew"], said["session"], "lab-1" in server.links) == (True, "", False)
    assert ask(server, "POST", "/join", offer.replace(b"i1", b"i2"), caller=caller).status == 403, "it is bound to the first client"
    assert ask(server, "POST", "/join/token", b"{}", caller=caller).status == 400
    assert renewal(server, "lab-1", new, new).status == 400, "encrypted with another key it is no token"
    assert renewal(server, "lab-1", old, new).json == {"renewed": True}
    assert (store.find(old)[0], store.find(new)[0].name) == (None, "lab-1")
    assert renewal(server, "lab-1", new, new_token()).status == 409, "that is possible once"
    desk.clock.pass_s(901)
    desk.restart()
    found = desk.server.token_store.find(new)[0]
    assert found is not None and (found.expires_at, found.once) == (None, 0)
    said = ask(desk.server, "POST", "/join", offer, caller=found.caller("link")).json
    assert (said["renew"], len(said["session"])) == (False, 32)


def test_a_client_without_a_server_stops(make_process: MakeProcess) -> None:
    """JOBORCH_ORPHAN_AFTER: an instance whose server is lost costs no more money."""
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": ""}).start()
    client = JoinedClient(server.folder / "client", server, settings={"JOBORCH_ORPHAN_AFTER": "4"})
    client.enrol()
    client.start()
    number = submit(server, "sleep 0.1")
    wait_status(server, number, "Completed", limit_s=LIMIT_S)
    server.kill()
    assert client.process is not None
    assert client.process.wait(LIMIT_S) == 0
    assert "no server has answered" in client.log
    client.close()
