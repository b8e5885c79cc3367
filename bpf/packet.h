/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * Parses a packet of either family into `struct packet`, and rewrites its addresses.
 *
 * Reads use packet pointers, or bpf_skb_load_bytes for what is not in the linear part. Writes use
 * helpers instead of packet pointers. For a program that writes through a packet pointer the kernel
 * makes every skb private first (it copies the headers of each TCP segment on `lo`), even those
 * that the program does not change.
 *
 * Checksums are updated incrementally. So they stay correct both when they are complete and when
 * they are left to the device (CHECKSUM_PARTIAL: the field holds the sum of the pseudo-header;
 * BPF_F_PSEUDO_HDR). CHECKSUM_COMPLETE, which would need BPF_F_IPV6 for IPv6 (Linux 6.16), does not
 * occur here: network cards and the receiving stack set it, but `lo`, veth and tap do not.
 */

#ifndef TESTBED_PACKET_H
#define TESTBED_PACKET_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/icmp.h>
#include <uapi/linux/icmpv6.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/in6.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/tcp.h>
#include <uapi/linux/udp.h>

#include "addresses.h"
#include "common.h"
#include "state.h"

#define IP_MORE_FRAGMENTS    0x2000
#define IP_FRAGMENT_OFFSET   0x1fff
#define IPV6_MORE_FRAGMENTS  0x0001
#define IPV6_FRAGMENT_OFFSET 0xfff8

#define ICMP_HEADER_SIZE     8
#define TCP_HEADER_SIZE	     20 /* without options */
#define TCP_OPTION_MSS	     2
#define TCP_OPTION_MSS_SIZE  4

/* Result of parsing. drop_fault() maps it to a reason: keep the order. */
enum fault {
	FAULT_NONE,
	FAULT_TRUNCATED, /* or malformed */
	FAULT_UNHANDLED, /* an extension header, or a protocol without ports */
	FAULT_ORPHAN,	 /* a later fragment whose first fragment was not seen */
};

/* Hook at which a fragment is seen: the fragments of a datagram have other addresses at each. */
enum hook { HOOK_LO, HOOK_PORT, HOOK_UPLINK };

struct packet {
	/* Source, then destination; IPv4 uses the first two words. */
	__be32 addresses[8] __attribute__((aligned(8)));
	__be32 ip_head[3]; /* the IP header up to the addresses; IPv6 uses two words */
	struct address source, destination;
	u16 source_port;      /* of the flow, in host order. An ICMP error has the ports of the */
	u16 destination_port; /* flow that it is about, in the direction of the error */
	u8 protocol;	      /* of the flow: TCP or UDP, else ICMP */
	u8 l4_protocol;	      /* of the packet itself */
	u8 icmp_type, icmp_code;
	u8 l4; /* offset of the layer 4 header */
	u8 v6, is_fragment, is_later_fragment, is_icmp_error;
	u8 syn, has_tcp_options;
	u8 fin, rst;
	u8 fault;
	__be32 id; /* of the datagram, if this is a fragment */
};

/* Whether skb is IPv4 or IPv6. With an inline function in place of this macro, clang orders the
 * code so that the verifier has more to do.
 */
#define is_ip(skb)   ((skb)->protocol == bpf_htons(ETH_P_IP) || is_ipv6(skb))
#define is_ipv6(skb) ((skb)->protocol == bpf_htons(ETH_P_IPV6))

/* Whether an IPv6 header has another one behind it that parse_ip() does not look for. */
static __always_inline bool is_extension(u8 next)
{
	return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_FRAGMENT ||
	       next == IPPROTO_AH || next == IPPROTO_DSTOPTS || next == IPPROTO_MH;
}

/* Whether it is an ICMP error that tells a path MTU (RFC 1191, RFC 8201). */
static __always_inline bool tells_path_mtu(const struct packet *p)
{
	if (!p->is_icmp_error)
		return false;
	return p->v6 ? p->icmp_type == ICMPV6_PKT_TOOBIG
		     : p->icmp_type == ICMP_DEST_UNREACH && p->icmp_code == ICMP_FRAG_NEEDED;
}

static __always_inline bool is_icmp(u8 protocol)
{
	return protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6;
}

/* Reads skb->data or data_end. With inline assembly in their place the compiler cannot join two such
 * reads to one with a computed offset, which the verifier refuses.
 */
