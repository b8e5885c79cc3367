"""The servers' end of cells between two hosts: their pod, on the host that measures nothing.

    python -m testbed.campaigns.far_end

Its `Side` comes as one line of JSON on standard input. When the pod is ready, a line of JSON leaves
by standard output: what it lacks, or its error. The pod stands until nobody listens any more, as
a worker works.
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
            client: datapath.far for pair in datapath.pairs for client, _ in roles.ends(pair)
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
