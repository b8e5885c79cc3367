/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * What the tc datapaths share: which packets leave `lo` for a guest, what a guest may send and to
 * whom it goes, and how a packet enters `lo`.
 *
 * The file that includes this defines `enum reason` first (maps.h). How a packet gets from one link
 * to another is its business.
 */

#ifndef TESTBED_POD_H
#define TESTBED_POD_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/pkt_cls.h>

#include "addresses.h"
#include "common.h"
#include "maps.h"
#include "neighbor.h"
#include "packet.h"

#define LO_IFINDEX 1

/* Verdicts of the functions below, besides TC_ACT_OK, TC_ACT_SHOT and TC_ACT_REDIRECT. */
enum verdict {
	TO_GUEST = 1000, /* rewritten for a guest: redirect it to the guest's port */
	TO_NATIVE,	 /* as the guest sent it: bring it into `lo` */
	ADMITTED,	 /* a guest may send it: decide where it goes */
};

/* skb->mark of what the programs redirect. Crossing namespaces clears it, so others do not have it.
 */
#define MARK_REDIRECTED 0x77000001

static __always_inline int redirect_to_guest(struct __sk_buff *skb, u8 slot, u8 n)
{
	u32 ifindex = guest_ifindex(slot, n);

	if (!ifindex)
		return drop(skb, slot, REASON_NO_GUEST);
	return bpf_redirect(ifindex, 0);
}

static __always_inline int redirect_marked(struct __sk_buff *skb, u8 slot, u8 n)
{
	skb->mark = MARK_REDIRECTED;
	return redirect_to_guest(skb, slot, n);
}

/* The kernel drops a redirected packet that is too big without any message. */
static __always_inline bool is_too_big(struct __sk_buff *skb)
{
	return skb->len - ETH_HLEN > LINK_MTU && !skb->gso_size;
}

/* Whether a native sends from a guest's UDP port. */
static __always_inline bool is_from_guests_port(struct port port, const struct packet *p)
{
	return p->protocol == IPPROTO_UDP && owner_of(port.slot, p->protocol, p->source_port) >= 0;
}

/* --- fast paths ------------------------------------------------------------------------------
 *
 * A fast path decides about plain packets of usual flows, which are most, with as little work as can
 * be. It takes a packet only if all that the long way would check holds. Its return value for all
 * others is NOT_ON_FAST_PATH.
 */
#define NOT_ON_FAST_PATH -1

/* Hides from the verifier what it learned about a port on the ways out of a fast path. */
static __always_inline struct port hide_port(struct __sk_buff *skb, struct port port)
{
	port.slot = hide(skb, port.slot);
	port.n = hide(skb, port.n);
	return port;
}

/* leave_lo() for packets from 127.0.0.1 (::1) to it, or to a guest's native view */
static __always_inline int leave_lo_fast(struct __sk_buff *skb, struct port port, u8 *to,
					 const bool v6)
{
	enum role role = GUEST_SERVES;
	struct address source;
	struct packet p = {};
	int n;

	if (!parse_plain(skb, &p, v6) || source_of(&p).kind != LOOPBACK)
		return NOT_ON_FAST_PATH;
	p.destination = destination_of(&p);
	switch (p.destination.kind) {
	case LOOPBACK:
		n = lookup_owner(port.slot, p.protocol, p.destination_port);
		if (n < 0)
			return TC_ACT_OK;
		if (v6 && n & IPV4_ONLY)
			return NOT_ON_FAST_PATH;
		n = (u8)n;
		source = address_of(NATIVE_SOURCE, 0);
		break;
	case NATIVE_VIEW:
		if (is_from_guests_port(port, &p))
			return NOT_ON_FAST_PATH;
		n = p.destination.n;
		source = address_of(ALIAS, 0);
		role = GUEST_DIALS;
		break;
	default:
		return NOT_ON_FAST_PATH;
	}
	if (p.syn || !guest_ifindex(port.slot, n) || is_too_big(skb))
		return NOT_ON_FAST_PATH;
	if (rewrite(skb, &p, source, address_of(LINK, n), n))
		return drop(skb, port.slot, REASON_TRUNCATED);
	count_native(skb, port.slot, n, GUEST_RECEIVES, role);
	*to = n;
	return TO_GUEST;
}

