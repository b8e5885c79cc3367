/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * One packet of either family: parsed into what decisions need, and given other addresses.
 *
 * Reads never leave the packet: what is not in its linear part is copied. Writes go through
 * helpers, not through packet pointers: for those the kernel would make every packet private first
 * (a copy of the headers of each TCP segment on `lo`), also those that are left alone.
 *
 * Checksums are changed incrementally, so they stay right whether they are there in full or left to
 * the device (CHECKSUM_PARTIAL: the field then holds the pseudo-header's sum; BPF_F_PSEUDO_HDR).
 * CHECKSUM_COMPLETE, for which IPv6 would need BPF_F_IPV6 (Linux 6.16 and stable), is never met: it
 * is set by network cards and by the receiving stack; `lo`, veth and tap have neither before us.
 */

#include "addresses.h"

/* Makes the compiler forget what it knows of a value. It then leaves in the code a bound that it
 * could do without, and that the verifier, which knows less, has to see.
 */
#define hide(value)	   asm volatile("" : "+r"(value))

#define IP_MORE_FRAGMENTS  0x2000
#define IP_FRAGMENT_OFFSET 0x1fff

enum fault {
	FINE,
	TRUNCATED, /* or malformed */
	UNHANDLED, /* extension headers, other protocols */
	ORPHAN,	   /* a later fragment whose first was not seen */
};

/* Where a fragment is seen: its first has other addresses in each place. */
enum place { LO, PORT, UPLINK };

struct packet {
	__be32 from[8]; /* source, then destination, as they stand; IPv4 uses the first two words */
	__be32 before[3]; /* the IP header as far as the addresses; IPv6 has two words */
	struct address source, destination;
	u16 source_port; /* of the flow; an ICMP error speaks for the flow that it is about, in the */
	u16 destination_port; /* direction in which the error travels; host order */
	u8 protocol;	      /* of the flow: TCP or UDP; else ICMP's */
	u8 carried;	      /* protocol of the packet itself */
	u8 type;	      /* of ICMP */
	u8 l4;		      /* offset of the layer 4 header */
	u8 v6, fragment, later, error;
	u8 syn, options; /* TCP's */
	u8 fin, rst;
	u8 fault;
	__be32 id; /* of the datagram, if this is a fragment */
};

struct fragments_key {
	__be32 addresses[8];
	__be32 id;
	u8 slot, place, protocol, v6;
};

struct ports {
	u16 source, destination;
};

/* Later fragments have no ports: they borrow those of the first. */
BPF_TABLE("lru_hash", struct fragments_key, struct ports, fragments, 4096);

static __always_inline bool is_icmp(u8 protocol)
{
	return protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6;
}

static __always_inline int read(struct __sk_buff *skb, u32 offset, void *to, u32 size)
{
	void *from = (void *)(long)skb->data + offset;

	if (from + size <= (void *)(long)skb->data_end) {
		/* All headers begin so; byte for byte would take long. */
		__builtin_memcpy(to, __builtin_assume_aligned(from, 4), size);
		return 0;
	}
	__builtin_memset(to, 0, size); /* Linux 7.3 takes what a helper alone wrote for undefined */
	return bpf_skb_load_bytes(skb, offset, to, size);
}

static __always_inline bool is_error(u8 v6, u8 type)
{
	return v6 ? type >= 1 && type <= 4 : type == 3 || type == 11 || type == 12;
}

/* The flow that an ICMP error is about, from the packet inside it: sent by the error's receiver. */
static __always_inline int parse_error(struct __sk_buff *skb, struct packet *p)
{
	u32 inner = p->l4 + 8;
	__be16 ports[2];

	if (p->v6) {
		struct ipv6hdr ip;

		if (read(skb, inner, &ip, sizeof(ip)))
			return TRUNCATED;
		p->protocol = ip.nexthdr;
		inner += sizeof(ip);
	} else {
		struct iphdr ip;

		if (read(skb, inner, &ip, sizeof(ip)) || ip.ihl < 5)
			return TRUNCATED;
		p->protocol = ip.protocol;
		inner += ip.ihl * 4;
	}
	if (is_icmp(p->protocol))
		return FINE; /* about an echo: there are no ports */
	if (p->protocol != IPPROTO_TCP && p->protocol != IPPROTO_UDP)
		return UNHANDLED;
	if (read(skb, inner, ports, sizeof(ports)))
		return TRUNCATED;
	p->source_port = bpf_ntohs(ports[1]);
	p->destination_port = bpf_ntohs(ports[0]);
	return FINE;
}

static __always_inline int parse_l4(struct __sk_buff *skb, struct packet *p)
{
	if (p->carried == IPPROTO_TCP) {
		struct tcphdr tcp;

		if (read(skb, p->l4, &tcp, sizeof(tcp)))
			return TRUNCATED;
		p->source_port = bpf_ntohs(tcp.source);
		p->destination_port = bpf_ntohs(tcp.dest);
		p->syn = tcp.syn;
		p->options = tcp.doff > 5;
		p->fin = tcp.fin;
		p->rst = tcp.rst;
		return FINE;
	}
	if (p->carried == IPPROTO_UDP) {
		struct udphdr udp;

		if (read(skb, p->l4, &udp, sizeof(udp)))
			return TRUNCATED;
		p->source_port = bpf_ntohs(udp.source);
		p->destination_port = bpf_ntohs(udp.dest);
		return FINE;
	}
	if (p->carried == (p->v6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP)) {
		u8 icmp[8];

		if (read(skb, p->l4, icmp, sizeof(icmp)))
			return TRUNCATED;
		p->type = icmp[0];
		p->error = is_error(p->v6, p->type);
		return p->error ? parse_error(skb, p) : FINE;
	}
	return UNHANDLED;
}

/* The IP header, and where layer 4 begins; nonzero if there is no right IP header. */
static __always_inline int parse_ip(struct __sk_buff *skb, struct packet *p)
{
	p->fault = TRUNCATED;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr ip;

		if (read(skb, ETH_HLEN, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
			return -1;
		__builtin_memcpy(p->before, &ip, sizeof(p->before));
		p->from[0] = ip.saddr;
		p->from[1] = ip.daddr;
		p->l4 = ETH_HLEN + ip.ihl * 4;
		p->carried = ip.protocol;
		p->fragment = !!(ip.frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET));
		p->later = !!(ip.frag_off & bpf_htons(IP_FRAGMENT_OFFSET));
		p->id = ip.id;
	} else {
		struct ipv6hdr ip;

		p->v6 = true;
		if (read(skb, ETH_HLEN, &ip, sizeof(ip)) || ip.version != 6)
			return -1;
		__builtin_memcpy(p->before, &ip, 8);
		__builtin_memcpy(p->from, &ip.saddr, sizeof(p->from));
		p->l4 = ETH_HLEN + sizeof(ip);
		p->carried = ip.nexthdr;
		if (p->carried == IPPROTO_FRAGMENT) {
			struct {
				u8 nexthdr, reserved;
				__be16 offset;
				__be32 id;
			} header;

			if (read(skb, p->l4, &header, sizeof(header)))
				return -1;
			p->l4 += sizeof(header);
			p->carried = header.nexthdr;
			/* an atomic fragment (RFC 6946) is none */
			p->fragment = !!(header.offset & bpf_htons(0xfff9));
			p->later = !!(header.offset & bpf_htons(0xfff8));
			p->id = header.id;
		}
	}
	p->protocol = p->carried;
	p->fault = FINE;
	return 0;
}

/* Ports of a fragment: the first one's are kept, later ones are given those. */
static __always_inline void parse_fragment(struct packet *p, u8 slot, u8 place)
{
	struct fragments_key key = {.slot = slot, .place = place};
	struct ports first = {};

	__builtin_memcpy(key.addresses, p->from, sizeof(key.addresses));
	key.id = p->id;
	key.protocol = p->carried;
	key.v6 = p->v6;
	if (p->later) {
		struct ports *ports = fragments.lookup(&key);

		p->fault = ORPHAN;
		if (ports) {
			p->source_port = ports->source;
			p->destination_port = ports->destination;
			p->fault = FINE;
		}
	} else if (p->error) {
		p->fault = UNHANDLED; /* errors are never so long */
	} else if (p->fault == FINE) {
		first.source = p->source_port;
		first.destination = p->destination_port;
		fragments.update(&key, &first);
	}
}

static __always_inline struct address source_of(const struct packet *p)
{
	return p->v6 ? classify6(p->from) : classify4(p->from[0]);
}

static __always_inline struct address destination_of(const struct packet *p)
{
	return p->v6 ? classify6(p->from + 4) : classify4(p->from[1]);
}

/* The last step of parsing: the verifier follows whatever comes after it once for each combination of
 * the kinds.
 */
static __always_inline void classify_addresses(struct packet *p)
{
	p->source = source_of(p);
	p->destination = destination_of(p);
}

/* All but the kinds of the addresses; nonzero if there is no right IP header. */
static __always_inline int parse_headers(struct __sk_buff *skb, struct packet *p, u8 slot, u8 place)
{
	if (parse_ip(skb, p))
		return -1;
	if (!p->later)
		p->fault = parse_l4(skb, p);
	if (p->fragment)
		parse_fragment(p, slot, place);
	return 0;
}

/* Parse an IPv4 or IPv6 packet (skb->protocol says so). The addresses are right whatever `fault`
 * says afterwards; only where the IP header itself is wrong they are OTHER.
 */
static __always_inline void parse(struct __sk_buff *skb, struct packet *p, u8 slot, u8 place)
{
	if (!parse_headers(skb, p, slot, place))
		classify_addresses(p);
}

/* The packet inside an ICMP error, seen by its sender, whom the error is sent to. Its layer 4
 * checksum is left alone: under offload it was never there in full.
 */
static __always_inline int rewrite_inner(struct __sk_buff *skb, const struct packet *p, __be32 *to)
{
	__be32 from[8];
	__wsum diff;

	if (p->v6) {
		u32 addresses = p->l4 + 8 + 8;

		if (bpf_skb_load_bytes(skb, addresses, from, 32))
			return -1;
		diff = bpf_csum_diff(from, 32, to, 32, 0);
		return bpf_l4_csum_replace(skb, p->l4 + 2, 0, diff, 0) ||
		       bpf_skb_store_bytes(skb, addresses, to, 32, 0);
	}
	/* A right header sums up to nothing, before and after: ICMP's own checksum stays. */
	u32 inner = p->l4 + 8;

	if (bpf_skb_load_bytes(skb, inner + 12, from, 8))
		return -1;
	diff = bpf_csum_diff(from, 8, to, 8, 0);
	return bpf_l3_csum_replace(skb, inner + 10, 0, diff, 0) ||
	       bpf_skb_store_bytes(skb, inner + 12, to, 8, 0);
}

/* Source and destination swapped. */
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

/* What the one's complement sum of words grows by (RFC 1624), as bpf_csum_diff has it. */
static __always_inline __wsum difference(const __be32 *from, const __be32 *to, u32 words)
{
	u64 sum = 0;

#pragma unroll
	for (u32 i = 0; i < words; i++)
		sum += (u64)(u32)~from[i] + to[i];
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

/* The checksum of an IPv4 header whose words grow by that. */
static __always_inline void replace_checksum(__be16 *checksum, __wsum diff)
{
	u32 sum = (u16) ~*checksum + (diff & 0xffff) + (diff >> 16);

	sum = (sum & 0xffff) + (sum >> 16);
	*checksum = ~((sum & 0xffff) + (sum >> 16));
}

/* The headers up to the addresses, so that they are written by one call; `pad` keeps words aligned. */
struct head {
	u16 pad, macs[6];
	__be16 protocol;
	__be32 ip[10];
};

#define TO_LO -1

/* To guest n from the alias; to `lo` from nobody to nobody: it takes only these for its own. */
static __always_inline void render_macs(int n, u16 *macs)
{
	macs[0] = n == TO_LO ? 0 : bpf_htons(0x0277);
	macs[1] = 0;
	macs[2] = n == TO_LO ? 0 : bpf_htons(0x0100 | n);
	macs[3] = macs[0];
	macs[4] = 0;
	macs[5] = n == TO_LO ? 0 : bpf_htons(0x0001);
}

/* Give the packet these addresses in words of its family, `to` as in `struct packet`, and its frame
 * those of the link of guest n, or TO_LO. Returns 0, or nonzero where it is too short; it must
 * be dropped then.
 */
static __always_inline int rewrite_words(struct __sk_buff *skb, struct packet *p, __be32 *to, int n)
{
	u64 flags = BPF_F_PSEUDO_HDR;
	struct head head = {};
	__wsum diff;
	u32 checksum;

	render_macs(n, head.macs);
	if (p->v6) {
		head.protocol = bpf_htons(ETH_P_IPV6);
		__builtin_memcpy(head.ip, p->before, 8);
		diff = difference(p->from, to, 8);
		__builtin_memcpy(head.ip + 2, to, 32);
		if (bpf_skb_store_bytes(skb, 0, head.macs, ETH_HLEN + 40, 0))
			return -1;
	} else {
		head.protocol = bpf_htons(ETH_P_IP);
		__builtin_memcpy(head.ip, p->before, 12);
		diff = difference(p->from, to, 2);
		replace_checksum((void *)(head.ip + 2) + 2, diff);
		head.ip[3] = to[0];
		head.ip[4] = to[1];
		if (bpf_skb_store_bytes(skb, 0, head.macs, ETH_HLEN + 20, 0))
			return -1;
	}
	if (p->later)
		return 0;
	switch (p->carried) {
	case IPPROTO_TCP:
		checksum = p->l4 + 16;
		break;
	case IPPROTO_UDP:
		checksum = p->l4 + 6;
		flags |= BPF_F_MARK_MANGLED_0;
		break;
	case IPPROTO_ICMPV6:
		checksum = p->l4 + 2;
		break;
	default: /* ICMP has no pseudo-header */
		checksum = 0;
	}
	if (checksum && bpf_l4_csum_replace(skb, checksum, 0, diff, flags))
		return -1;
	if (p->error) {
		__be32 inner[8];

		reverse(p, to, inner);
		return rewrite_inner(skb, p, inner);
	}
	return 0;
}

static __always_inline int rewrite(struct __sk_buff *skb, struct packet *p, struct address source,
				   struct address destination, int n)
{
	__be32 to[8] = {};

	if (p->v6) {
		render6(source, to);
		render6(destination, to + 4);
	} else {
		to[0] = render4(source);
		to[1] = render4(destination);
	}
	return rewrite_words(skb, p, to, n);
}

/* A SYN that leaves `lo` offers segments of `lo`'s size. Linux sends this option first. */
static __always_inline void clamp_mss(struct __sk_buff *skb, const struct packet *p)
{
	u16 most = LINK_MTU - 20 - (p->v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
	struct {
		u8 kind, length;
		__be16 mss;
	} option;

	if (!p->options || read(skb, p->l4 + 20, &option, sizeof(option)) || option.kind != 2 ||
	    option.length != 4 || bpf_ntohs(option.mss) <= most)
		return;
	if (!bpf_l4_csum_replace(skb, p->l4 + 16, option.mss, bpf_htons(most), 2)) {
		option.mss = bpf_htons(most);
		bpf_skb_store_bytes(skb, p->l4 + 20, &option, sizeof(option), 0);
	}
}

/* From the alias's MAC to guest n's. */
static __always_inline int address_frame(struct __sk_buff *skb, u8 n)
{
	u16 macs[6];

	render_macs(n, macs);
	return bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0);
}
