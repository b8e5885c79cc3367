/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The datapath `broadcast`: every local packet is copied to every workload of the pod, and whoever is
 * not meant drops it. The one public system that carries `localhost` between runtimes works so. There
 * guests' own stacks have to bear with copies that they do not want, and answer them with resets; here
 * each copy meets a program at the workload's door, which alone knows whether it is wanted.
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
 * Addresses are translated at the door, as `capture` does it.
 */

/* clang-format off */
#define BPF_LICENSE Dual BSD/GPL
/* clang-format on */

/* Why a packet was counted: a row of `counters`. Same order as REASONS in broadcast.py. */
enum reason {
	REASON_TOO_BIG,	  /* dropped: a datagram from a native, larger than the guests' link */
	REASON_SPOOFED,	  /* dropped: a guest claims what is not its own */
	REASON_TRUNCATED, /* dropped: too short for its headers */
	REASON_UNHANDLED, /* dropped: a protocol that has no ports, an extension header */
	REASON_FRAGMENT_ORPHAN, /* dropped: a fragment whose first was not seen */
	REASON_NO_GUEST,	/* dropped: the guest is down */
	REASON_ODD_SOURCE, /* passed on: a native flow with other addresses than 127.0.0.1, ::1 */
	REASON_ANSWERED,   /* ARP request or neighbor solicitation */
	REASON_COPIED,	   /* copies made */
	REASON_UNWANTED,   /* copies dropped, as another workload is meant */
	REASONS,
};

#include "pod.h"

#define MAX_COPIES 64 /* as in broadcast.py */

BPF_ARRAY(sizes, u32, SLOTS); /* guests in the pod, numbered from 1 */

/* One to every guest, as the packet stands. */
static __always_inline void copy_to_guests(struct __sk_buff *skb, u8 slot)
{
	u32 key = slot, *size = sizes.lookup(&key);
	u32 n, ifindex, copies = 0;

	if (!size)
		return;
	for (n = 1; n <= MAX_COPIES; n++) {
		if (n > *size)
			break;
		ifindex = port_of(slot, n);
		if (!ifindex)
			continue;
		bpf_clone_redirect(skb, ifindex, 0);
		copies++;
	}
	tally_times(skb, slot, REASON_COPIED, copies);
}

/* What natives send to natives, or to guests: nobody knows. */
int lo_egress(struct __sk_buff *skb)
{
	struct here here = where(skb);

	if (skb->protocol == bpf_htons(ETH_P_IP) || skb->protocol == bpf_htons(ETH_P_IPV6))
		copy_to_guests(skb, here.slot);
	return TC_ACT_OK;
}

/* The natives' own copy: a socket of theirs would answer what is meant for a guest, with a reset. */
int lo_ingress(struct __sk_buff *skb)
{
	struct here here = where(skb);
	struct packet p = {};

	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return TC_ACT_OK;
	parse(skb, &p, here.slot, LO);
	if (p.fault != FINE)
		return TC_ACT_OK;
	if (p.destination.kind == NATIVE_VIEW
		    ? !port_of(here.slot, p.destination.n)
		    : is_icmp(p.protocol) || serving(here.slot, p.protocol, p.destination_port) < 0)
		return TC_ACT_OK;
	return drop(skb, here.slot, REASON_UNWANTED);
}

/* A native's packet is for guest n if it owns the port, or is known to natives by that address. */
static __always_inline int native_to_guest(struct __sk_buff *skb, struct here here,
					   struct packet *p)
{
	struct address source = as(NATIVE_SOURCE, 0);

