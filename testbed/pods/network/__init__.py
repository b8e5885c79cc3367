"""Network of pods outside `localhost`: the node's network, gateway of guests, DNS relay."""
