/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The datapath `broadcast`: copies every local packet to every workload of the pod, and each
 * workload that is not its owner drops it. The one public system that carries `localhost` between
 * runtimes works so. There the guests' own stacks receive the copies that are not for them, and
 * answer with resets; here a program at each guest's port drops them.
 *
 *   pod's namespace
 *
 *   natives ---- lo ---------- g1 ------ guest 1
 *                lo_egress |   port_ingress
 *                lo_ingress|   port_egress
 *                          +-- g2 ------ guest 2
 *
 *   from a native:   lo_egress > lo_ingress, and a copy > port_egress of every guest
 *   from a guest:    port_ingress > lo (if wanted), and a copy > port_egress of every guest
 *
 * Addresses are translated at the guest's port, as in `capture`.
 */

/* Why a packet was counted: an index of `counters` in struct pod_state. Python reads names and order
 * from here; pod.h needs them.
 */
enum reason {
	REASON_TOO_BIG,	  /* dropped: a datagram from a native, larger than the guests' link */
	REASON_SPOOFED,	  /* dropped: the sender claims an address or port that is not its own */
	REASON_TRUNCATED, /* dropped: too short for its headers */
	REASON_UNHANDLED, /* dropped: no ports, an extension header, an ICMP error for nobody */
	REASON_FRAGMENT_ORPHAN, /* dropped: a fragment whose first was not seen */
	REASON_NO_GUEST,	/* dropped: the guest is down */
	REASON_ODD_SOURCE, /* passed on: a native flow with other addresses than 127.0.0.1, ::1 */
	REASON_ANSWERED,   /* ARP request or neighbor solicitation */
	REASON_COPIED,	   /* copies made */
	REASON_UNWANTED,   /* copies dropped, as another workload is meant */
	REASONS,
};

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/pkt_cls.h>

#include "addresses.h"
#include "common.h"
#include "maps.h"
#include "packet.h"
#include "pod.h"

#define MAX_COPIES 64 /* as in broadcast.py; the verifier follows each */

BPF_ARRAY(pod_guests, u32, SLOTS); /* slot: number of guests in the pod, which have n from 1 */

/* Sends a copy of the packet to every guest. */
static __always_inline void copy_to_guests(struct __sk_buff *skb, u8 slot)
{
	u32 key = slot, *total = pod_guests.lookup(&key);
	u32 n, ifindex, copies = 0;

	if (!total)
		return;
	for (n = 1; n <= MAX_COPIES; n++) {
		if (n > *total)
			break;
		ifindex = guest_ifindex(slot, n);
		if (!ifindex)
			continue;
		bpf_clone_redirect(skb, ifindex, 0);
		copies = hide(skb, copies + 1); /* else the verifier goes on with each number */
	}
	count_reason_times(skb, slot, REASON_COPIED, copies);
}

/* `lo` egress: copies what natives send, whoever it is for, to all guests. */
static __always_inline int lo_egress(struct __sk_buff *skb)
{
	struct port port = port_of(skb);

	if (is_ip(skb))
		copy_to_guests(skb, port.slot);
	return TC_ACT_OK;
}

/* `lo` ingress: drops the natives' copy of a packet for a guest, which the kernel would answer with
 * a reset.
 */
static __always_inline int lo_ingress(struct __sk_buff *skb)
{
	struct port port = port_of(skb);
	struct packet p = {};

	if (!is_ip(skb))
		return TC_ACT_OK;
	parse(skb, &p, port.slot, HOOK_LO, 0);
	if (p.fault != FAULT_NONE)
		return TC_ACT_OK;
	if (p.destination.kind == NATIVE_VIEW
		    ? !guest_ifindex(port.slot, p.destination.n)
		    : is_icmp(p.protocol) ||
			      owner_if_up(port.slot, p.protocol, p.destination_port) < 0)
		return TC_ACT_OK;
	return drop(skb, port.slot, REASON_UNWANTED);
}

/* A native's packet is for guest n if n owns the port, or if it goes to n's view. */
static __always_inline int native_to_guest(struct __sk_buff *skb, struct port port,
					   struct packet *p)
{
	struct address source = address_of(NATIVE_SOURCE, 0);