#define READ_POINTER(skb, field)                                                                   \
	({                                                                                         \
		void *pointer;                                                                     \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                              \
			     : "=r"(pointer)                                                       \
			     : "r"(skb), "i"(offsetof(struct __sk_buff, field)));                  \
		pointer;                                                                           \
	})

static __always_inline void *data_of(struct __sk_buff *skb)
{
	return READ_POINTER(skb, data);
}

static __always_inline void *data_end_of(struct __sk_buff *skb)
{
	return READ_POINTER(skb, data_end);
}

/* Copies bytes of the packet, linear or not. Returns nonzero if it is too short. */
static __always_inline int read(struct __sk_buff *skb, u32 offset, void *to, u32 size)
{
	void *from = data_of(skb) + offset;

	if (from + size <= data_end_of(skb)) {
		/* Every header is aligned so. Without this the compiler copies single bytes. */
		__builtin_memcpy(to, __builtin_assume_aligned(from, 4), size);
		return 0;
	}
	/* Linux 7.3 takes memory that only a helper wrote for undefined. */
	__builtin_memset(to, 0, size);
	return bpf_skb_load_bytes(skb, offset, to, size);
}

/* Whether a message quotes a packet: in ICMPv6, all below 128 do (RFC 4443, 2.1). */
static __always_inline bool is_icmp_error(u8 v6, u8 type)
{
	if (v6)
		return type < 128;
	return type == ICMP_DEST_UNREACH || type == ICMP_SOURCE_QUENCH || type == ICMP_REDIRECT ||
	       type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETERPROB;
}

/* Whether the packet inside an ICMP error has the error's own addresses, swapped: then the receiver
 * of the error sent it to the sender of the error.
 */
static __always_inline bool quotes_its_receiver(const struct packet *p, const __be32 *quoted)
{
	u32 words = p->v6 ? 4 : 1, differences = 0;

	for (u32 i = 0; i < words; i++)
		differences |= (quoted[i] ^ p->addresses[words + i]) |
			       (quoted[words + i] ^ p->addresses[i]);
	return !differences;
}

/* Sets protocol and ports of the flow that an ICMP error is about, from the packet inside the
 * error. The receiver of the error sent that packet, so its ports are swapped.
 */
static __always_inline int parse_icmp_error(struct __sk_buff *skb, struct packet *p)
{
	u32 inner = p->l4 + ICMP_HEADER_SIZE;
	__be16 ports[2];

	if (p->v6) {
		struct ipv6hdr ip;

		if (read(skb, inner, &ip, sizeof(ip)))
			return FAULT_TRUNCATED;
		if (!quotes_its_receiver(p, (void *)&ip.saddr))
			return FAULT_UNHANDLED;
		p->protocol = ip.nexthdr;
		inner += sizeof(ip);
	} else {
		struct iphdr ip;

		if (read(skb, inner, &ip, sizeof(ip)) || ip.ihl < 5)
			return FAULT_TRUNCATED;
		if (!quotes_its_receiver(p, &ip.saddr))
			return FAULT_UNHANDLED;
		if (ip.frag_off & bpf_htons(IP_FRAGMENT_OFFSET))
			return FAULT_UNHANDLED; /* about a later fragment, which has no ports */
		p->protocol = ip.protocol;
		inner += ip.ihl * 4;
	}
	if (is_icmp(p->protocol))
		return FAULT_NONE; /* about an echo, which has no ports */
	if (p->protocol != IPPROTO_TCP && p->protocol != IPPROTO_UDP)
		return FAULT_UNHANDLED;
	if (read(skb, inner, ports, sizeof(ports)))
		return FAULT_TRUNCATED;
	p->source_port = bpf_ntohs(ports[1]);
	p->destination_port = bpf_ntohs(ports[0]);
	return FAULT_NONE;
}