/* Whether the packet's source is guest n's own address. */
static __always_inline bool has_source(const struct packet *p, u8 n)
{
	__be32 own[4] = {};

	if (!p->v6)
		return p->addresses[0] == render4(address_of(LINK, n));
	render6(address_of(LINK, n), own);
	return p->addresses[0] == own[0] && p->addresses[1] == own[1] &&
	       p->addresses[2] == own[2] && p->addresses[3] == own[3];
}

/* Whether the frame is from guest n's MAC. The Ethernet header of a received frame is linear. */
static __always_inline bool has_source_mac(struct __sk_buff *skb, u8 n)
{
	u8 mac[ETH_ALEN] = GUEST_MAC(n);
	struct ethhdr *eth = data_of(skb);

	return (void *)(eth + 1) <= data_end_of(skb) && same_mac(eth->h_source, mac);
}

/* Parses a plain packet that guest n may send: from its own MAC and address. */
static __always_inline bool parse_plain_of_guest(struct __sk_buff *skb, struct port port,
						 struct packet *p, const bool v6)
{
	if (!parse_plain(skb, p, v6) || skb->vlan_present || !has_source_mac(skb, port.n) ||
	    !has_source(p, port.n))
		return false;
	p->source = address_of(LINK, port.n);
	p->destination = destination_of(p);
	return true;
}

/* leave_port() for packets of parse_plain_of_guest(), but for the first and last ones of connections
 * between guests, which track_connection() is told of
 */
static __always_inline int leave_port_fast(struct __sk_buff *skb, struct port port,
					   struct packet *p, u8 *to)
{
	struct address source = address_of(GUEST_VIEW, port.n);
	u8 client = port.n, server = port.n;
	int n;

	switch (p->destination.kind) {
	case ALIAS:
		n = owner_of(port.slot, p->protocol, p->destination_port);
		if (n < 0)
			return TO_NATIVE;
		server = n;
		break;
	case NATIVE_SOURCE:
		n = owner_of(port.slot, p->protocol, p->source_port);
		return n == port.n ? TO_NATIVE : NOT_ON_FAST_PATH;
	case GUEST_VIEW:
		if (owner_of(port.slot, p->protocol, p->source_port) != port.n)
			return NOT_ON_FAST_PATH;
		n = client = p->destination.n;
		source = address_of(ALIAS, 0);
		break;
	default:
		return NOT_ON_FAST_PATH;
	}
	if (p->syn || p->fin || p->rst || !guest_ifindex(port.slot, n))
		return NOT_ON_FAST_PATH;
	if (rewrite(skb, p, source, address_of(LINK, n), n))
		return drop(skb, port.slot, REASON_TRUNCATED);
	count_guests(skb, port.slot, client, server);
	*to = n;
	return TO_GUEST;
}

/* --- the long way ---------------------------------------------------------------------------- */

/* At `lo` egress, before any socket: takes replies to guests, and packets to a port that a guest
 * owns, whatever address of the pod was dialed. The kernel's own loopback keeps all others. Returns
 * TO_GUEST and the guest in `to`, or a TC_ACT_.
 */