	if (p->destination.kind == NATIVE_VIEW) {
		if (p->destination.n != here.n)
			return drop(skb, here.slot, REASON_UNWANTED);
		source = as(ALIAS, 0);
	} else if (is_icmp(p->protocol) ||
		   owner(here.slot, p->protocol, p->destination_port) != here.n) {
		return drop(skb, here.slot, REASON_UNWANTED);
	} else if (p->source.kind != LOOPBACK || p->destination.kind != LOOPBACK) {
		struct odd_key flow = {here.slot, here.n,	  p->protocol,
				       p->v6,	  p->source_port, p->destination_port};

		source = as(NATIVE_SOURCE_ODD, 0);
		tally(skb, here.slot, REASON_ODD_SOURCE);
		if (!p->error)
			odd.update(&flow, (struct odd_addresses *)p->from);
	}
	if (skb->len - ETH_HLEN > LINK_MTU && !skb->gso_size)
		return drop(skb, here.slot, REASON_TOO_BIG);
	if (p->syn)
		clamp_mss(skb, p);
	if (rewrite(skb, p, source, as(LINK, here.n), here.n))
		return drop(skb, here.slot, REASON_TRUNCATED);
	if (source.kind == ALIAS)
		carry(skb, here.slot, here.n, 0);
	else
		carry(skb, here.slot, 0, here.n);
	return TC_ACT_OK;
}

static __always_inline int guest_to_guest(struct __sk_buff *skb, struct here here, struct packet *p)
{
	struct address source = as(GUEST_VIEW, p->source.n);
	u8 client = p->source.n, server = here.n;

	if (p->destination.kind == GUEST_VIEW && p->destination.n == here.n) {
		source = as(ALIAS, 0);
		client = here.n;
		server = p->source.n;
	} else if (p->destination.kind != ALIAS || is_icmp(p->protocol) ||
		   owner(here.slot, p->protocol, p->destination_port) != here.n) {
		return drop(skb, here.slot, REASON_UNWANTED);
	}
	if (rewrite(skb, p, source, as(LINK, here.n), here.n))
		return drop(skb, here.slot, REASON_TRUNCATED);
	carry(skb, here.slot, client, server);
	return TC_ACT_OK;
}

/* To guest n: what the pod's stack itself sends it has the guest's address, all else is a copy. */
int port_egress(struct __sk_buff *skb)
{
	struct here here = where(skb);
	struct packet p = {};

	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return TC_ACT_OK;
	parse(skb, &p, here.slot, UPLINK);
	switch (p.destination.kind) {
	case LINK:
	case LINK_LOCAL:
	case MULTICAST:
		return TC_ACT_OK;
	}
	if (p.fault != FINE)
		return drop_fault(skb, here.slot, p.fault);
	return p.source.kind == LINK ? guest_to_guest(skb, here, &p)
				     : native_to_guest(skb, here, &p);
}

/* From guest n to `localhost`, or its answer to somebody who dialed it there. */
int port_ingress(struct __sk_buff *skb)
{
	struct here here = where(skb);
	struct packet p = {};
	int verdict;

	wake(skb, here);
	verdict = admit(skb, here, &p);
	if (verdict != ADMITTED)
		return verdict;
	switch (p.destination.kind) {
	case ALIAS:
		break;
	case NATIVE_SOURCE:
	case NATIVE_SOURCE_ODD:
	case GUEST_VIEW:
		if (owner(here.slot, p.protocol, p.source_port) == here.n)
			break;
		/* fall through */
	default:
		return drop(skb, here.slot, REASON_SPOOFED);
	}
	/* What the verifier knows, it would go through again for each copy. */
	forget_headers(skb, &p);
	p.destination.kind = forget(skb, p.destination.kind);
	p.v6 = forget(skb, p.v6);
	copy_to_guests(skb, here.slot);
	tally(skb, here.slot, REASON_COPIED);
	if (p.destination.kind == GUEST_VIEW ||
	    (p.destination.kind == ALIAS && !is_icmp(p.protocol) &&
	     serving(here.slot, p.protocol, p.destination_port) >= 0))
		return drop(skb, here.slot, REASON_UNWANTED);
	return enter_lo(skb, here.slot, &p);
}