static __always_inline int parse_l4(struct __sk_buff *skb, struct packet *p)
{
	if (p->l4_protocol == IPPROTO_TCP) {
		struct tcphdr tcp;

		if (read(skb, p->l4, &tcp, sizeof(tcp)))
			return FAULT_TRUNCATED;
		p->source_port = bpf_ntohs(tcp.source);
		p->destination_port = bpf_ntohs(tcp.dest);
		p->syn = tcp.syn;
		p->has_tcp_options = tcp.doff > TCP_HEADER_SIZE / 4;
		p->fin = tcp.fin;
		p->rst = tcp.rst;
		return FAULT_NONE;
	}
	if (p->l4_protocol == IPPROTO_UDP) {
		struct udphdr udp;

		if (read(skb, p->l4, &udp, sizeof(udp)))
			return FAULT_TRUNCATED;
		p->source_port = bpf_ntohs(udp.source);
		p->destination_port = bpf_ntohs(udp.dest);
		return FAULT_NONE;
	}
	if (p->l4_protocol == (p->v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP)) {
		u8 icmp[ICMP_HEADER_SIZE];

		if (read(skb, p->l4, icmp, sizeof(icmp)))
			return FAULT_TRUNCATED;
		p->icmp_type = icmp[0];
		p->icmp_code = icmp[1];
		p->is_icmp_error = is_icmp_error(p->v6, p->icmp_type);
		return p->is_icmp_error ? parse_icmp_error(skb, p) : FAULT_NONE;
	}
	return FAULT_UNHANDLED;
}

/* Parses the IP header and finds layer 4. Returns nonzero if the IP header is not valid. */
static __always_inline int parse_ip(struct __sk_buff *skb, struct packet *p)
{
	p->fault = FAULT_TRUNCATED;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;

		if (read(skb, ETH_HLEN, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
			return -1;
		__builtin_memcpy(p->ip_head, &ip, sizeof(p->ip_head));
		p->addresses[0] = ip.saddr;
		p->addresses[1] = ip.daddr;
		p->l4 = ETH_HLEN + ip.ihl * 4;
		p->l4_protocol = ip.protocol;
		p->is_fragment =
			!!(ip.frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET));
		p->is_later_fragment = !!(ip.frag_off & bpf_htons(IP_FRAGMENT_OFFSET));
		p->id = ip.id;
	} else {
		struct ipv6hdr ip;

		p->v6 = true;
		if (read(skb, ETH_HLEN, &ip, sizeof(ip)) || ip.version != 6)
			return -1;
		__builtin_memcpy(p->ip_head, &ip, offsetof(struct ipv6hdr, saddr));
		__builtin_memcpy(p->addresses, &ip.saddr, sizeof(p->addresses));
		p->l4 = ETH_HLEN + sizeof(ip);
		p->l4_protocol = ip.nexthdr;
		if (p->l4_protocol == IPPROTO_FRAGMENT) {
			struct {
				u8 nexthdr, reserved;
				__be16 offset;
				__be32 id;
			} header;

			if (read(skb, p->l4, &header, sizeof(header)))
				return -1;
			p->l4 += sizeof(header);
			p->l4_protocol = header.nexthdr;
			/* An atomic fragment (RFC 6946) is a whole packet. */
			p->is_fragment = !!(header.offset &
					    bpf_htons(IPV6_MORE_FRAGMENTS | IPV6_FRAGMENT_OFFSET));
			p->is_later_fragment = !!(header.offset & bpf_htons(IPV6_FRAGMENT_OFFSET));
			p->id = header.id;
		}
	}
	p->protocol = p->l4_protocol;
	p->fault = FAULT_NONE;
	return 0;
}

/* Key of a datagram's row at a hook: a hash, never 0. */
static __always_inline u64 fragments_key(const struct packet *p, u8 hook, u64 secret)
{
	u64 more = (u64)p->id << 32 | hook << 16 | p->l4_protocol << 8 | p->v6;

	return hash_addresses(p->addresses, secret, more) >> 32 | 1;
}

#define PORTS_BITS 32

/* Stores the ports of a first fragment, and gives them to later fragments, which have none. */
static __always_inline void parse_fragment(struct packet *p, u8 slot, u8 hook)
{
	struct pod_state *state = state_of(slot);
	u64 key, row;

	p->fault = p->is_later_fragment ? FAULT_ORPHAN : p->fault;
	if (!state)
		return;
	key = fragments_key(p, hook, state->secret);
	if (p->is_later_fragment) {
		row = find_row(&state->fragments, key, PORTS_BITS);
		p->source_port = row >> 16;
		p->destination_port = row;
		if (row)
			p->fault = FAULT_NONE;
	} else if (p->is_icmp_error) {
		p->fault = FAULT_UNHANDLED; /* an ICMP error is never that long */
	} else if (p->fault == FAULT_NONE) {
		put_row(&state->fragments, key, PORTS_BITS,
			(u32)p->source_port << 16 | p->destination_port);
	}
}

