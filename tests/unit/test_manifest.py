"""Manifests of pods: what is understood, and how a fault is named."""

from __future__ import annotations

import io
import re
from pathlib import Path
from textwrap import dedent, indent

import pytest

from testbed import paths
from testbed.model.errors import Error
from testbed.model.manifest import (
    Action,
    HostPort,
    Mount,
    Probe,
    Program,
    Restart,
    Security,
    Spec,
    Tap,
    Volume,
    Workload,
    resolved,
)
from testbed.model.terms import Runtime, Transport
from testbed.pods import kubernetes
from testbed.pods.kubernetes.images import of_user
from testbed.runtimes.vm.guest import vcpus


def read(tmp_path: Path, text: str) -> list[Spec]:
    file = tmp_path / "pod.yaml"
    file.write_text(dedent(text))
    return kubernetes.read([file], lambda: Runtime.LINUX)


def pod(containers: str, spec: str = "", annotations: str = "{}") -> str:
    """A manifest around a list of containers."""
    return (
        "apiVersion: v1\nkind: Pod\n"
        f"metadata: {{name: shop, annotations: {annotations}}}\n"
        f"spec:\n{indent(dedent(spec).strip(), '  ')}\n"
        f"  containers:\n{indent(dedent(containers).strip(), '  ')}\n"
    )


def with_field(text: str) -> str:
    """A manifest of one container that has this field besides its name and image."""
    return pod(f"- {{name: a, image: x, {text}}}")


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
    assert program.readiness == Probe(Action(port=80, path="/health"), period_s=3)
    assert program.liveness == Probe(Action(command=("test", "-e", "/tmp/alive")), delay_s=5)


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


