"""An application is read from its file; a bad one is refused by file, table and key in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from testbed import application, paths, plan
from testbed.application import parse
from testbed.campaigns import applications, roles
from testbed.campaigns.provisioning import Deployment
from testbed.datapaths import get
from testbed.images import programs
from testbed.model.cells import Cell, Pair
from testbed.model.errors import Error
from testbed.model.metrics import Metric
from testbed.model.terms import Family, Runtime, Transport
from testbed.model.trials import percentile

GOOD = r"""
about = "a toy"
request_bytes = 10
[server]
programs = ["sleep"]
args = ["{bind}", "{port}"]
[client]
programs = ["sleep"]
run = "ask {authority} {streams} {size_bytes} {duration_s}"
[output]
unit = "ms"
requests = 'requests: (\d+)'
per_s = 'per second: ([\d.]+)'
errors = 'failed: (\d+)'
p50 = '^50% ([\d.]+)'
p99 = '^99% ([\d.]+)'
"""
PRINTED = "requests: 100\nper second: 50.5\nfailed: 2\nfailed: 1\n50% 1.5\n99% 2.25\n"
SHIPPED = sorted(path.stem for path in (paths.EXPERIMENTS / "applications").glob("*.toml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('about = "a toy"', "", "about: expected what it is, in words, found nothing"),
        ("request_bytes = 10", "request_bytes = 0", "request_bytes: expected an integer"),
        ("[server]", "[sever]", "sever: no such key"),
        ("[output]", "[[output]]", "output: expected a table [output]"),
        ('args = ["{bind}", "{port}"]', "argv = []", "[server]: argv: no such key"),
        ('programs = ["sleep"]\nargs', "programs = []\nargs", "[server]: programs: expected one"),
        ("{bind}", "{host}", "[server]: nothing is put in the place of {host}"),
        ("{authority}", "{bind}", "[client]: nothing is put in the place of {bind}"),
        ("{duration_s}", "", "[client]: run: expected {duration_s} or {requests}"),
        ("{duration_s}", "{duration_s} {requests}", "[client]: run: expected {duration_s} or"),
        ('args = ["{bind}"', 'script = "x"\nargs = ["{bind}"', "[server]: both args and script"),
        ('unit = "ms"', 'unit = "h"', "[output]: unit: expected one of s, ms, us, ns"),
        (r"requests = 'requests: (\d+)'", "", "[output]: requests: expected a regular expression"),
        (r"'requests: (\d+)'", r"'requests: \d+'", "[output]: requests: expected a regular"),
        (r"'requests: (\d+)'", r"'requests: (\d+'", "[output]: requests: expected a regular"),
        (r"p50 = '^50% ([\d.]+)'", "", "[output]: expected either p50 and p99 or histogram"),
        ("[output]", "cases = {a = '1'}\n[output]", "there is no case ''"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(Error) as refused:
        parse(GOOD.replace(old, new), "toy.toml")
    assert str(refused.value).startswith("application toy.toml: ")
    assert message in refused.value.message
    assert "\n" not in refused.value.message


def test_what_a_client_prints_is_read_in_the_units_of_trials() -> None:
    printed = applications.read(parse(GOOD, "toy.toml").output, PRINTED)
    assert (printed.per_s, printed.requests, printed.errors) == (50.5, 100, 3)
    assert printed.quantities == {"p50_us": 1500, "p99_us": 2250}
    with pytest.raises(Error, match="printed no p99, but per second: 5"):
        applications.read(parse(GOOD, "toy.toml").output, "per second: 5\nrequests: 100\n50% 3")


def test_a_histogram_is_found_any_number_of_times_and_added_up() -> None:
    text = re.sub(r"p50.*\np99.*", r"histogram = 'took (\\d+) (\\d+)'", GOOD)
    printed = applications.read(
        parse(text, "toy.toml").output, PRINTED + "took 3 98\ntook 9 1\ntook 9 1\n"
    )
    assert printed.histogram_us == ((3000, 98), (9000, 2))
    assert percentile(printed.histogram_us, 99) == 9000
    assert not printed.quantities


def test_a_case_is_put_into_the_scripts_of_the_client() -> None:
    text = GOOD.replace("ask", "ask {case}").replace(
        "[output]", "[client.cases]\nfast = '-f {streams}'\n[output]"
    )
    assert parse(text, "toy.toml", "fast").client.run.startswith("ask -f {streams} ")
    with pytest.raises(Error, match="no case 'slow'"):
        parse(text, "toy.toml", "slow")
    with pytest.raises(Error, match="nothing is put in the place of {stream}"):
        parse(text.replace("-f {streams}", "-f {stream}"), "toy.toml", "fast")


def test_what_is_copied_has_to_be_there() -> None:
    server = parse(GOOD, "toy.toml").server.model_copy(update={"copies": ["/nowhere/*"]})
    with pytest.raises(Error, match=r"this host has nothing at /nowhere/\*$"):
        programs.find(server)


def test_nginx_is_the_same_with_and_without_its_sidecar() -> None:
    """Else the difference would not be the sidecar's."""
    alone, behind = (
        application.load(f"{n}.rate", [paths.EXPERIMENTS]) for n in ("nginx", "sidecar")
    )
    assert behind.sidecar
    assert behind.model_copy(update={"about": alone.about, "sidecar": None}) == alone