static __always_inline struct address source_of(const struct packet *p)
{
	return p->v6 ? classify6(p->addresses) : classify4(p->addresses[0]);
}

static __always_inline struct address destination_of(const struct packet *p)
{
	return p->v6 ? classify6(p->addresses + 4) : classify4(p->addresses[1]);
}

/* Returns the same value, but hides from the verifier what it knows about it: it does not track what
 * is in skb->cb. Otherwise it would follow the code after this once for each combination of what it
 * knows. Inline assembly keeps the offset in the instruction, as access to the context needs it.
 */
static __always_inline u32 hide(struct __sk_buff *skb, u64 value)
{
	asm volatile("*(u32 *)(%1 + %2) = %0\n"
		     "%0 = *(u32 *)(%1 + %2)"
		     : "+r"(value)
		     : "r"(skb), "i"(offsetof(struct __sk_buff, cb)));
	return value;
}

static __always_inline struct address hide_address(struct __sk_buff *skb, struct address is)
{
	is.kind = hide(skb, is.kind);
	is.n = hide(skb, is.n);
	return is;
}

static __always_inline void hide_headers(struct __sk_buff *skb, struct packet *p)
{
	p->source_port = hide(skb, p->source_port);
	p->destination_port = hide(skb, p->destination_port);
	p->protocol = hide(skb, p->protocol);
	p->l4_protocol = hide(skb, p->l4_protocol);
	p->l4 = hide(skb, p->l4);
	p->is_fragment = hide(skb, p->is_fragment);
	p->is_later_fragment = hide(skb, p->is_later_fragment);
	p->is_icmp_error = hide(skb, p->is_icmp_error);
	p->fault = hide(skb, p->fault);
}

/* Parses an IPv4 or IPv6 packet (is_ip()), but for the ports of later fragments. The addresses are
 * classified whatever `fault` is. Returns nonzero if the IP header is not valid: then they are OTHER.
 * What decides later is hidden from the verifier.
 */
static __always_inline int parse_headers(struct __sk_buff *skb, struct packet *p)
{
	if (parse_ip(skb, p))
		return -1;
	if (!p->is_later_fragment)
		p->fault = parse_l4(skb, p);
	hide_headers(skb, p);
	p->source = hide_address(skb, source_of(p));
	p->destination = hide_address(skb, destination_of(p));
	return 0;
}

/* The same, with the ports of later fragments. A fragment that does not come from `guest` leaves no
 * trace, nor does, if 0, one from outside the pod.
 */
static __always_inline void parse(struct __sk_buff *skb, struct packet *p, u8 slot, u8 hook,
				  u8 guest)
{
	if (parse_headers(skb, p))
		return;
	if (p->is_fragment &&
	    (guest ? p->source.kind == LINK && p->source.n == guest
		   : hook == HOOK_LO || is_reserved(p->source) || is_reserved(p->destination))) {
		parse_fragment(p, slot, hook);
		hide_headers(skb, p);
	}
}

#define IPV4_WITHOUT_OPTIONS 0x45 /* version 4, header of 5 words */

/* Parses a plain packet of this family, as most are: whole, with headers that are linear, TCP or UDP,
 * without IP options or extension headers. Returns false for others. The compiler makes the rest of
 * a fast path for one family, as `v6` is a constant.
 */
