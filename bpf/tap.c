/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * Connects the tap of a guest that somebody else boots with the guest's link of ours. The guest has
 * addresses of its own, and its tap has filters of others. So the guest is translated to guest n of
 * the address plan at the tap, and all other programs see it as any guest. Packets that have
 * nothing to do with the pod's inside go on to the filters of others.
 *
 *   namespace of the pod
 *
 *   guest ---- tap          t1 ---- g1    the link of guest 1
 *              tap_ingress  inner_ingress
 *              tap_egress   inner_egress
 *
 *   from the guest:  tap_ingress > t1 > g1      source: the guest's > guest n's link address
 *   to the guest:    g1 > inner_ingress > tap   destination: the reverse
 *
 * tap_egress drops what others send to the guest from addresses of the pod's inside, or about them,
 * inner_egress all that did not come by tap_ingress: a process of the pod's namespace may send there,
 * too.
 *
 * Of a guest is known at first what user space was told, or guesses. What the guest sends teaches
 * the programs the rest.
 */

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/pkt_cls.h>

#include "addresses.h"
#include "common.h"
#include "neighbor.h"
#include "packet.h"
#include "state.h"

enum guessed { GUESSED_MAC = 1, GUESSED_IP4 = 2, GUESSED_IP6 = 4 };

/* skb->mark of what these programs redirect. Nobody else sends by the guest's link, or to the guest
 * from addresses of the pod's inside.
 */
#define MARK_TO_GUEST	0x77000002
#define MARK_FROM_GUEST 0x77000003

struct tap {
	__be32 ip4, ip6[4];   /* the guest's; 0: not known */
	u8 mac[ETH_ALEN];     /* the guest's; 0: not known */
	u8 pod_mac[ETH_ALEN]; /* of the pod's own interface on the guest link */
	u32 tap_ifindex, inner_ifindex;
	u32 guessed, padding; /* bits of `enum guessed`: what is not certain */
	struct count from_guest, to_guest;
	struct count refused; /* dropped: with an address that is not the sender's, or malformed */
	struct count unreachable; /* dropped: nothing is known yet of the guest */
};

BPF_HASH(taps, u32, struct tap, 4096); /* slot << 8 | n */

static __always_inline struct tap *tap_of(struct __sk_buff *skb)
{
	u32 key = skb->tc_classid & 0xffff;

	return taps.lookup(&key);
}

static __always_inline int refuse(struct __sk_buff *skb, struct count *count)
{
	add_count(count, 1, skb->len - ETH_HLEN);
	return TC_ACT_SHOT;
}

/* Whether an address is one of the guest link's. */
static __always_inline bool is_inside(struct address is)
{
	switch (is.kind) {
	case ALIAS:
	case NATIVE_SOURCE:
	case NATIVE_SOURCE_ODD:
	case POD_LINK:
	case LINK:
	case GUEST_VIEW:
		return true;
	}
	return false;
}

static __always_inline bool is_zero_mac(const u8 *mac)
{
	return !(mac[0] | mac[1] | mac[2] | mac[3] | mac[4] | mac[5]);
}

static __always_inline bool is_zero6(const __be32 *words)
{
	return !(words[0] | words[1] | words[2] | words[3]);
}

/* Learns the MAC address of the first frame. Whether this frame has it. */
static __always_inline bool learn_mac(struct __sk_buff *skb, struct tap *tap)
{
	struct ethhdr eth;

	if (read(skb, 0, &eth, sizeof(eth)))
		return false;
	if (is_zero_mac(tap->mac) || tap->guessed & GUESSED_MAC) {
		__builtin_memcpy(tap->mac, eth.h_source, ETH_ALEN);
		tap->guessed &= ~GUESSED_MAC;
	}
	return same_mac(tap->mac, eth.h_source);
}

static __always_inline void learn4(struct tap *tap, __be32 address)
{
	if (tap->ip4 && !(tap->guessed & GUESSED_IP4))
		return;
	tap->ip4 = address;
	tap->guessed &= ~GUESSED_IP4;
}

/* Takes the packet's source for the guest's address, if none is known. A link-local address is one
 * until the guest has another.
 */
static __always_inline void learn_source(struct tap *tap, const struct packet *p)
{
	if (!p->v6) {
		learn4(tap, p->addresses[0]);
	} else if (is_zero6(tap->ip6) || tap->guessed & GUESSED_IP6) {
		__builtin_memcpy(tap->ip6, p->addresses, sizeof(tap->ip6));
		tap->guessed &= ~GUESSED_IP6;
		if (p->source.kind != OTHER)
			tap->guessed |= GUESSED_IP6;
	}
}