def test_braces_of_a_program_stay() -> None:
    assert application.fill("events { a; } {port} {x:1}", {"port": 5}) == "events { a; } 5 {x:1}"


CELLS = """
name = "tiny"
blocks = 1
warmup_s = 0
duration_s = 1
[[cells]]
datapath = "steer"
pair = "native-guest"
family = "ipv4"
transport = "tcp"
metric = "requests"
application = "toy"
size_bytes = 64
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('application = "toy"', "", "application: expected an application with metric requests"),
        ('"requests"', '"latency"', "metric: expected requests with an application"),
        ('"tcp"', '"udp"', "transport: expected tcp with an application"),
        ("size_bytes = 64", "", "toy needs a size_bytes"),
        ("size_bytes = 64", "size_bytes = 64\nrate_per_s = 5", "toy takes no rate_per_s"),
        ("size_bytes = 64", "size_bytes = 64\nguests = 2", "runs in one pod with one guest"),
        ('"steer"', '"steer~slow"', "datapath: expected ~again at most"),
        ('"toy"', '"other"', "other.toml: No such file or directory"),
        ('"toy"', '"../toy"', "application: expected the name of an application"),
    ],
)
def test_a_cell_is_told_what_its_application_takes(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    (tmp_path / "applications").mkdir()
    (tmp_path / "applications/toy.toml").write_text(GOOD)
    [cell] = plan.parse(CELLS, "tiny.toml", tmp_path).cells
    assert cell.id == "steer/native-guest/ipv4/tcp/requests/64x1,application=toy"
    assert Cell.parse(cell.id) == cell
    with pytest.raises(Error) as refused:
        plan.parse(CELLS.replace(old, new), "tiny.toml", tmp_path)
    assert message in refused.value.message
    assert "\n" not in refused.value.message


def test_the_shipped_plan_has_every_application_both_ways_and_fits_an_hour() -> None:
    shipped = plan.load("applications")
    assert {cell.application.partition(".")[0] for cell in shipped.cells} == set(SHIPPED)
    for name in {cell.application for cell in shipped.cells}:
        pairs = {cell.pair for cell in shipped.cells if cell.application == name}
        assert pairs >= {Pair.NATIVE_GUEST, Pair.GUEST_NATIVE}
    trial_s = shipped.warmup_s + shipped.duration_s + 1.5
    assert shipped.blocks * len(shipped.cells) * trial_s < 3600


@pytest.mark.parametrize("family", Family, ids=str)
@pytest.mark.parametrize(
    ("datapath", "client", "server", "host"),
    [
        ("steer", "native1", "guest1", ("127.0.0.1", "::1")),
        ("steer", "guest1", "native1", ("localhost", "fd77::1")),
        ("tun", "guest1", "native1", ("localhost", "::1")),
        ("direct", "native1", "guest1", ("169.254.78.1", "fd77::78:1")),
        ("direct", "guest1", "native1", ("169.254.77.3", "fd77::3")),
        ("direct", "native1", "native3", ("127.0.0.1", "::1")),
    ],
)
def test_programs_are_told_whom_to_dial(
    datapath: str, client: str, server: str, host: tuple[str, str], family: Family
) -> None:
    told = applications.dialed(client, server, family, get(datapath))
    expected = dict(zip(Family, host, strict=True))[family]
    port = roles.port(server)
    joined = f"[{expected}]:{port}" if ":" in expected else f"{expected}:{port}"
    assert told == {"host": expected, "port": port, "authority": joined}


def test_cells_of_an_application_have_pods_of_their_own() -> None:
    def cell(name: str, family: Family = Family.IPV4, streams: int = 1) -> Cell:
        pair, transport = Pair.NATIVE_GUEST, Transport.TCP
        return Cell(
            "steer", pair, family, transport, Metric.REQUESTS, 64, streams, application=name
        )

    one = Deployment.of(cell("redis.get"))
    assert one.alone
    assert one == Deployment.of(cell("redis.get", streams=8))
    assert one == Deployment.of(cell("redis.set"))
    assert one != Deployment.of(cell("nginx.rate"))
    assert one != Deployment.of(cell("redis.get", Family.IPV6))


def test_server_and_sidecar_own_their_ports_and_the_client_none() -> None:
    told = application.load("sidecar.rate", [paths.EXPERIMENTS])
    made = applications.manifest(
        told, Pair.NATIVE_GUEST, Family.IPV4, get("steer"), Runtime.STANDIN
    )
    assert {w.name: [port for _, port in w.ports] for w in made.workloads} == {
        "native1": [],
        "native3": [8003],
        "guest1": [8011],
    }
