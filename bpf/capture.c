/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The datapath `capture`: moves packets for `localhost` from the pod's `lo` to the guest that owns
 * the port, and from a guest's port to the owner of the port that it dialed.
 *
 *   pod's namespace              :      namespace of the links
 *                                :              bridge
 *   lo ---------- guests --------:---- pod --------+--------- g1 ------ guest 1
 *   lo_egress     uplink_egress  :  router         |     port_ingress
 *                 uplink_ingress :  bridge_egress  |     bridge_egress
 *                                :                 +--------- g2 ------ guest 2
 *
 *   native to guest:   lo_egress > guests > router > g1    back: port_ingress > uplink_ingress > lo
 *   guest to native:   port_ingress > uplink_ingress > lo  back: lo_egress > guests > router > g1
 *   guest to guest:    port_ingress > g2                   back: port_ingress > g1
 *
 * The addresses of a packet and the owners of its ports tell who its ends are. Only fragments need
 * state, and native flows that are not from 127.0.0.1 to 127.0.0.1.
 */

/* Why a packet was counted: an index of `counters` in struct pod_state. Python reads names and order
 * from here; pod.h needs them.
 */
enum reason {
	REASON_TOO_BIG,	  /* dropped: a datagram from a native, larger than the guests' link */
	REASON_SPOOFED,	  /* dropped: the sender claims an address or port that is not its own */
	REASON_OUTSIDE,	  /* dropped: bridged traffic with addresses that only we may use */
	REASON_TRUNCATED, /* dropped: too short for its headers */
	REASON_UNHANDLED, /* dropped: no ports, an extension header, an ICMP error for nobody */
	REASON_FRAGMENT_ORPHAN, /* dropped: a fragment whose first was not seen */
	REASON_NO_GUEST,	/* passed on, to be refused: the guest is down, or has no IPv6 */
	REASON_ODD_SOURCE, /* passed on: a native flow with other addresses than 127.0.0.1, ::1 */
	REASON_ANSWERED,   /* ARP request or neighbor solicitation */
	REASONS,
};

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/pkt_cls.h>

#include "addresses.h"
#include "common.h"
#include "maps.h"
#include "neighbor.h"
#include "packet.h"
#include "pod.h"

/* ifindex of either end of the pod's veth */
struct pod {
	u32 uplink;	 /* in the pod's namespace; 0: no such pod */
	u32 uplink_peer; /* in the namespace of the links */
};

BPF_ARRAY(pods, struct pod, SLOTS); /* slot */

/* To tc ingress of the veth's end in the pod's namespace, past bridge_egress. */
static __always_inline int redirect_to_pod(u8 slot)
{
	u32 key = slot;
	struct pod *pod = pods.lookup(&key);

	if (!pod)
		return TC_ACT_SHOT;
	return bpf_redirect_peer(pod->uplink_peer, 0);
}

/* `lo` egress: packets for guests leave by the pod's veth. */
static __always_inline int lo_egress(struct __sk_buff *skb)
{
	struct port port = port_of(skb);
	u32 key = port.slot;
	struct pod *pod;
	u8 to = 0;
	int verdict = leave_lo(skb, port, &to);

	if (verdict != TO_GUEST)
		return verdict;
	pod = pods.lookup(&key);
	if (!pod)
		return TC_ACT_SHOT;
	skb->mark = MARK_REDIRECTED;
	return bpf_redirect(pod->uplink, 0);
}

/* Egress of the veth's end in the pod's namespace: checks what the namespace's own stack sends. */
static __always_inline int uplink_egress(struct __sk_buff *skb)
{
	struct address source = {};

	if (skb->mark == MARK_REDIRECTED || !has_forged_source(skb, &source))
		return TC_ACT_OK;
	return drop(skb, port_of(skb).slot, REASON_SPOOFED);
}

/* Ingress of the veth's end in the namespace of the links: sends translated packets to their
 * guests. The bridge takes all others.
 */
static __always_inline int router(struct __sk_buff *skb)
{
	struct port port = port_of(skb);
	struct address destination;
	struct packet p = {};

	if (!is_ip(skb))
		return TC_ACT_OK;
	if (parse_ip(skb, &p))
		return TC_ACT_OK;
	switch (source_of(&p).kind) {
	case ALIAS:
	case NATIVE_SOURCE:
	case NATIVE_SOURCE_ODD:
	case GUEST_VIEW:
		destination = destination_of(&p);
		if (destination.kind == LINK)
			return redirect_marked(skb, port.slot, destination.n);
	}
	return TC_ACT_OK;
}

/* Egress of the bridge's ports, to a guest or to the pod: drops what has a reserved address.
 * Packets that the programs redirect have the mark, or do not pass here.
 */