static __always_inline bool parse_plain(struct __sk_buff *skb, struct packet *p, const bool v6)
{
	void *data = data_of(skb), *end = data_end_of(skb);
	struct ipv6hdr *ip6 = data + ETH_HLEN;
	struct iphdr *ip = data + ETH_HLEN;
	struct tcphdr *tcp;

	p->v6 = v6;
	p->l4 = ETH_HLEN + (v6 ? sizeof(*ip6) : sizeof(*ip));
	tcp = data + p->l4;
	if (skb->protocol != bpf_htons(v6 ? ETH_P_IPV6 : ETH_P_IP) ||
	    (void *)tcp + sizeof(struct udphdr) > end)
		return false;
	if (v6) {
		if (ip6->version != 6)
			return false;
		p->l4_protocol = ip6->nexthdr;
		__builtin_memcpy(p->ip_head, __builtin_assume_aligned(ip6, 4),
				 offsetof(struct ipv6hdr, saddr));
		__builtin_memcpy(p->addresses, __builtin_assume_aligned(&ip6->saddr, 4), 32);
	} else {
		if (*(u8 *)ip != IPV4_WITHOUT_OPTIONS ||
		    ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET))
			return false;
		p->l4_protocol = ip->protocol;
		__builtin_memcpy(p->ip_head, __builtin_assume_aligned(ip, 4),
				 offsetof(struct iphdr, saddr));
		p->addresses[0] = ip->saddr;
		p->addresses[1] = ip->daddr;
	}
	p->protocol = p->l4_protocol;
	p->source_port = bpf_ntohs(tcp->source);
	p->destination_port = bpf_ntohs(tcp->dest);
	if (p->protocol == IPPROTO_UDP)
		return true;
	if (p->protocol != IPPROTO_TCP || (void *)(tcp + 1) > end)
		return false;
	p->syn = tcp->syn;
	p->fin = tcp->fin;
	p->rst = tcp->rst;
	return true;
}

/* Rewrites the addresses of the packet inside an ICMP error. Its layer 4 checksum stays as it is:
 * with offload it was never complete.
 */
static __always_inline int rewrite_inner(struct __sk_buff *skb, const struct packet *p, __be32 *to)
{
	__be32 from[8];
	__wsum diff;

	if (p->v6) {
		u32 addresses = p->l4 + ICMP_HEADER_SIZE + offsetof(struct ipv6hdr, saddr);

		if (bpf_skb_load_bytes(skb, addresses, from, 32))
			return -1;
		diff = bpf_csum_diff(from, 32, to, 32, 0);
		return bpf_l4_csum_replace(skb, p->l4 + offsetof(struct icmp6hdr, icmp6_cksum), 0,
					   diff, 0) ||
		       bpf_skb_store_bytes(skb, addresses, to, 32, 0);
	}
	/* The sum over a valid IPv4 header is 0, before and after: ICMP's own checksum stays. */
	u32 inner = p->l4 + ICMP_HEADER_SIZE;

	if (bpf_skb_load_bytes(skb, inner + offsetof(struct iphdr, saddr), from, 8))
		return -1;
	diff = bpf_csum_diff(from, 8, to, 8, 0);
	return bpf_l3_csum_replace(skb, inner + offsetof(struct iphdr, check), 0, diff, 0) ||
	       bpf_skb_store_bytes(skb, inner + offsetof(struct iphdr, saddr), to, 8, 0);
}

/* Swaps source and destination. */
static __always_inline void reverse(const struct packet *p, const __be32 *from, __be32 *to)
{
	if (p->v6) {
		__builtin_memcpy(to, from + 4, 16);
		__builtin_memcpy(to + 4, from, 16);
	} else {
		to[0] = from[1];
		to[1] = from[0];
	}
}