def test_a_guest_on_a_tap_is_somebody_elses(tmp_path: Path) -> None:
    text = "- {name: a, image: registry.example/a}\n- {name: b, image: x}"
    [found] = read(tmp_path, pod(text, annotations="{testbed/tap.a: 'tap0,02:00:00:00:00:01'}"))
    a, b = found.manifest.workloads
    assert (a.runtime, a.tap) == (Runtime.FOREIGN, Tap("tap0", "02:00:00:00:00:01"))
    assert (b.runtime, b.tap) == (Runtime.CONTAINER, None)


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
        ("other", "other"),
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
        vcpus(workload)


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
        (with_field("volumeDevices: [{name: b}]"), "only volumes of kind emptyDir"),
        (with_field("volumeMounts: [{name: b, mountPath: /b}]"), "is no volume"),
        (pod("- {name: a, image: x}", "volumes: [{name: b, hostPath: {path: /}}]"), "not hostPath"),
        (pod("- {name: a, image: x}", "volumes: [{name: b}]"), "emptyDir are supported, not none"),
        (with_field("comand: [ls]"), "spec.containers.0.comand: comand is not"),
        (
            pod("- {name: a, image: x}", "hostNetwork: true"),
            "hostNetwork: a pod has a network of its own",
        ),
        (
            with_field("ports: [{containerPort: 80, hostIP: 10.0.0.1}]"),
            "spec.containers.0.ports.0.hostIP: hostIP is not supported",
        ),
        (
            pod(
                "- name: a\n  image: x\n  ports: [{containerPort: 80, hostPort: 8}, "
                "{containerPort: 81, hostPort: 8}]"
            ),
            "tcp hostPort 8 is claimed twice",
        ),
        (with_field("ports: [{containerPort: 70000}]"), "to 65535, not 70000"),
        (with_field("ports: {containerPort: 80}"), "containers.0.ports: a list was expected"),
        (with_field("env: [a]"), "containers.0.env.0: a mapping was expected, not 'a'"),
        (with_field("args: [1]"), "args.0: text (in quotes, if it looks like something else)"),
        (with_field("resources: {limits: {memory: 1e400}}"), "a quantity like 500m"),
        (with_field(f"stdin: {'[' * 900}{']' * 900}"), "is nested too deeply"),
        (
            with_field("resources: {limits: {memory: much}}"),
            "limits.memory: a quantity like 500m, 2 or 128Mi was expected, not 'much'",
        ),
        (with_field("readinessProbe: {}"), "one of tcpSocket, httpGet and exec"),
        (
            with_field("readinessProbe: {tcpSocket: {port: web}}"),
            "probes port 'web', which it does not list",
        ),
        (pod("- {name: a, image: x}", annotations="{testbed/runtime.b: osv}"), "no such container"),
        (pod("- {name: a, image: x}", annotations="{testbed/runtime: vm}"), "no runtime 'vm'"),
        (pod("- {name: a, image: x}", annotations="{testbed/tap: tap0}"), "no such container"),
        (pod("- {name: a, image: x}", annotations="{testbed/tap.a: ''}"), "tap '' is not a name"),
        (
            pod(
                "- {name: a, image: x}",
                "initContainers: [{name: i, image: x}]",
                "{testbed/tap.i: tap0}",
            ),
            "init container 'i' cannot be a guest",
        ),
        (
            pod(
                "- {name: a, image: x, livenessProbe: {exec: {command: [ls]}}}",
                annotations="{testbed/tap.a: tap0}",
            ),
            "nothing can be started in it",
        ),
        (with_field("name: b"), "the key 'name' stands there twice"),
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
        ("apiVersion: apps/v1\nkind: Deployment", "'apiVersion: v1' was expected, not Deployment"),
        ("- a", "document 1: a Pod was expected"),
        ("apiVersion: v1\nkind: List", "document 1, items: a list was expected"),
        ("[" * 5000, "is nested too deeply"),
        (with_field("env: [{name: A=B, value: c}]"), "name of printable ASCII"),
        (with_field("env: [{name: '', value: c}]"), "name of printable ASCII"),
        (with_field('args: ["a\\0b"]'), "text without a NUL was expected"),
        (with_field("tty: true"), "a container has no terminal"),
        (
            pod("- {name: pause, image: x}", "shareProcessNamespace: true"),
            "'pause' is the container that shareProcessNamespace adds",
        ),
        (
            pod("- {name: a, image: x}", "resources: {limits: {cpu: 1}}"),
            "a pod as a whole has no",
        ),
        (
            with_field("livenessProbe: {grpc: {port: 2379}}"),
            "livenessProbe.grpc: gRPC probes are not supported; ask by tcpSocket or exec",
        ),
        (
            with_field("livenessProbe: {httpGet: {port: 1, host: b}}"),
            "httpGet.host: the container itself is asked",
        ),
        (
            with_field("livenessProbe: {tcpSocket: {port: 0}}"),
            "tcpSocket.port: a port from 1 to 65535, or the name of one, was expected, not 0",
        ),
        (
            with_field('livenessProbe: {httpGet: {port: 1, httpHeaders: [{name: "a b"}]}}'),
            "the name of an HTTP header was expected",
        ),
        (
            with_field("lifecycle: {preStop: {}}"),
            "one of tcpSocket, httpGet, exec and sleep was expected",
        ),
        (
            with_field("securityContext: {privileged: true}"),
            "securityContext.privileged: no container is privileged",
        ),
        (
            with_field("securityContext: {seccompProfile: {type: Unconfined}}"),
            "seccompProfile.type: Input should be 'RuntimeDefault', not 'Unconfined'",
        ),
        (
            with_field("envFrom: [{configMapRef: {name: b}}]"),
            "envFrom: there are no ConfigMaps and Secrets here",
        ),
        (
            with_field("env: [{name: B, valueFrom: {secretKeyRef: {name: b, key: c}}}]"),
            "container 'a', variable B: there are no ConfigMaps and Secrets here",
        ),
        (
            with_field("env: [{name: B, valueFrom: {fieldRef: {fieldPath: spec.b}}}]"),
            "container 'a', variable B: no field 'spec.b'; one of metadata.name",
        ),
        (
            pod(
                "- {name: a, image: x}",
                "initContainers: [{name: i, image: x, startupProbe: {tcpSocket: {port: 1}}}]",
            ),
            "a sidecar has restartPolicy: Always",
        ),
        ("", "holds no pod"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(Error) as caught:
        read(tmp_path, text)
    assert fault in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "pod.yaml"))
    assert str(caught.value).count("pod.yaml") == 1  # one fault, one error
    assert "\n" not in str(caught.value)


def test_null_false_and_empty_mean_absent(tmp_path: Path) -> None:
    text = """
        - {name: a, image: x, command: null, env: null, resources: {limits: null}, ports: [],
           livenessProbe: null, securityContext: {privileged: false}, stdin: false, envFrom: []}
    """
    [read_] = read(tmp_path, pod(text, "hostNetwork: false\nnodeName: null\nvolumes: null"))
    assert read_.warnings == ()
    assert read_.manifest.workloads[0].program == Program("x")


