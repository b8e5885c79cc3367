/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * ARP and neighbor discovery on a guest's link: parses which address a message claims and which it
 * asks for, and answers for addresses that belong to the programs.
 */

#ifndef TESTBED_NEIGHBOR_H
#define TESTBED_NEIGHBOR_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in6.h>
#include <uapi/linux/ipv6.h>

#include "addresses.h"
#include "packet.h"

#define ARP_HARDWARE_ETHERNET	1
#define ARP_REQUEST		1
#define ARP_REPLY		2

/* Types of ICMPv6 (RFC 4861). */
#define ND_ROUTER_SOLICITATION	133
#define ND_ROUTER_ADVERTISEMENT 134
#define ND_SOLICITATION		135
#define ND_ADVERTISEMENT	136
#define ND_REDIRECT		137

#define ND_SOLICITED		0x40
#define ND_OVERRIDE		0x20
#define ND_OPTION_TARGET_MAC	2

/* ARP for IPv4 over Ethernet. */
struct arp {
	__be16 hardware, protocol;
	u8 hardware_length, protocol_length;
	__be16 operation;
	u8 sender_mac[ETH_ALEN];
	u8 sender[4];
	u8 target_mac[ETH_ALEN];
	u8 target[4];
} __attribute__((packed));

/* A neighbor solicitation or advertisement with one option. */
struct nd {
	u8 type, code;
	__be16 checksum;
	u8 flags, reserved[3];
	__be32 target[4];
	u8 option, option_length; /* in units of 8 bytes */
	u8 mac[ETH_ALEN];
};

/* What a message of either protocol says about addresses. */
struct neighbor {
	struct address claimed; /* what the sender claims as its own; UNSPECIFIED: nothing */
	struct address asked;	/* whose MAC it asks for; UNSPECIFIED: nobody's */
	bool own_mac;		/* the claim is for the source MAC of the frame */
};

static __always_inline bool same_mac(const u8 *a, const u8 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4] &&
	       a[5] == b[5];
}

static __always_inline struct address classify4_bytes(const u8 *bytes)
{
	__be32 word;

	__builtin_memcpy(&word, bytes, sizeof(word));
	return classify4(word);
}

/* Returns nonzero if this is not ARP for IPv4 over Ethernet. */
static __always_inline int parse_arp(struct __sk_buff *skb, struct arp *arp, struct neighbor *says)
{
	struct ethhdr eth;

	if (read(skb, 0, &eth, sizeof(eth)) || read(skb, ETH_HLEN, arp, sizeof(*arp)))
		return -1;
	if (arp->hardware != bpf_htons(ARP_HARDWARE_ETHERNET) ||
	    arp->protocol != bpf_htons(ETH_P_IP) || arp->hardware_length != ETH_ALEN ||
	    arp->protocol_length != 4)
		return -1;
	says->claimed = classify4_bytes(arp->sender);
	says->asked.kind = UNSPECIFIED;
	if (arp->operation == bpf_htons(ARP_REQUEST))
		says->asked = classify4_bytes(arp->target);
	says->own_mac = same_mac(arp->sender_mac, eth.h_source);
	return 0;
}

static __always_inline bool is_nd(const struct packet *p)
{
	return p->v6 && p->fault == FAULT_NONE && p->l4_protocol == IPPROTO_ICMPV6 &&
	       p->icmp_type >= ND_ROUTER_SOLICITATION && p->icmp_type <= ND_REDIRECT;
}

/* Returns nonzero if the message is too short. A solicitation claims its source, an advertisement
 * its target. Duplicate address detection, a solicitation without a source, claims its target, too.
 */
static __always_inline int parse_nd(struct __sk_buff *skb, const struct packet *p,
				    struct neighbor *says)
{
	__be32 target[4];

	says->asked.kind = UNSPECIFIED;
	says->own_mac = true;
	says->claimed = p->source;
	if (p->icmp_type != ND_SOLICITATION && p->icmp_type != ND_ADVERTISEMENT)
		return 0;
	if (read(skb, p->l4 + offsetof(struct nd, target), target, sizeof(target)))
		return -1;
	if (p->icmp_type == ND_ADVERTISEMENT || p->source.kind == UNSPECIFIED)
		says->claimed = classify6(target);
	else
		says->asked = classify6(target);
	return 0;
}

/* Turns a guest's ARP request into the reply, with the alias's MAC. Returns nonzero on failure. */
static __always_inline int answer_arp(struct __sk_buff *skb, const struct arp *asked, u8 n)
{
	struct arp answer = {
		.hardware = bpf_htons(ARP_HARDWARE_ETHERNET),
		.protocol = bpf_htons(ETH_P_IP),
		.hardware_length = ETH_ALEN,
		.protocol_length = 4,
		.operation = bpf_htons(ARP_REPLY),
		.sender_mac = ALIAS_MAC,
		.target_mac = GUEST_MAC(n),
	};

	__builtin_memcpy(answer.sender, asked->target, 4);
	__builtin_memcpy(answer.target, asked->sender, 4);
	return bpf_skb_store_bytes(skb, ETH_HLEN, &answer, sizeof(answer), 0) || write_macs(skb, n);
}

/* Turns a guest's neighbor solicitation, with or without an option, into the advertisement. Returns
 * nonzero on failure.
 */
static __always_inline int answer_solicitation(struct __sk_buff *skb, const struct packet *p, u8 n)
{
	struct {
		struct {
			__be32 source[4], destination[4];
			__be32 length, next;
		} pseudo;
		struct nd nd;
	} a = {
		.pseudo = {.length = bpf_htonl(sizeof(struct nd)),
			   .next = bpf_htonl(IPPROTO_ICMPV6)},
		.nd = {.type = ND_ADVERTISEMENT,
		       .flags = ND_SOLICITED | ND_OVERRIDE,
		       .option = ND_OPTION_TARGET_MAC,
		       .option_length = 1,
		       .mac = ALIAS_MAC},
	};
	__be16 length = bpf_htons(sizeof(struct nd));
	__wsum sum;

	if (bpf_skb_load_bytes(skb, p->l4 + offsetof(struct nd, target), a.nd.target, 16))
		return -1;
	__builtin_memcpy(a.pseudo.source, a.nd.target, 16);
	__builtin_memcpy(a.pseudo.destination, p->addresses, 16);
	sum = bpf_csum_diff(NULL, 0, (void *)&a, sizeof(a), 0);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	a.nd.checksum = ~sum;
	return bpf_skb_change_tail(skb, ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct nd), 0) ||
	       bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, payload_len), &length,
				   sizeof(length), 0) ||
	       bpf_skb_store_bytes(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), &a.pseudo, 32,
				   0) ||
	       bpf_skb_store_bytes(skb, ETH_HLEN + sizeof(struct ipv6hdr), &a.nd, sizeof(a.nd),
				   0) ||
	       write_macs(skb, n);
}

#endif