	if (p->destination.kind == NATIVE_VIEW) {
		if (p->destination.n != port.n)
			return drop(skb, port.slot, REASON_UNWANTED);
		source = address_of(ALIAS, 0);
	} else if (is_icmp(p->protocol) ||
		   owner_of(port.slot, p->protocol, p->destination_port) != port.n) {
		return drop(skb, port.slot, REASON_UNWANTED);
	} else if (p->source.kind != LOOPBACK || p->destination.kind != LOOPBACK) {
		source = address_of(NATIVE_SOURCE_ODD, 0);
		count_reason(skb, port.slot, REASON_ODD_SOURCE);
		store_nonstandard_flow(p, port.slot, port.n);
	}
	if (is_too_big(skb))
		return drop(skb, port.slot, REASON_TOO_BIG);
	if (p->syn)
		clamp_mss(skb, p);
	if (rewrite(skb, p, source, address_of(LINK, port.n), port.n))
		return drop(skb, port.slot, REASON_TRUNCATED);
	count_native(skb, port.slot, port.n, GUEST_RECEIVES,
		     source.kind == ALIAS ? GUEST_DIALS : GUEST_SERVES);
	return TC_ACT_OK;
}

static __always_inline int guest_to_guest(struct __sk_buff *skb, struct port port, struct packet *p)
{
	struct address source = address_of(GUEST_VIEW, p->source.n);
	u8 client = p->source.n, server = port.n;

	if (p->destination.kind == GUEST_VIEW && p->destination.n == port.n) {
		source = address_of(ALIAS, 0);
		client = port.n;
		server = p->source.n;
	} else if (p->destination.kind != ALIAS || is_icmp(p->protocol) ||
		   owner_of(port.slot, p->protocol, p->destination_port) != port.n) {
		return drop(skb, port.slot, REASON_UNWANTED);
	}
	if (rewrite(skb, p, source, address_of(LINK, port.n), port.n))
		return drop(skb, port.slot, REASON_TRUNCATED);
	count_guests(skb, port.slot, client, server);
	return TC_ACT_OK;
}

/* Egress of guest n's port: what the pod's own stack sends has the guest's address; the rest are
 * copies.
 */
static __always_inline int port_egress(struct __sk_buff *skb)
{
	struct port port = port_of(skb);
	struct packet p = {};

	if (!is_ip(skb))
		return TC_ACT_OK;
	parse(skb, &p, port.slot, HOOK_UPLINK, 0);
	switch (p.destination.kind) {
	case LINK:
	case LINK_LOCAL:
	case LINK_LOCAL_OTHER:
	case MULTICAST:
		return TC_ACT_OK;
	}
	if (p.fault != FAULT_NONE)
		return drop_fault(skb, port.slot, p.fault);
	return p.source.kind == LINK ? guest_to_guest(skb, port, &p)
				     : native_to_guest(skb, port, &p);
}

/* Ingress of guest n's port: it dials `localhost`, or answers somebody who dialed it there. */
static __always_inline int port_ingress(struct __sk_buff *skb)
{
	struct port port = port_of(skb);
	struct packet p = {};
	int verdict;

	mark_guest_up(skb, port);
	verdict = admit(skb, port, &p);
	if (verdict != ADMITTED)
		return verdict;
	switch (p.destination.kind) {
	case ALIAS:
		break;
	case NATIVE_SOURCE:
	case NATIVE_SOURCE_ODD:
	case GUEST_VIEW:
		if (owner_of(port.slot, p.protocol, p.source_port) == port.n)
			break;
		return drop(skb, port.slot, REASON_SPOOFED);
	default:
		return drop(skb, port.slot, REASON_SPOOFED);
	}
	/* Otherwise the verifier follows each copy once for each combination of these. */
	hide_headers(skb, &p);
	p.destination.kind = hide(skb, p.destination.kind);
	p.v6 = hide(skb, p.v6);
	copy_to_guests(skb, port.slot);
	count_reason(skb, port.slot, REASON_COPIED);
	if (p.destination.kind == GUEST_VIEW ||
	    (p.destination.kind == ALIAS && !is_icmp(p.protocol) &&
	     owner_if_up(port.slot, p.protocol, p.destination_port) >= 0))
		return drop(skb, port.slot, REASON_UNWANTED);
	return enter_lo(skb, port.slot, &p);
}

TC_PROGRAM(lo_egress)
TC_PROGRAM(lo_ingress)
TC_PROGRAM(port_egress)
TC_PROGRAM(port_ingress)