def test_a_list_with_the_fields_that_a_cluster_adds_is_read(tmp_path: Path) -> None:
    one = pod("- {name: a, image: x}")
    one = one.replace("metadata: {", "metadata: {creationTimestamp: 2026-11-29T10:00:00Z, uid: u, ")
    items = "".join(
        f"- {indent(text, '  ').strip()}\n" for text in (one, one.replace("shop", "bank"))
    )
    specs = read(tmp_path, f"apiVersion: v1\nkind: List\nmetadata: {{}}\nitems:\n{items}")
    assert [spec.name for spec in specs] == ["shop", "bank"]
    assert "document 1, items.0, metadata.creationTimestamp is not used" in specs[0].warnings[0]
    bare = one.replace("apiVersion: v1\nkind: Pod\n", "")
    listed = f"apiVersion: v1\nkind: PodList\nitems:\n- {indent(bare, '  ').strip()}\n"
    assert [spec.name for spec in read(tmp_path, listed)] == ["shop"]


def test_several_files_and_standard_input_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pod("- {name: a, image: x}")
    file = tmp_path / "pod.yaml"
    file.write_text(one)
    monkeypatch.setattr("sys.stdin", io.StringIO(one.replace("shop", "bank")))
    specs = kubernetes.read([file, Path("-")], lambda: Runtime.LINUX)
    assert [spec.name for spec in specs] == ["shop", "bank"]
    with pytest.raises(Error, match="two pods are named 'shop'"):
        kubernetes.read([file, file], lambda: Runtime.LINUX)
    monkeypatch.setattr("sys.stdin", io.StringIO("a: ["))
    with pytest.raises(Error, match="^standard input is not YAML"):
        kubernetes.read([Path("-")], lambda: Runtime.LINUX)


def test_dates_are_text(tmp_path: Path) -> None:
    [read_] = read(tmp_path, with_field("args: [2026-11-29, 2026-99-99]"))
    program = read_.manifest.workloads[0].program
    assert program is not None
    assert program.args == ("2026-11-29", "2026-99-99")


def test_volumes_hooks_and_security_are_read(tmp_path: Path) -> None:
    text = """
        - name: a
          image: x
          volumeMounts: [{name: data, mountPath: /data, readOnly: true}]
          startupProbe: {httpGet: {port: 80, httpHeaders: [{name: Accept, value: text/html}]}}
          lifecycle: {postStart: {exec: {command: [ls]}}, preStop: {sleep: {seconds: 2}}}
          securityContext: {runAsUser: 7, readOnlyRootFilesystem: true,
                            allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    """
    spec = """
        volumes: [{name: data, emptyDir: {medium: Memory}}]
        securityContext: {runAsUser: 5, runAsGroup: 6, runAsNonRoot: true, fsGroup: 8,
                          supplementalGroups: [9]}
        initContainers:
        - {name: first, image: x}
        - {name: second, image: x, restartPolicy: Always, ports: [{containerPort: 81}]}
    """
    [read_] = read(tmp_path, pod(text, spec))
    program = read_.manifest.workloads[-1].program
    assert program is not None
    assert read_.volumes == (Volume("data", group=8),)
    assert program.mounts == (Mount("data", "/data", read_only=True),)
    accept = (("Accept", "text/html"),)
    assert program.startup == Probe(Action(port=80, path="/", headers=accept))
    assert (program.post_start, program.pre_stop) == (Action(command=("ls",)), Action(sleep_s=2))
    assert program.security == Security(
        user=7,
        group=6,
        groups=(9, 8),
        non_root=True,
        read_only_root=True,
        escalation=False,
        drop=("ALL",),
    )
    assert [w.name for w in read_.init] == ["first", "second"]
    assert [w.name for w in read_.manifest.workloads] == ["second", "a"]
    assert [w.name for w in read_.sidecars] == ["second"]