static __always_inline int leave_lo(struct __sk_buff *skb, struct port port, u8 *to)
{
	struct address source;
	struct packet p = {};
	int n, verdict = is_ipv6(skb) ? leave_lo_fast(skb, port, to, true)
				      : leave_lo_fast(skb, port, to, false);

	if (verdict != NOT_ON_FAST_PATH)
		return verdict;
	port = hide_port(skb, port);
	if (!is_ip(skb))
		return TC_ACT_OK;
	parse(skb, &p, port.slot, HOOK_LO, 0);
	/* From a guest's native view only the kernel sends on `lo`: it refuses for one that is down. */
	if (is_guests_own(p.source) || p.source.kind == GUEST_VIEW ||
	    (p.source.kind == NATIVE_VIEW && !p.rst && !p.is_icmp_error))
		return drop(skb, port.slot, REASON_SPOOFED);
	if (p.fault != FAULT_NONE || p.destination.kind == MULTICAST)
		return TC_ACT_OK;
	if (p.destination.kind == NATIVE_VIEW && guest_ifindex(port.slot, p.destination.n)) {
		n = p.destination.n;
		/* Only that guest answers from its port. A native may have it all the same. */
		if (!p.is_icmp_error && is_from_guests_port(port, &p))
			return drop(skb, port.slot, REASON_SPOOFED);
		/* From a native view the kernel refuses for a guest that is down. */
		source = p.source.kind == NATIVE_VIEW ? address_of(GUEST_VIEW, p.source.n)
						      : address_of(ALIAS, 0);
	} else {
		if (is_icmp(p.protocol))
			return TC_ACT_OK;
		n = lookup_owner(port.slot, p.protocol, p.destination_port);
		if (n < 0)
			return TC_ACT_OK;
		if ((p.v6 && n & IPV4_ONLY) || !guest_ifindex(port.slot, n)) {
			/* On `lo` no socket listens, so the kernel refuses it at once. */
			count_reason(skb, port.slot, REASON_NO_GUEST);
			return TC_ACT_OK;
		}
		n = (u8)n;
		source = address_of(NATIVE_SOURCE, 0);
		if (p.source.kind != LOOPBACK || p.destination.kind != LOOPBACK) {
			source = address_of(NATIVE_SOURCE_ODD, 0);
			count_reason(skb, port.slot, REASON_ODD_SOURCE);
			store_nonstandard_flow(&p, port.slot, n);
		}
	}

	if (is_too_big(skb))
		return drop(skb, port.slot, REASON_TOO_BIG);
	if (p.syn)
		clamp_mss(skb, &p);
	if (rewrite(skb, &p, source, address_of(LINK, n), n))
		return drop(skb, port.slot, REASON_TRUNCATED);
	if (source.kind == GUEST_VIEW)
		count_guests(skb, port.slot, source.n, n);
	else
		count_native(skb, port.slot, n, GUEST_RECEIVES,
			     source.kind == ALIAS ? GUEST_DIALS : GUEST_SERVES);
	*to = n;
	return TO_GUEST;
}

/* At egress of a link to guests: reads the source of a packet that the namespace's own stack sends.
 * Returns whether it is one that only a guest or a program may have; of ours, the stack may have the
 * alias. The kernel lets every process send from any address in IPv6 (IPV6_FREEBIND).
 */
static __always_inline bool has_forged_source(struct __sk_buff *skb, struct address *source)
{
	__be32 words[4];

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (!read(skb, ETH_HLEN + offsetof(struct iphdr, saddr), words, 4))
			*source = classify4(words[0]);
	} else if (is_ipv6(skb)) {
		if (!read(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), words, 16))
			*source = classify6(words);
	}
	if (is_guests_own(*source))
		return !skb->ingress_ifindex; /* else the stack forwards it from the guest */
	return is_reserved(*source) && source->kind != ALIAS;
}

/* Whether guest n may use an address as its own. */
static __always_inline bool may_claim(struct address claimed, u8 n)
{
	return (is_guests_own(claimed) && claimed.n == n) || claimed.kind == UNSPECIFIED;
}

/* Addresses that guests resolve to the alias's MAC. */
static __always_inline bool is_answered(struct address asked)
{
	return asked.kind == ALIAS || asked.kind == NATIVE_SOURCE ||
	       asked.kind == NATIVE_SOURCE_ODD || asked.kind == GUEST_VIEW;
}