static __always_inline int bridge_egress(struct __sk_buff *skb)
{
	struct port port = port_of(skb);
	struct neighbor says = {};
	struct packet p = {};

	if (skb->mark == MARK_REDIRECTED)
		return TC_ACT_OK;
	if (skb->protocol == bpf_htons(ETH_P_ARP)) {
		struct arp arp;

		if (parse_arp(skb, &arp, &says) || is_reserved(says.claimed))
			return drop(skb, port.slot, REASON_OUTSIDE);
		return TC_ACT_OK;
	}
	if (!is_ip(skb))
		return drop(skb, port.slot, REASON_OUTSIDE);
	if (!parse_ip(skb, &p)) {
		if (!p.is_later_fragment)
			p.fault = parse_l4(skb, &p);
		p.source = source_of(&p);
		p.destination = destination_of(&p);
	}
	if (is_reserved(p.source) || is_reserved(p.destination) ||
	    (p.v6 && is_extension(p.l4_protocol)))
		return drop(skb, port.slot, REASON_OUTSIDE);
	if (!p.is_later_fragment && is_nd(&p) &&
	    (parse_nd(skb, &p, &says) || is_reserved(says.claimed)))
		return drop(skb, port.slot, REASON_OUTSIDE);
	return TC_ACT_OK;
}

static __always_inline int redirect_from_port(struct __sk_buff *skb, struct port port, int verdict,
					      u8 to)
{
	switch (verdict) {
	case TO_GUEST:
		return redirect_marked(skb, port.slot, to);
	case TO_NATIVE:
		return redirect_to_pod(port.slot);
	}
	return verdict;
}

/* port_ingress() for plain packets (pod.h) */
static __always_inline int port_ingress_fast(struct __sk_buff *skb, struct port port, const bool v6)
{
	struct packet p = {};
	u8 to = 0;

	if (!parse_plain_of_guest(skb, port, &p, v6))
		return NOT_ON_FAST_PATH;
	return redirect_from_port(skb, port, leave_port_fast(skb, port, &p, &to), to);
}

/* Ingress of guest n's port: redirects packets to guests, or into the pod if they are for natives.
 * The bridge takes those that are not for `localhost`.
 */
static __always_inline int port_ingress(struct __sk_buff *skb)
{
	struct port port = port_of(skb);
	struct packet p = {};
	u8 to = 0;
	int verdict;

	mark_guest_up(skb, port);
	verdict = is_ipv6(skb) ? port_ingress_fast(skb, port, true)
			       : port_ingress_fast(skb, port, false);
	if (verdict != NOT_ON_FAST_PATH)
		return verdict;
	port = hide_port(skb, port);
	return redirect_from_port(skb, port, leave_port(skb, port, &p, &to), to);
}

/* uplink_ingress() for plain packets (pod.h) */
static __always_inline int uplink_ingress_fast(struct __sk_buff *skb, u8 slot, const bool v6)
{
	struct packet p = {};

	if (!parse_plain(skb, &p, v6))
		return NOT_ON_FAST_PATH;
	p.source = source_of(&p);
	p.destination = destination_of(&p);
	if (p.source.kind != LINK ||
	    (p.destination.kind != ALIAS && p.destination.kind != NATIVE_SOURCE))
		return NOT_ON_FAST_PATH;
	return enter_lo(skb, slot, &p);
}

/* Ingress of the veth's end in the pod's namespace: redirects into `lo` what port_ingress
 * redirected. Others cannot send such packets, as bridge_egress drops them.
 */
static __always_inline int uplink_ingress(struct __sk_buff *skb)
{
	struct port port = port_of(skb);
	struct packet p = {};
	int verdict = is_ipv6(skb) ? uplink_ingress_fast(skb, port.slot, true)
				   : uplink_ingress_fast(skb, port.slot, false);

	if (verdict != NOT_ON_FAST_PATH)
		return verdict;
	port = hide_port(skb, port);
	if (!is_ip(skb))
		return TC_ACT_OK;
	parse(skb, &p, port.slot, HOOK_UPLINK, 0);
	if (p.source.kind != LINK || !is_reserved(p.destination))
		return TC_ACT_OK;
	if (p.fault != FAULT_NONE)
		return drop_fault(skb, port.slot, p.fault);
	return enter_lo(skb, port.slot, &p);
}

TC_PROGRAM(lo_egress)
TC_PROGRAM(uplink_egress)
TC_PROGRAM(router)
TC_PROGRAM(bridge_egress)
TC_PROGRAM(port_ingress)
TC_PROGRAM(uplink_ingress)
