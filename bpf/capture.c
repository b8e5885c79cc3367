/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The datapath `capture`: packets for `localhost` are moved out of the pod's `lo` to the guest that
 * owns the port, and from a guest's port to whoever owns it.
 *
 *   pod's namespace          :            node's namespace
 *                            :               bridge
 *   lo ---------- eth0 ------:------ u ---------+--------- g1 ------ guest 1
 *   lo_egress     uplink_    :   router         |     port_ingress
 *                 ingress    :   bridge_egress  |     bridge_egress
 *                            :                  +--------- g2 ------ guest 2
 *
 *   native to guest:   lo_egress > eth0 > router > g1       back: port_ingress > uplink_ingress > lo
 *   guest to native:   port_ingress > uplink_ingress > lo   back: lo_egress > eth0 > router > g1
 *   guest to guest:    port_ingress > g2                    back: port_ingress > g1
 *
 * What takes part in a flow is told by addresses and port owners alone; nothing depends on state but
 * fragments, and native flows that are not from 127.0.0.1 to 127.0.0.1.
 *
 * The programs are loaded once for all pods. A tc filter's class says where a program stands
 * (cls_bpf puts it, 16 bits, into tc_classid): the pod's slot in the high byte, the guest's number
 * in the low. Slot 0, guest 0 is what BPF_PROG_TEST_RUN gets.
 */

/* clang-format off */
#define BPF_LICENSE Dual BSD/GPL
/* clang-format on */

/* On what our programs redirect; bridged frames have none, as crossing namespaces clears it. */
#define MARK 0x77000001

/* Why a packet was counted: a row of `counters`. Same order as REASONS in capture.py. */
enum reason {
	REASON_TOO_BIG,	  /* dropped: a datagram from a native, larger than the guests' link */
	REASON_SPOOFED,	  /* dropped: a guest claims what is not its own */
	REASON_OUTSIDE,	  /* dropped: bridged traffic with addresses that only we may use */
	REASON_TRUNCATED, /* dropped: too short for its headers */
	REASON_UNHANDLED, /* dropped: a protocol that has no ports, an extension header */
	REASON_FRAGMENT_ORPHAN, /* dropped: a fragment whose first was not seen */
	REASON_NO_GUEST,	/* passed on, to be refused: the guest is down, or has no IPv6 */
	REASON_ODD_SOURCE, /* passed on: a native flow with other addresses than 127.0.0.1, ::1 */
	REASON_ANSWERED,   /* ARP request or neighbor solicitation */
	REASONS,
};

#include "pod.h"

struct pod {
	u32 uplink;	 /* in the pod's namespace; 0: no such pod */
	u32 uplink_peer; /* in the node's */
};

BPF_ARRAY(pods, struct pod, SLOTS);

static __always_inline int redirect_marked(struct __sk_buff *skb, u8 slot, u8 n)
{
	skb->mark = MARK;
	return redirect_to_guest(skb, slot, n);
}

/* Straight to the other end's tc ingress in the pod's namespace, without passing bridge_egress. */
static __always_inline int redirect_to_pod(struct __sk_buff *skb, u8 slot)
{
	u32 key = slot;
	struct pod *pod = pods.lookup(&key);

	if (!pod)
		return TC_ACT_SHOT;
	return bpf_redirect_peer(pod->uplink_peer, 0);
}

/* Out of `lo`, towards the node's namespace. */
int lo_egress(struct __sk_buff *skb)
{
	struct here here = where(skb);
	u32 key = here.slot;
	struct pod *pod;
	u8 to = 0;
	int verdict = leave_lo(skb, here, &to);

	if (verdict != TO_GUEST)
		return verdict;
	pod = pods.lookup(&key);
	if (!pod)
		return TC_ACT_SHOT;
	return bpf_redirect(pod->uplink, 0);
}

/* What comes from the pod: translated packets to their guests, all else to the bridge. */
int router(struct __sk_buff *skb)
{
	struct here here = where(skb);
	struct address destination;
	struct packet p = {};

	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
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
			return redirect_marked(skb, here.slot, destination.n);
	}
	return TC_ACT_OK;
}

/* From the bridge to a guest or to the pod. Our own packets have the mark, or do not come by here;
 * others may not pretend to be such.
 */
int bridge_egress(struct __sk_buff *skb)
{
	struct here here = where(skb);
	struct neighbor says = {};
	struct packet p = {};

	if (skb->mark == MARK)
		return TC_ACT_OK;
	if (skb->protocol == bpf_htons(ETH_P_ARP)) {
		struct arp arp;

		if (parse_arp(skb, &arp, &says) || is_reserved(says.claimed))
			return drop(skb, here.slot, REASON_OUTSIDE);
		return TC_ACT_OK;
	}
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return drop(skb, here.slot, REASON_OUTSIDE);
	if (!parse_ip(skb, &p)) {
		if (!p.later)
			p.fault = parse_l4(skb, &p);
		classify_addresses(&p);
	}
	if (is_reserved(p.source) || is_reserved(p.destination))
		return drop(skb, here.slot, REASON_OUTSIDE);
	if (!p.later && is_nd(&p) && (parse_nd(skb, &p, &says) || is_reserved(says.claimed)))
		return drop(skb, here.slot, REASON_OUTSIDE);
	return TC_ACT_OK;
}

/* From guest n: to a guest at once, to natives by way of the pod; all else is the bridge's. */
int port_ingress(struct __sk_buff *skb)
{
	struct here here = where(skb);
	struct packet p = {};
	u8 to = 0;
	int verdict;

	wake(skb, here);
	verdict = leave_port(skb, here, &p, &to);
	switch (verdict) {
	case TO_GUEST:
		return redirect_marked(skb, here.slot, to);
	case TO_NATIVE:
		return redirect_to_pod(skb, here.slot);
	case TC_ACT_REDIRECT:
		skb->mark = MARK;
	}
	return verdict;
}

/* Into the pod: what port_ingress redirected goes to `lo`. Nobody else can send it: bridge_egress
 * stands before.
 */
int uplink_ingress(struct __sk_buff *skb)
{
	struct here here = where(skb);
	struct packet p = {};

	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return TC_ACT_OK;
	parse(skb, &p, here.slot, UPLINK);
	if (p.source.kind != LINK || !is_reserved(p.destination))
		return TC_ACT_OK;
	if (p.fault != FINE)
		return drop_fault(skb, here.slot, p.fault);
	return enter_lo(skb, here.slot, &p);
}
