/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * ARP and neighbor discovery on a guest's link: who claims which address, and the answers for
 * addresses that nobody has.
 */

#define ND_ROUTER_SOLICITATION	133
#define ND_ROUTER_ADVERTISEMENT 134
#define ND_SOLICITATION		135
#define ND_ADVERTISEMENT	136
#define ND_REDIRECT		137

struct arp {
	__be16 hardware, protocol;
	u8 hardware_length, protocol_length;
	__be16 operation;
	u8 sender_mac[6];
	u8 sender[4];
	u8 target_mac[6];
	u8 target[4];
} __attribute__((packed));

struct nd {
	u8 type, code;
	__be16 checksum;
	u8 flags, reserved[3];
	__be32 target[4];
	u8 option, option_length; /* in units of 8 bytes */
	u8 mac[6];
};

/* What a message of either protocol says. */
struct neighbor {
	struct address claimed; /* as the sender's own; UNSPECIFIED if none */
	struct address asked;	/* for whose MAC it asks; UNSPECIFIED if it does not */
	bool own_mac;		/* what is claimed, is claimed for the frame's source MAC */
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

/* Returns nonzero if it is no ARP for IPv4 over Ethernet. */
static __always_inline int parse_arp(struct __sk_buff *skb, struct arp *arp, struct neighbor *says)
{
	struct ethhdr eth;

	if (read(skb, 0, &eth, sizeof(eth)) || read(skb, ETH_HLEN, arp, sizeof(*arp)))
		return -1;
	if (arp->hardware != bpf_htons(1) || arp->protocol != bpf_htons(ETH_P_IP) ||
	    arp->hardware_length != 6 || arp->protocol_length != 4)
		return -1;
	says->claimed = classify4_bytes(arp->sender);
	says->asked.kind = UNSPECIFIED;
	if (arp->operation == bpf_htons(1))
		says->asked = classify4_bytes(arp->target);
	says->own_mac = same_mac(arp->sender_mac, eth.h_source);
	return 0;
}

static __always_inline bool is_nd(const struct packet *p)
{
	return p->v6 && p->fault == FINE && p->carried == IPPROTO_ICMPV6 &&
	       p->type >= ND_ROUTER_SOLICITATION && p->type <= ND_REDIRECT;
}

/* Returns nonzero if it is too short. What a solicitation claims is its source; an advertisement,
 * its target. Of duplicate address detection (no source) that is the target, too.
 */
static __always_inline int parse_nd(struct __sk_buff *skb, const struct packet *p,
				    struct neighbor *says)
{
	__be32 target[4];

	says->asked.kind = UNSPECIFIED;
	says->own_mac = true;
	says->claimed = p->source;
	if (p->type != ND_SOLICITATION && p->type != ND_ADVERTISEMENT)
		return 0;
	if (read(skb, p->l4 + 8, target, sizeof(target)))
		return -1;
	if (p->type == ND_ADVERTISEMENT || p->source.kind == UNSPECIFIED)
		says->claimed = classify6(target);
	else
		says->asked = classify6(target);
	return 0;
}

/* Turn a guest's ARP request into the answer, from the alias's MAC. Nonzero on failure. */
static __always_inline int answer_arp(struct __sk_buff *skb, const struct arp *asked, u8 n)
{
	struct arp answer = {
		.hardware = bpf_htons(1),
		.protocol = bpf_htons(ETH_P_IP),
		.hardware_length = 6,
		.protocol_length = 4,
		.operation = bpf_htons(2),
		.sender_mac = {0x02, 0x77, 0, 0, 0, 1},
		.target_mac = {0x02, 0x77, 0, 0, 1, n},
	};

	__builtin_memcpy(answer.sender, asked->target, 4);
	__builtin_memcpy(answer.target, asked->sender, 4);
	return bpf_skb_store_bytes(skb, ETH_HLEN, &answer, sizeof(answer), 0) ||
	       address_frame(skb, n);
}

/* Turn a guest's solicitation, with or without its option, into the advertisement. */
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
		       .flags = 0x60, /* solicited, override */
		       .option = 2,   /* target link-layer address */
		       .option_length = 1,
		       .mac = {0x02, 0x77, 0, 0, 0, 1}},
	};
	__be16 length = bpf_htons(sizeof(struct nd));
	__wsum sum;

	if (bpf_skb_load_bytes(skb, p->l4 + 8, a.nd.target, 16))
		return -1;
	__builtin_memcpy(a.pseudo.source, a.nd.target, 16);
	__builtin_memcpy(a.pseudo.destination, p->from, 16);
	sum = bpf_csum_diff(NULL, 0, (void *)&a, sizeof(a), 0);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	a.nd.checksum = ~sum;
	return bpf_skb_change_tail(skb, ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct nd), 0) ||
	       bpf_skb_store_bytes(skb, ETH_HLEN + 4, &length, sizeof(length), 0) ||
	       bpf_skb_store_bytes(skb, ETH_HLEN + 8, &a.pseudo, 32, 0) ||
	       bpf_skb_store_bytes(skb, ETH_HLEN + sizeof(struct ipv6hdr), &a.nd, sizeof(a.nd),
				   0) ||
	       address_frame(skb, n);
}