/* Sends an answer to the guest that asked. */
static __always_inline int send_back(struct __sk_buff *skb)
{
	skb->mark = MARK_REDIRECTED;
	return bpf_redirect(skb->ifindex, 0);
}

static __always_inline int port_arp(struct __sk_buff *skb, struct port port)
{
	struct neighbor says = {};
	struct arp arp;

	if (parse_arp(skb, &arp, &says))
		return drop(skb, port.slot, REASON_UNHANDLED);
	says.claimed = hide_address(skb, says.claimed);
	says.asked = hide_address(skb, says.asked);
	if (!says.own_mac || !may_claim(says.claimed, port.n))
		return drop(skb, port.slot, REASON_SPOOFED);
	if (!is_answered(says.asked))
		return TC_ACT_OK;
	count_reason(skb, port.slot, REASON_ANSWERED);
	if (answer_arp(skb, &arp, port.n))
		return drop(skb, port.slot, REASON_TRUNCATED);
	return send_back(skb);
}

static __always_inline int port_nd(struct __sk_buff *skb, struct port port, struct packet *p)
{
	struct neighbor says = {};

	if (p->icmp_type == ND_ROUTER_ADVERTISEMENT || p->icmp_type == ND_REDIRECT)
		return drop(skb, port.slot, REASON_SPOOFED);
	if (parse_nd(skb, p, &says))
		return drop(skb, port.slot, REASON_TRUNCATED);
	says.claimed = hide_address(skb, says.claimed);
	says.asked = hide_address(skb, says.asked);
	if (!may_claim(p->source, port.n) || !may_claim(says.claimed, port.n))
		return drop(skb, port.slot, REASON_SPOOFED);
	if (!is_answered(says.asked))
		return TC_ACT_OK;
	count_reason(skb, port.slot, REASON_ANSWERED);
	if (answer_solicitation(skb, p, port.n))
		return drop(skb, port.slot, REASON_TRUNCATED);
	return send_back(skb);
}

/* Checks whether guest n may send the packet. Returns ADMITTED, with the packet parsed, if its
 * destination is a reserved address; TC_ACT_OK if it is another; TC_ACT_REDIRECT if the packet is
 * now an answer to guest n; else it drops it.
 */
static __always_inline int admit(struct __sk_buff *skb, struct port port, struct packet *p)
{
	if (!has_source_mac(skb, port.n))
		return drop(skb, port.slot, REASON_SPOOFED);
	if (skb->vlan_present)
		return drop(skb, port.slot, REASON_UNHANDLED);
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return port_arp(skb, port);
	if (!is_ip(skb))
		return drop(skb, port.slot, REASON_UNHANDLED);

	parse(skb, p, port.slot, HOOK_PORT, port.n);
	/* Neighbor discovery may be behind an extension header or in a fragment (RFC 7113). */
	if (p->v6 && is_extension(p->l4_protocol))
		return drop(skb, port.slot, REASON_UNHANDLED);
	if (is_nd(p) && !p->is_later_fragment)
		return p->is_fragment ? drop(skb, port.slot, REASON_SPOOFED)
				      : port_nd(skb, port, p);
	if (p->source.kind != LINK || p->source.n != port.n)
		return drop(skb, port.slot,
			    p->fault == FAULT_TRUNCATED && p->source.kind == OTHER
				    ? REASON_TRUNCATED
				    : REASON_SPOOFED);
	p->source = hide_address(skb, p->source);
	if (p->v6 && p->is_fragment && p->fault == FAULT_TRUNCATED) /* RFC 7112 */
		return drop(skb, port.slot, REASON_TRUNCATED);
	/* The kernel applies an ICMP error to the flow that it quotes, wherever the error goes.
	 * The MTU of the link does not change; the kernel would keep the told one, on `lo` for all
	 * of loopback.
	 */
	if (p->is_icmp_error && (p->fault != FAULT_NONE || tells_path_mtu(p)))
		return drop(skb, port.slot, REASON_UNHANDLED);
	if (!is_reserved(p->destination))
		return TC_ACT_OK;
	return p->fault == FAULT_NONE ? ADMITTED : drop_fault(skb, port.slot, p->fault);
}