def test_variables_tell_a_program_about_its_pod(tmp_path: Path) -> None:
    text = """
        - name: a
          image: x
          args: [$(IP)]
          resources: {limits: {cpu: 250m, memory: 64Mi}, requests: {cpu: 100m}}
          env:
          - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
          - {name: TIER, valueFrom: {fieldRef: {fieldPath: "metadata.labels['tier']"}}}
          - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
          - {name: CPU, valueFrom: {resourceFieldRef: {resource: requests.cpu, divisor: 1m}}}
          - {name: MEMORY, valueFrom: {resourceFieldRef: {resource: requests.memory,
                                                          containerName: a}}}
          - {name: GONE, valueFrom: {configMapKeyRef: {name: b, key: c, optional: true}}}
    """
    manifest = pod(text).replace("metadata: {", "metadata: {labels: {tier: $(POD)}, ")
    [read_] = read(tmp_path, manifest)
    program = read_.manifest.workloads[0].program
    assert program is not None
    known = resolved(program, {"status.podIP": "10.77.0.9"})
    assert known.args == ("10.77.0.9",)
    assert dict(known.env) == {
        "POD": "shop",
        "TIER": "$(POD)",  # only what `value` says is expanded
        "IP": "10.77.0.9",
        "CPU": "100",
        "MEMORY": str(64 << 20),
    }
    with pytest.raises(Error, match=r"no status\.podIP"):
        resolved(program, {})


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("nginx:1.29", "host:nginx"),  # what --image says
        ("docker.io/library/nginx@sha256:12", "host:nginx"),
        ("registry.example:5000/team/app:2", "host:app"),  # what the file says, for all tags
        ("team/app:3", "team/app:3"),  # of another registry
        ("busybox", "host:,printenv"),  # well-known
        ("registry.k8s.io/busybox:1.27", "host:,printenv"),
        ("somebody/busybox", "somebody/busybox"),
    ],
)
def test_images_are_what_the_user_says_or_well_known(
    tmp_path: Path, image: str, expected: str
) -> None:
    file = tmp_path / "images.toml"
    file.write_text('"registry.example:5000/team/app" = "host:app"\nnginx = "host:other"\n')
    images = of_user(["nginx=host:nginx"], file)
    for runtime in (Runtime.CONTAINER, Runtime.GVISOR):
        assert images.find(image, runtime, tmp_path)[0] == expected


def test_well_known_images_are_said_aloud(tmp_path: Path) -> None:
    [read_] = read(tmp_path, pod("- {name: a, image: 'nginx:1'}\n- {name: b, image: 'host:'}"))
    [told] = read_.warnings
    assert "container a: nginx:1 is not pulled: it is put together from this host's osv/web" in told
    assert "--image nginx:1=" in told


@pytest.mark.parametrize("runtime", ["container", "osv", "linux", "wasm"])
def test_a_folder_that_is_named_as_an_image_is_told_from_one(tmp_path: Path, runtime: str) -> None:
    for name in ("rootfs", "redis", "nginx"):
        (tmp_path / name).mkdir()
    images = of_user([], None)
    with pytest.raises(Error, match=r"no image 'rootfs'; what is beside .* is \./rootfs"):
        images.find("rootfs", Runtime(runtime), tmp_path)
    rootfs = str(tmp_path / "rootfs")
    assert images.find("./rootfs", Runtime(runtime), tmp_path) == (rootfs, "")
    assert images.find("nothing", Runtime(runtime), tmp_path) == ("nothing", "")
    for known in ("redis", "nginx"):  # names come first
        images.find(known, Runtime(runtime), tmp_path)


@pytest.mark.parametrize(
    ("image", "runtime", "found", "is_told"),
    [
        ("curl", Runtime.CONTAINER, "curl", True),
        ("curl:8", Runtime.CONTAINER, "curl:8", False),  # which then is not there
        ("curl", Runtime.GVISOR, "curl", True),
        ("agent", Runtime.CONTAINER, "agent", False),
        ("curl:8", Runtime.GVISOR, "curl", True),
        ("curl", Runtime.LINUX, "curl", False),
        ("curl:8", Runtime.LINUX, "curl", True),
        ("curl", Runtime.WASM, "curl", False),
        ("osv/curl.toml", Runtime.CONTAINER, str(paths.OSV / "curl.toml"), False),
    ],
)
def test_a_definition_in_the_place_of_an_image_is_said_aloud(
    image: str, runtime: Runtime, found: str, is_told: bool
) -> None:
    assert of_user([], None).find(image, runtime, paths.ROOT) == (
        found,
        f"{image} is not pulled: it is put together from this host's osv/curl.toml "
        f"(--image {image}=… takes another)"
        if is_told
        else "",
    )


@pytest.mark.parametrize(
    ("pairs", "text", "fault"),
    [
        (["nginx"], "", "--image nginx: no image"),
        ([], "nginx = 1", "images.toml, nginx: a line"),
        ([], "nginx", "images.toml"),
    ],
)
def test_a_fault_of_an_image_map_is_named(
    tmp_path: Path, pairs: list[str], text: str, fault: str
) -> None:
    file = tmp_path / "images.toml"
    file.write_text(text)
    with pytest.raises(Error, match=re.escape(fault)):
        of_user(pairs, file)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not a name"),
        ("tap0,10.1.1.1,10.1.1.2", "at most one MAC"),
        ("tap0,10.1.1.300", "10.1.1.300"),
        ("tap0,02:00:00:00:00:01,02:00:00:00:00:02", "at most one MAC"),
    ],
)
def test_a_tap_that_is_none_is_refused(text: str, problem: str) -> None:
    with pytest.raises(Error, match=problem):
        Tap.parse(text)