/* Like bpf_csum_diff: the difference of the one's complement sums of words (RFC 1624). */
static __always_inline __wsum csum_diff(const __be32 *from, const __be32 *to, u32 words)
{
	u64 sum = 0;

#pragma unroll
	for (u32 i = 0; i < words; i++)
		sum += (u64)(u32)~from[i] + to[i];
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

/* Updates the checksum of an IPv4 header by such a difference. */
static __always_inline void csum_replace(__be16 *checksum, __wsum diff)
{
	u32 sum = (u16) ~*checksum + (diff & 0xffff) + (diff >> 16);

	sum = (sum & 0xffff) + (sum >> 16);
	*checksum = ~((sum & 0xffff) + (sum >> 16));
}

/* The start of a frame up to the IP addresses, to be written by one call. `pad` aligns the IP
 * header.
 */
struct frame_head {
	u16 pad, macs[6];
	__be16 protocol;
	__be32 ip[10];
};

#define TO_LO -1

/* MACs from the alias to guest n, or with TO_LO zeros: a frame with others is not for this host
 * when `lo` receives it (eth_type_trans).
 */
static __always_inline void render_macs(int n, u16 *macs)
{
	macs[0] = n == TO_LO ? 0 : bpf_htons(MAC_PREFIX);
	macs[1] = 0;
	macs[2] = n == TO_LO ? 0 : bpf_htons(MAC_SUFFIX_GUEST | n);
	macs[3] = macs[0];
	macs[4] = 0;
	macs[5] = n == TO_LO ? 0 : bpf_htons(MAC_SUFFIX_ALIAS);
}

/* Gives the packet the addresses `to` (words as in `struct packet`), and the frame the MACs of the
 * link of guest n, or of `lo` with TO_LO. Returns nonzero if the packet is too short: it must be
 * dropped then.
 */
static __always_inline int rewrite_words(struct __sk_buff *skb, struct packet *p, __be32 *to, int n)
{
	u64 flags = BPF_F_PSEUDO_HDR;
	struct frame_head head = {};
	__wsum diff;
	u32 checksum;

	render_macs(n, head.macs);
	if (p->v6) {
		head.protocol = bpf_htons(ETH_P_IPV6);
		__builtin_memcpy(head.ip, p->ip_head, offsetof(struct ipv6hdr, saddr));
		diff = csum_diff(p->addresses, to, 8);
		__builtin_memcpy(head.ip + 2, to, 32);
		if (bpf_skb_store_bytes(skb, 0, head.macs, ETH_HLEN + sizeof(struct ipv6hdr), 0))
			return -1;
	} else {
		head.protocol = bpf_htons(ETH_P_IP);
		__builtin_memcpy(head.ip, p->ip_head, offsetof(struct iphdr, saddr));
		diff = csum_diff(p->addresses, to, 2);
		csum_replace((void *)(head.ip + 2) + 2, diff);
		head.ip[3] = to[0];
		head.ip[4] = to[1];
		if (bpf_skb_store_bytes(skb, 0, head.macs, ETH_HLEN + sizeof(struct iphdr), 0))
			return -1;
	}
	if (p->is_later_fragment)
		return 0;
	switch (p->l4_protocol) {
	case IPPROTO_TCP:
		checksum = p->l4 + offsetof(struct tcphdr, check);
		break;
	case IPPROTO_UDP:
		checksum = p->l4 + offsetof(struct udphdr, check);
		flags |= BPF_F_MARK_MANGLED_0;
		break;
	case IPPROTO_ICMPV6:
		checksum = p->l4 + offsetof(struct icmp6hdr, icmp6_cksum);
		break;
	default: /* ICMP has no pseudo-header */
		checksum = 0;
	}
	if (checksum && bpf_l4_csum_replace(skb, checksum, 0, diff, flags))
		return -1;
	if (p->is_icmp_error) {
		__be32 inner[8];

		reverse(p, to, inner);
		return rewrite_inner(skb, p, inner);
	}
	return 0;
}

static __always_inline void render_addresses(const struct packet *p, struct address source,
					     struct address destination, __be32 *to)
{
	if (p->v6) {
		render6(source, to);
		render6(destination, to + 4);
	} else {
		to[0] = render4(source);
		to[1] = render4(destination);
	}
}

/* Gives the packet addresses of these kinds: see rewrite_words(). */
static __always_inline int rewrite(struct __sk_buff *skb, struct packet *p, struct address source,
				   struct address destination, int n)
{
	__be32 to[8] = {};

	render_addresses(p, source, destination, to);
	return rewrite_words(skb, p, to, n);
}

/* Limits the MSS option of a SYN that leaves `lo`, whose segments are larger than the guests' link
 * takes. Linux sends this option first.
 */
static __always_inline void clamp_mss(struct __sk_buff *skb, const struct packet *p)
{
	u16 most = LINK_MTU - TCP_HEADER_SIZE -
		   (p->v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
	struct {
		u8 kind, length;
		__be16 mss;
	} option;

	if (!p->has_tcp_options || read(skb, p->l4 + TCP_HEADER_SIZE, &option, sizeof(option)) ||
	    option.kind != TCP_OPTION_MSS || option.length != TCP_OPTION_MSS_SIZE ||
	    bpf_ntohs(option.mss) <= most)
		return;
	if (!bpf_l4_csum_replace(skb, p->l4 + offsetof(struct tcphdr, check), option.mss,
				 bpf_htons(most), sizeof(option.mss))) {
		option.mss = bpf_htons(most);
		bpf_skb_store_bytes(skb, p->l4 + TCP_HEADER_SIZE, &option, sizeof(option), 0);
	}
}

/* Sets the MACs of a frame: from the alias to guest n. */
static __always_inline int write_macs(struct __sk_buff *skb, u8 n)
{
	u16 macs[6];

	render_macs(n, macs);
	return bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0);
}

#endif