/* At a guest's port: decides where a packet of the guest goes. To the alias, the guest dials
 * `localhost`; to a native source or a guest's view, it answers from a port that it owns. Returns
 * TO_GUEST and the other guest in `to`, TO_NATIVE, or a TC_ACT_.
 */
static __always_inline int leave_port(struct __sk_buff *skb, struct port port, struct packet *p,
				      u8 *to)
{
	struct address source;
	u8 client, server;
	int verdict = admit(skb, port, p), n;

	if (verdict != ADMITTED)
		return verdict;
	switch (p->destination.kind) {
	case ALIAS:
		n = is_icmp(p->protocol) ? -1
					 : owner_if_up(port.slot, p->protocol, p->destination_port);
		if (n < 0)
			return TO_NATIVE;
		source = address_of(GUEST_VIEW, port.n);
		client = port.n;
		server = n;
		break;
	case NATIVE_SOURCE:
	case NATIVE_SOURCE_ODD:
		if (owner_of(port.slot, p->protocol, p->source_port) != port.n)
			return drop(skb, port.slot, REASON_SPOOFED);
		return TO_NATIVE;
	case GUEST_VIEW:
		n = p->destination.n;
		if (owner_of(port.slot, p->protocol, p->source_port) != port.n)
			return drop(skb, port.slot, REASON_SPOOFED);
		if (p->l4_protocol == IPPROTO_TCP && !p->syn && !guest_ifindex(port.slot, n)) {
			count_reason(skb, port.slot, REASON_NO_GUEST);
			return TO_NATIVE;
		}
		source = address_of(ALIAS, 0);
		client = n;
		server = port.n;
		break;
	default:
		return drop(skb, port.slot, REASON_SPOOFED);
	}
	count_guests(skb, port.slot, client, server);
	track_connection(skb, p, port.slot, client, server, source.kind == ALIAS);
	if (rewrite(skb, p, source, address_of(LINK, n), n))
		return drop(skb, port.slot, REASON_TRUNCATED);
	*to = n;
	return TO_GUEST;
}

/* Redirects what guest n sent to a native into `lo`, translated to addresses of `lo`. */
static __always_inline int enter_lo(struct __sk_buff *skb, u8 slot, struct packet *p)
{
	struct address source, destination = address_of(LOOPBACK, 0);
	u8 n = p->source.n, kind = p->destination.kind;
	__be32 asked[8], to[8] = {};

	switch (kind) {
	case ALIAS:
		source = address_of(NATIVE_VIEW, n);
		break;
	case NATIVE_SOURCE:
	case NATIVE_SOURCE_ODD:
		source = address_of(LOOPBACK, 0);
		break;
	case GUEST_VIEW: /* of a guest that is down: no socket has this address, so it is refused */
		source = address_of(NATIVE_VIEW, n);
		destination = address_of(NATIVE_VIEW, p->destination.n);
		break;
	default:
		return drop(skb, slot, REASON_SPOOFED);
	}
	if (kind != NATIVE_SOURCE_ODD) {
		render_addresses(p, source, destination, to);
	} else {
		if (find_nonstandard_flow(p, slot, n, asked))
			return drop(skb, slot, REASON_SPOOFED);
		reverse(p, asked, to);
	}
	if (rewrite_words(skb, p, to, TO_LO))
		return drop(skb, slot, REASON_TRUNCATED);
	if (kind != GUEST_VIEW)
		count_native(skb, slot, n, GUEST_SENDS, kind == ALIAS ? GUEST_DIALS : GUEST_SERVES);
	return bpf_redirect(LO_IFINDEX, BPF_F_INGRESS);
}

#ifdef TRACED
#include "trace.h"
#endif

#endif