static __always_inline bool is_from_guest(const struct tap *tap, const struct packet *p)
{
	if (p->v6)
		return p->addresses[0] == tap->ip6[0] && p->addresses[1] == tap->ip6[1] &&
		       p->addresses[2] == tap->ip6[2] && p->addresses[3] == tap->ip6[3];
	return p->addresses[0] == tap->ip4;
}

static __always_inline int store_macs(struct __sk_buff *skb, const u8 *to, const u8 *from)
{
	u8 macs[2 * ETH_ALEN];

	__builtin_memcpy(macs, to, ETH_ALEN);
	__builtin_memcpy(macs + ETH_ALEN, from, ETH_ALEN);
	return bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0);
}

/* Sends an answer of neighbor.h back to the guest, whose MAC is not that of the address plan. */
static __always_inline int send_back(struct __sk_buff *skb, struct tap *tap, int failed)
{
	u8 alias_mac[ETH_ALEN] = ALIAS_MAC;

	if (failed || store_macs(skb, tap->mac, alias_mac))
		return refuse(skb, &tap->refused);
	skb->mark = MARK_TO_GUEST;
	return bpf_redirect(skb->ifindex, 0);
}

/* ARP: answers for addresses of the guest link. */
static __always_inline int take_arp(struct __sk_buff *skb, struct tap *tap)
{
	struct neighbor says;
	struct arp arp;
	__be32 sender;

	if (parse_arp(skb, &arp, &says))
		return TC_ACT_OK;
	__builtin_memcpy(&sender, arp.sender, sizeof(sender));
	if (says.own_mac && says.claimed.kind == OTHER)
		learn4(tap, sender);
	if (!is_inside(says.asked))
		return TC_ACT_OK;
	return send_back(skb, tap,
			 answer_arp(skb, &arp, 0) ||
				 bpf_skb_store_bytes(skb,
						     ETH_HLEN + offsetof(struct arp, target_mac),
						     tap->mac, ETH_ALEN, 0));
}

/* Ingress of the tap: takes what is for the pod's inside. */
static __always_inline int tap_ingress(struct __sk_buff *skb)
{
	struct tap *tap = tap_of(skb);
	u8 n = skb->tc_classid, from_mac[ETH_ALEN] = GUEST_MAC(n), to_mac[ETH_ALEN] = ALIAS_MAC;
	struct neighbor says = {};
	struct packet p = {};
	bool own_mac;

	/* A tap that was moved away or renamed still has this program, but is not the guest's. */
	if (!tap || tap->tap_ifindex != skb->ifindex || skb->vlan_present)
		return TC_ACT_OK;
	own_mac = learn_mac(skb, tap);
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return take_arp(skb, tap);
	if (!is_ip(skb) || parse_headers(skb, &p))
		return TC_ACT_OK;
	if (own_mac && p.source.kind == OTHER)
		learn_source(tap, &p);
	if (is_nd(&p) && p.icmp_type == ND_SOLICITATION && !parse_nd(skb, &p, &says) &&
	    is_inside(says.asked))
		return send_back(skb, tap, answer_solicitation(skb, &p, 0));
	if (!is_inside(p.destination))
		return TC_ACT_OK;
	if (p.source.kind == LINK_LOCAL || p.source.kind == LINK_LOCAL_OTHER)
		learn_source(tap, &p);
	else if (p.source.kind != OTHER)
		return refuse(skb, &tap->refused);
	if (p.fault != FAULT_NONE || !is_from_guest(tap, &p))
		return refuse(skb, &tap->refused);
	add_count(&tap->from_guest, 1, skb->len - ETH_HLEN);
	if (p.destination.kind == POD_LINK)
		__builtin_memcpy(to_mac, tap->pod_mac, ETH_ALEN);
	if (rewrite(skb, &p, address_of(LINK, n), p.destination, 0) ||
	    store_macs(skb, to_mac, from_mac))
		return refuse(skb, &tap->refused);
	skb->mark = MARK_FROM_GUEST;
	return bpf_redirect(tap->inner_ifindex, 0);
}

