"""Manifests of pods: what is understood, and how a fault is named."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent, indent

import pytest

from testbed.model.errors import Error
from testbed.model.manifest import HostPort, Probe, Program, Restart, Spec, Workload
from testbed.model.terms import Runtime, Transport
from testbed.pods import kubernetes
from testbed.runtimes.vm.guest import definition, vcpus


def read(tmp_path: Path, text: str) -> list[Spec]:
    file = tmp_path / "pod.yaml"
    file.write_text(dedent(text))
    return kubernetes.read(file, lambda: Runtime.LINUX)


def pod(containers: str, spec: str = "", annotations: str = "{}") -> str:
    """A manifest around a list of containers."""
    return (
        "apiVersion: v1\nkind: Pod\n"
        f"metadata: {{name: shop, annotations: {annotations}}}\n"
        f"spec:\n{indent(dedent(spec).strip(), '  ')}\n"
        f"  containers:\n{indent(dedent(containers).strip(), '  ')}\n"
    )


def test_a_manifest_is_read_as_kubernetes_means_it(tmp_path: Path) -> None:
    text = """
        - name: web
          image: "host:"
          command: [httpd, -p, "$(PORT)", "$$(PORT)", "$(NOBODY)"]
          args: [-f]
          env: [{name: PORT, value: "80"}, {name: URL, value: "http://localhost:$(PORT)"}]
          workingDir: /srv
          ports: [{containerPort: 80, name: http, hostPort: 8080},
                  {containerPort: 53, protocol: UDP}]
          resources: {limits: {memory: 64Mi, cpu: 500m}}
          readinessProbe: {httpGet: {port: http, path: /health}, periodSeconds: 3}
          livenessProbe: {exec: {command: [test, -e, /tmp/alive]}, initialDelaySeconds: 5}
        - {name: engine, image: host:nc}
    """
    spec = """
        restartPolicy: OnFailure
        hostAliases: [{ip: 10.0.0.1, hostnames: [db, store]}]
        dnsPolicy: None
        dnsConfig: {nameservers: [127.0.0.11], options: [{name: ndots, value: "2"}]}
    """
    [read_] = read(tmp_path, pod(text, spec, "{testbed/runtime.engine: standin}"))
    web, engine = read_.manifest.workloads
    assert (read_.name, read_.hostname, read_.restart) == ("shop", "shop", Restart.ON_FAILURE)
    assert read_.host_aliases == (("10.0.0.1", ("db", "store")),)
    assert read_.resolv_conf == "nameserver 127.0.0.11\noptions ndots:2\n"
    assert (web.runtime, engine.runtime) == (Runtime.CONTAINER, Runtime.STANDIN)
    assert web.ports == ((Transport.TCP, 80), (Transport.UDP, 53))
    assert read_.host_ports == (HostPort(Transport.TCP, 8080, 80),)
    program = web.program
    assert program is not None
    assert program.command == ("httpd", "-p", "80", "$(PORT)", "$(NOBODY)")
    assert dict(program.env)["URL"] == "http://localhost:80"
    assert (program.args, program.working_dir) == (("-f",), "/srv")
    assert (program.memory_bytes, program.cpus) == (64 << 20, 0.5)
    assert program.readiness == Probe(port=80, path="/health", period_s=3)
    assert program.liveness == Probe(command=("test", "-e", "/tmp/alive"), delay_s=5)


def test_the_runtime_is_the_containers_then_the_pods_then_the_class(tmp_path: Path) -> None:
    text = "- {name: a, image: x}\n- {name: b, image: x}"
    for spec, said, expected in (
        ("", "{}", [Runtime.CONTAINER, Runtime.CONTAINER]),
        ("runtimeClassName: process", "{}", [Runtime.PROCESS, Runtime.PROCESS]),
        ("runtimeClassName: process", "{testbed/runtime: wasm}", [Runtime.WASM, Runtime.WASM]),
        ("", "{testbed/runtime: wasm, testbed/runtime.b: osv}", [Runtime.WASM, Runtime.OSV]),
        ("", "{testbed/runtime.b: best}", [Runtime.CONTAINER, Runtime.LINUX]),
        ("runtimeClassName: best", "{testbed/runtime.b: osv}", [Runtime.LINUX, Runtime.OSV]),
    ):
        [read_] = read(tmp_path, pod(text, spec, said))
        assert [w.runtime for w in read_.manifest.workloads] == expected


def test_several_documents_are_several_pods(tmp_path: Path) -> None:
    one = pod("- {name: a, image: x}")
    specs = read(tmp_path, f"{one}---\n{one.replace('shop', 'bank')}---\n")
    assert [spec.name for spec in specs] == ["shop", "bank"]
    with pytest.raises(Error, match="two pods are named 'shop'"):
        read(tmp_path, f"{one}---\n{one}")


def test_images_are_found_beside_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for image, expected in (
        ("./root", str(tmp_path / "root")),
        ("root", "root"),
        ("oci:layout:v1", f"oci:{tmp_path}/layout:v1"),
        ("host:redis-server", "host:redis-server"),
        ("agent", "agent"),
    ):
        [read_] = read(tmp_path, pod(f'- {{name: a, image: "{image}"}}'))
        program = read_.manifest.workloads[0].program
        assert program is not None
        assert program.image == expected


@pytest.mark.parametrize(
    ("limit", "pinned", "cpus"), [(None, (), 1), (2.0, (), 2), (None, (0, 1), 2), (1.0, (0, 1), 1)]
)
def test_a_guest_has_cpus_as_its_limit_says(
    limit: float | None, pinned: tuple[int, ...], cpus: int
) -> None:
    program = Program("x", cpus=limit) if limit else None
    assert vcpus(Workload("a", Runtime.LINUX, cpus=pinned, program=program)) == cpus


def test_half_a_cpu_is_refused_to_a_guest() -> None:
    workload = Workload("a", Runtime.LINUX, program=Program("host:sleep", cpus=0.5))
    with pytest.raises(Error, match=r"guest 'a' cannot have 0\.5 CPUs; .*limits\.cpu"):
        definition(workload)


def test_what_matters_to_clusters_alone_is_a_warning(tmp_path: Path) -> None:
    text = "- {name: a, image: x, imagePullPolicy: Always}"
    [read_] = read(tmp_path, pod(text, "nodeSelector: {disk: ssd}"))
    assert [w.partition("document 1, ")[2] for w in read_.warnings] == [
        "spec.nodeSelector is not used",
        "spec.containers.0.imagePullPolicy is not used",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (pod("- {name: a}"), "spec.containers.0.image: Field required"),
        (pod("- {name: A, image: x}"), "spec.containers.0.name: a name of a-z"),
        (pod("- {name: a, image: x, volumeMounts: []}"), "volumeMounts is not supported"),
        (pod("- {name: a, image: x, comand: [ls]}"), "spec.containers.0.comand: comand is not"),
        (pod("- {name: a, image: x}", "hostNetwork: true"), "spec.hostNetwork: hostNetwork is not"),
        (
            pod("- {name: a, image: x, ports: [{containerPort: 80, hostIP: 10.0.0.1}]}"),
            "spec.containers.0.ports.0.hostIP: hostIP is not supported",
        ),
        (
            pod(
                "- name: a\n  image: x\n  ports: [{containerPort: 80, hostPort: 8}, "
                "{containerPort: 81, hostPort: 8}]"
            ),
            "tcp hostPort 8 is claimed twice",
        ),
        (pod("- {name: a, image: x, ports: [{containerPort: 70000}]}"), "to 65535, not 70000"),
        (
            pod("- {name: a, image: x, resources: {limits: {memory: much}}}"),
            "limits.memory: a quantity like 500m, 2 or 128Mi was expected, not 'much'",
        ),
        (pod("- {name: a, image: x, readinessProbe: {}}"), "one of tcpSocket, httpGet and exec"),
        (
            pod("- {name: a, image: x, readinessProbe: {tcpSocket: {port: web}}}"),
            "probes port 'web', which it does not list",
        ),
        (pod("- {name: a, image: x}", annotations="{testbed/runtime.b: osv}"), "no such container"),
        (pod("- {name: a, image: x}", annotations="{testbed/runtime: vm}"), "no runtime 'vm'"),
        (pod("- {name: a, image: x, name: b}"), "the key 'name' stands there twice"),
        (
            pod(
                "- {name: a, image: x}",
                "initContainers: [{name: i, image: x}]",
                "{testbed/runtime.i: osv}",
            ),
            "init container 'i' cannot be a guest",
        ),
        (
            pod("- &a {name: a, image: x, ports: [{containerPort: 80}]}\n- {<<: *a, name: b}"),
            "document 1: 'a' and 'b' both claim tcp port 80",
        ),
        (
            pod(
                "- {name: a, image: x, livenessProbe: {exec: {command: [ls]}}}",
                annotations="{testbed/runtime: osv}",
            ),
            "nothing can be started in it",
        ),
        ("apiVersion: apps/v1\nkind: Deployment", "apiVersion: Input should be 'v1'"),
        ("- a", "the document: "),
        ("", "holds no pod"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(Error) as caught:
        read(tmp_path, text)
    assert fault in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "pod.yaml"))
    assert "\n" not in str(caught.value)
