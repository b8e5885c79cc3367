"""Far end of cells between two hosts: runs the servers' pod on the second host.

    python -m testbed.campaigns.far_end

It reads its `Side` as one line of JSON from standard input. When the pod is ready, it writes one
line of JSON to standard output: what this side does not support, or an error. It measures nothing.
The pod stands until standard input ends or falls silent, as for a worker.
"""

from __future__ import annotations

import json
import signal
import sys

from testbed import runtimes
from testbed.campaigns import roles
from testbed.campaigns.protocol import end_when_nobody_listens
from testbed.datapaths.between_hosts import Side
from testbed.datapaths.routed import Routed
from testbed.host import ledger
from testbed.host.ledger import Owner
from testbed.model.errors import Error
from testbed.model.terms import Runtime
from testbed.pods.pod import Pod
from testbed.runtimes import interface


def main() -> None:
    """Entry of `python -m testbed.campaigns.far_end`."""
    side = Side.from_json(json.loads(sys.stdin.readline()))
    end_when_nobody_listens()
    try:
        program = runtimes.prepare(Runtime.PROCESS, interface.Options())
        datapath = Routed(side)
        manifest = roles.manifest(datapath.pairs, Runtime.STANDIN)
        clients = {
            client: datapath.server_addresses
            for pair in datapath.pairs
            for client, _ in roles.ends(pair)
        }
        with Owner() as owner:
            consoles = ledger.create_folder(owner, f"{owner.id}-consoles")
            with Pod(
                owner,
                "far",
                manifest,
                datapath,
                {Runtime.PROCESS: program},
                consoles,
                elsewhere=clients,
            ) as pod:
                pod.start()
                print(json.dumps({"lacks": side.lacking()}), flush=True)
                signal.pause()
    except Error as e:
        print(json.dumps({"error": e.message, "hint": e.hint}))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