/* Ingress of the other end of the guest's link: brings all that is for the guest to its tap. */
static __always_inline int inner_ingress(struct __sk_buff *skb)
{
	u8 alias_mac[ETH_ALEN] = ALIAS_MAC;
	struct tap *tap = tap_of(skb);
	struct packet p = {};
	__be32 to[8];

	if (!tap || !is_ip(skb) || parse_headers(skb, &p))
		return TC_ACT_SHOT;
	if (p.destination.kind != LINK)
		return TC_ACT_SHOT; /* multicast of the pod's own kernel */
	if (p.fault != FAULT_NONE)
		return refuse(skb, &tap->refused);
	if (is_zero_mac(tap->mac) || (p.v6 ? is_zero6(tap->ip6) : !tap->ip4))
		return refuse(skb, &tap->unreachable);
	__builtin_memcpy(to, p.addresses, sizeof(to));
	if (p.v6)
		__builtin_memcpy(to + 4, tap->ip6, sizeof(tap->ip6));
	else
		to[1] = tap->ip4;
	add_count(&tap->to_guest, 1, skb->len - ETH_HLEN);
	if (rewrite_words(skb, &p, to, 0) || store_macs(skb, tap->mac, alias_mac))
		return refuse(skb, &tap->refused);
	skb->mark = MARK_TO_GUEST;
	return bpf_redirect(tap->tap_ifindex, 0);
}

/* Egress of the other end of the guest's link: passes what tap_ingress redirected. */
static __always_inline int inner_egress(struct __sk_buff *skb)
{
	struct tap *tap = tap_of(skb);

	if (skb->mark != MARK_FROM_GUEST)
		return tap ? refuse(skb, &tap->refused) : TC_ACT_SHOT;
	skb->mark = 0;
	return TC_ACT_OK;
}

/* Whether it is a message of ICMPv6 that is no error, behind a hop-by-hop header of the usual size:
 * multicast listener discovery has that (RFC 3810, 5).
 */
static __always_inline bool is_multicast_report(struct __sk_buff *skb, const struct packet *p)
{
	u8 header[9];

	return p->l4_protocol == IPPROTO_HOPOPTS && !read(skb, p->l4, header, sizeof(header)) &&
	       header[0] == IPPROTO_ICMPV6 && !header[1] && !is_icmp_error(true, header[8]);
}

/* Whether it may be an ICMP error about a packet that went to one of the pod's inside: it is one, or
 * does not show what it is about.
 */
static __always_inline bool may_be_about_inside(struct __sk_buff *skb, const struct packet *p)
{
	u32 quoted = p->l4 + ICMP_HEADER_SIZE;
	__be32 to[4] = {};

	if (p->v6 && is_extension(p->l4_protocol))
		return !is_multicast_report(skb, p);
	if (!p->is_icmp_error)
		return false;
	if (p->is_fragment)
		return true;
	if (p->v6)
		return read(skb, quoted + offsetof(struct ipv6hdr, daddr), to, sizeof(to)) ||
		       is_inside(classify6(to));
	return read(skb, quoted + offsetof(struct iphdr, daddr), to, sizeof(to[0])) ||
	       is_inside(classify4(to[0]));
}

/* Egress of the tap: nobody else passes for one of the pod's inside. */
static __always_inline int tap_egress(struct __sk_buff *skb)
{
	struct tap *tap = tap_of(skb);
	struct neighbor says = {};
	struct packet p = {};
	struct arp arp;

	if (!tap || tap->tap_ifindex != skb->ifindex)
		return TC_ACT_OK;
	if (skb->mark == MARK_TO_GUEST) {
		skb->mark = 0;
		return TC_ACT_OK;
	}
	/* The kernel takes off one tag, a guest several that mean no VLAN. */
	if (skb->protocol == bpf_htons(ETH_P_8021Q) || skb->protocol == bpf_htons(ETH_P_8021AD))
		return refuse(skb, &tap->refused);
	if (skb->protocol == bpf_htons(ETH_P_ARP)) {
		if (parse_arp(skb, &arp, &says))
			return TC_ACT_OK;
	} else {
		if (!is_ip(skb) || parse_headers(skb, &p))
			return TC_ACT_OK;
		says.claimed = p.source;
		if (is_nd(&p) && parse_nd(skb, &p, &says))
			return refuse(skb, &tap->refused);
	}
	if (is_inside(says.claimed) || is_reserved(says.claimed) || is_inside(p.source) ||
	    is_reserved(p.source) || may_be_about_inside(skb, &p))
		return refuse(skb, &tap->refused);
	return TC_ACT_OK;
}

TC_PROGRAM(tap_ingress)
TC_PROGRAM(tap_egress)
TC_PROGRAM(inner_ingress)
TC_PROGRAM(inner_egress)
