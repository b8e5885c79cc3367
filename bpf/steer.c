/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The datapath `steer`: guests' ports are in the pod's namespace, so packets need not be moved.
 *
 *   pod's namespace
 *
 *   natives ---- lo ---- g1 ------ guest 1
 *                |       port_ingress
 *                |
 *                +------ g2 ------ guest 2
 *        lo_egress       port_ingress
 *
 * Always there is translation between `lo` and the ports, as in `capture`: it serves every process
 * of the namespace, whatever its socket is bound to.
 *
 *   native to guest:   lo_egress > g1       back: port_ingress > lo
 *   guest to native:   port_ingress > lo    back: lo_egress > g1
 *   guest to guest:    port_ingress > g2    back: port_ingress > g1
 */

/* clang-format off */
#define BPF_LICENSE Dual BSD/GPL
/* clang-format on */

/* Why a packet was counted: a row of `counters`. Same order as REASONS in steer.py. */
enum reason {
	REASON_TOO_BIG,	  /* dropped: a datagram from a native, larger than the guests' link */
	REASON_SPOOFED,	  /* dropped: a guest claims what is not its own */
	REASON_TRUNCATED, /* dropped: too short for its headers */
	REASON_UNHANDLED, /* dropped: a protocol that has no ports, an extension header */
	REASON_FRAGMENT_ORPHAN, /* dropped: a fragment whose first was not seen */
	REASON_NO_GUEST,	/* dropped: the guest has no link */
	REASON_ODD_SOURCE, /* passed on: a native flow with other addresses than 127.0.0.1, ::1 */
	REASON_ANSWERED,   /* ARP request or neighbor solicitation */
	REASONS,
};

#include "pod.h"

/* Out of `lo`, to a guest's port. */
int lo_egress(struct __sk_buff *skb)
{
	struct here here = where(skb);
	u8 to = 0;
	int verdict = leave_lo(skb, here, &to);

	return verdict == TO_GUEST ? redirect_to_guest(skb, here.slot, to) : verdict;
}

/* From guest n, to whoever owns the port; all else is the namespace's. */
int port_ingress(struct __sk_buff *skb)
{
	struct here here = where(skb);
	struct packet p = {};
	u8 to = 0;
	int verdict = leave_port(skb, here, &p, &to);

	switch (verdict) {
	case TO_GUEST:
		return redirect_to_guest(skb, here.slot, to);
	case TO_NATIVE:
		return enter_lo(skb, here.slot, &p);
	}
	return verdict;
}
