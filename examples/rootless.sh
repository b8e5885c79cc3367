#!/bin/bash
# Holds the networks of podman's rootless containers to the conformance suite: pasta, slirp4netns.
#
#   ./bootstrap --tests examples/rootless.sh pasta --check connect --check refused
#   ./bootstrap --tests examples/rootless.sh slirp4netns --family ipv4
#
# A namespace stands for the host, with the suite's natives in it. The traffic agent is the
# container, in a namespace of its own, and the network forwards ports between the two: pasta from
# loopback to loopback; slirp4netns from the host's loopback to the container's address, and from
# 10.0.2.2 to the host's loopback, so the container's hosts file says so. Arguments after the network
# are those of `testbed conformance`.
set -euo pipefail

network=${1-} control=4710 first=8064 last=8095 natives=8000-8063
host=host-$$ guest=guest-$$
case $network in
pasta) package=passt ;;
slirp4netns) package=slirp4netns ;;
*) echo "$0: no network '$network': type pasta or slirp4netns" >&2 && exit 2 ;;
esac
command -v "$network" >/dev/null ||
  { echo "$0: no $network here: apt-get install $package" >&2 && exit 3; }
shift
work=$(mktemp -d)
end() {
  set +e # what is left is taken down, too
  jobs -p | xargs -r kill
  for name in "$host" "$guest"; do
    [[ ! -e /run/netns/$name ]] || ip netns del "$name"
  done
  rm -r "$work"
}
trap end EXIT

"$(dirname "$0")/../bootstrap" testbed conformance --bundle "$work/suite.tar.gz" >"$work/log"
tar -xf "$work/suite.tar.gz" -C "$work"
suite=$(echo "$work"/testbed-conformance-*)
agent=("$suite/agent/static" --control-port "$control")
ip netns add "$host"
ip -n "$host" link set lo up

exec 3>&2
case $network in
pasta)
  ip -n "$host" link add uplink type veth peer outside # pasta takes addresses and routes from a link
  ip -n "$host" link set outside up
  ip -n "$host" addr add 192.0.2.2/24 dev uplink
  ip -n "$host" addr add 2001:db8::2/64 dev uplink nodad
  ip -n "$host" link set uplink up
  ip -n "$host" route add default via 192.0.2.1
  ip -n "$host" route add default via 2001:db8::1
  ip netns exec "$host" pasta --foreground --quiet --config-net --runas 0 \
    --tcp-ports "$control,$first-$last" --udp-ports "$first-$last" \
    --tcp-ns "$natives" --udp-ns "$natives" -- setpriv --pdeathsig KILL "${agent[@]}" &
  ;;
slirp4netns)
  ip netns add "$guest"
  ip -n "$guest" link set lo up
  ip netns exec "$host" slirp4netns --configure --netns-type=path \
    --api-socket "$work/api" "/run/netns/$guest" eth0 &
  until [[ -S $work/api ]]; do
    kill -0 $! || { cat "$work/network" >&3 && exit 3; }
    sleep 0.1
  done
  python3 - "$work/api" "$control" $(seq "$first" "$last") <<'PYTHON'
import json, socket, sys

for port in map(int, sys.argv[2:]):
    for proto in ("tcp", "udp"):
        arguments = dict(proto=proto, host_addr="127.0.0.1", host_port=port, guest_port=port)
        with socket.socket(socket.AF_UNIX) as api:
            api.connect(sys.argv[1])
            api.sendall(json.dumps(dict(execute="add_hostfwd", arguments=arguments)).encode())
            api.shutdown(socket.SHUT_WR)
            assert "error" not in json.loads(api.recv(10000)), port
PYTHON
  echo 10.0.2.2 localhost >"$work/hosts"
  nsenter --net="/run/netns/$guest" unshare --mount \
    sh -c 'mount --bind "$0" /etc/hosts && exec "$@"' "$work/hosts" "${agent[@]}" &
  ;;
esac >"$work/network" 2>&1
"$suite/conformance" --netns "/run/netns/$host" --control "127.0.0.1:$control" "$@"
