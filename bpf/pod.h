/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * What datapaths of a pod share that carry packets between `lo` and guests' ports: their maps, what
 * leaves `lo`, what a guest may send and to whom it goes, and how a packet comes into `lo`.
 *
 * The file that includes this names what it counts first (`enum reason`, at least the reasons used
 * here, REASONS at the end), and decides how a packet gets from one place to another.
 */

#include <uapi/linux/bpf.h>
#include <uapi/linux/icmp.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/pkt_cls.h>
#include <uapi/linux/tcp.h>
#include <uapi/linux/udp.h>

#include "packet.h"
#include "neighbor.h"

#define SLOTS	   256
#define LO_IFINDEX 1

/* What may be decided besides TC_ACT_OK, TC_ACT_SHOT, and TC_ACT_REDIRECT. */
#define TO_GUEST   1000 /* addressed to a guest: redirect it to its port */
#define TO_NATIVE  1001 /* as the guest sent it: bring it into `lo` */
#define ADMITTED   1002 /* from a guest, to be decided upon */

struct count {
	u64 packets, bytes;
};

#define FEW 64

/* What one pod's guests 0 to 63 carried between them and natives: n << 1, and | 1 if n serves. */
struct few {
	struct count of[FEW * 2];
};

/* Two workloads, 0 for native. */
struct flow {
	u8 slot, client, server, padding;
};

struct odd_key {
	u8 slot, n, protocol, v6;
	u16 native_port, guest_port;
};

struct odd_addresses {
	__be32 words[8]; /* as in struct packet, from the native to the guest */
};

/* A TCP connection between guests. */
struct conversation {
	u8 slot, client, server, v6;
	u16 client_port, server_port;
};

BPF_ARRAY(guests, u32, SLOTS * 256); /* slot << 8 | n: ifindex of the port; 0: the guest is down */
BPF_HASH(owners, u32, u32, 16384);   /* slot << 24 | protocol << 16 | port: n; not here: native */
#define IPV4_ONLY 0x100		     /* in the value: that guest knows no IPv6 */
BPF_PERCPU_ARRAY(counters, struct count, SLOTS *REASONS);
/* Counts are looked up in a hash table only for what is between guests, and for guests beyond the
 * first: that takes as long as a half of what most packets meet in `steer`.
 */
BPF_PERCPU_ARRAY(carried_few, struct few, SLOTS);
BPF_TABLE("percpu_hash", struct flow, struct count, carried, 16384);
/* Two such flows with the same ports, but different addresses, would be mistaken for each other. */
BPF_TABLE("lru_hash", struct odd_key, struct odd_addresses, odd, 16384);
/* Those whose other end may be waiting: for userspace, which tells it when a guest ends. */
BPF_TABLE("lru_hash", struct conversation, u8, conversations, 16384);

struct here {
	u8 slot, n;
};

static __always_inline struct here where(struct __sk_buff *skb)
{
	u32 classid = skb->tc_classid;
	struct here here = {.slot = classid >> 8, .n = classid};

	return here;
}

static __always_inline void add(struct __sk_buff *skb, struct count *count, u64 times)
{
	if (count) {
		count->packets += times;
		count->bytes += times * (skb->len - ETH_HLEN);
	}
}

#ifdef TRACED
BPF_PERCPU_ARRAY(noted, u32, 1); /* what the packet under way was counted as last, plus one */

static __always_inline void note(u32 reason)
{
	u32 zero = 0, *last = noted.lookup(&zero);

	if (last)
		*last = reason;
}
#endif

static __always_inline void tally_times(struct __sk_buff *skb, u8 slot, u32 reason, u64 times)
{
	u32 key = slot * REASONS + reason;

#ifdef TRACED
	note(reason + 1);
#endif
	add(skb, counters.lookup(&key), times);
}

static __always_inline void tally(struct __sk_buff *skb, u8 slot, u32 reason)
{
	tally_times(skb, slot, reason, 1);
}

static __always_inline int drop(struct __sk_buff *skb, u8 slot, u32 reason)
{
	tally(skb, slot, reason);
	return TC_ACT_SHOT;
}

static __always_inline int drop_fault(struct __sk_buff *skb, u8 slot, u8 fault)
{
	return drop(skb, slot, REASON_TRUNCATED + fault - TRUNCATED);
}

/* Entries of `carried` are made with the pod, for its workloads. */
static __always_inline void carry(struct __sk_buff *skb, u8 slot, u8 client, u8 server)
{
	struct flow flow = {.slot = slot, .client = client, .server = server};
	u32 key = slot, n = client | server;
	u64 at = n << 1 | !client;
	struct few *few;

	if ((client && server) || n >= FEW) {
		add(skb, carried.lookup(&flow), 1);
		return;
	}
	few = carried_few.lookup(&key);
	hide(at);
	if (few)
		add(skb, &few->of[at & (FEW * 2 - 1)], 1);
}

/* Number and nature of the guest that owns a port, or -1 for a native. */
static __always_inline int ownership(u8 slot, u8 protocol, u16 port)
{
	u32 key = slot << 24 | protocol << 16 | port;
	u32 *n = owners.lookup(&key);

	return n ? *n : -1;
}

/* The guest that owns a port, or -1 for a native. */
static __always_inline int owner(u8 slot, u8 protocol, u16 port)
{
	int n = ownership(slot, protocol, port);

	return n < 0 ? n : (u8)n;
}

static __always_inline u32 port_of(u8 slot, u8 n)
{
	u32 key = slot << 8 | n, *ifindex = guests.lookup(&key);

	return ifindex ? *ifindex : 0;
}

/* Who sends is up. That a guest ended is for others to say: they clear its row. */
static __always_inline void wake(struct __sk_buff *skb, struct here here)
{
	u32 key = here.slot << 8 | here.n, *ifindex = guests.lookup(&key);

	if (ifindex && !*ifindex)
		*ifindex = skb->ifindex;
}

/* The guest that serves a port, or -1: a native, or nobody as the owner is down. What is for nobody
 * is the natives', too: on `lo` no socket listens, and the kernel refuses at once.
 */
static __always_inline int serving(u8 slot, u8 protocol, u16 port)
{
	int n = owner(slot, protocol, port);

	return n < 0 || port_of(slot, n) ? n : -1;
}

static __always_inline struct address as(u8 kind, u8 n)
{
	struct address address = {kind, n};

	return address;
}

static __always_inline int redirect_to_guest(struct __sk_buff *skb, u8 slot, u8 n)
{
	u32 ifindex = port_of(slot, n);

	if (!ifindex)
		return drop(skb, slot, REASON_NO_GUEST);
	return bpf_redirect(ifindex, 0);
}

/* Out of `lo`, before any socket: replies to guests, and what is for a port that a guest owns,
 * whatever address of the pod was dialed. All else is the kernel's own loopback. Returns TO_GUEST
 * with the guest's number, or a verdict.
 */
static __always_inline int leave_lo(struct __sk_buff *skb, struct here here, u8 *to)
{
	struct address source;
	struct packet p = {};
	int n;

	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return TC_ACT_OK;
	parse(skb, &p, here.slot, LO);
	if (p.fault != FINE || p.destination.kind == MULTICAST)
		return TC_ACT_OK;
	if (p.destination.kind == NATIVE_VIEW && port_of(here.slot, p.destination.n)) {
		n = p.destination.n;
		/* What a guest that is down would have got is refused in its name. */
		source = p.source.kind == NATIVE_VIEW ? as(GUEST_VIEW, p.source.n) : as(ALIAS, 0);
	} else {
		if (is_icmp(p.protocol))
			return TC_ACT_OK;
		n = ownership(here.slot, p.protocol, p.destination_port);
		if (n < 0)
			return TC_ACT_OK;
		if ((p.v6 && n & IPV4_ONLY) || !port_of(here.slot, n)) {
			/* Sent on, it would be lost in silence. On `lo` no socket listens: refused. */
			tally(skb, here.slot, REASON_NO_GUEST);
			return TC_ACT_OK;
		}
		n = (u8)n;
		source = as(NATIVE_SOURCE, 0);
		if (p.source.kind != LOOPBACK || p.destination.kind != LOOPBACK) {
			struct odd_key flow = {
				here.slot, n, p.protocol, p.v6, p.source_port, p.destination_port};

			source = as(NATIVE_SOURCE_ODD, 0);
			tally(skb, here.slot, REASON_ODD_SOURCE);
			if (!p.error)
				odd.update(&flow, (struct odd_addresses *)p.from);
		}
	}

	/* Redirected, it would be dropped in silence. */
	if (skb->len - ETH_HLEN > LINK_MTU && !skb->gso_size)
		return drop(skb, here.slot, REASON_TOO_BIG);
	if (p.syn)
		clamp_mss(skb, &p);
	if (rewrite(skb, &p, source, as(LINK, n), n))
		return drop(skb, here.slot, REASON_TRUNCATED);
	if (source.kind == ALIAS)
		carry(skb, here.slot, n, 0);
	else
		carry(skb, here.slot, source.n, n);
	*to = n;
	return TO_GUEST;
}

/* A guest claims only its own addresses, and only for its own MAC. */
static __always_inline bool may_claim(struct address claimed, u8 n)
{
	return (claimed.kind == LINK && claimed.n == n) || claimed.kind == LINK_LOCAL ||
	       claimed.kind == UNSPECIFIED;
}

/* Addresses of which every guest believes that the alias's MAC has them. */
static __always_inline bool is_answered(struct address asked)
{
	return asked.kind == ALIAS || asked.kind == NATIVE_SOURCE ||
	       asked.kind == NATIVE_SOURCE_ODD || asked.kind == GUEST_VIEW;
}

static __always_inline int port_arp(struct __sk_buff *skb, struct here here)
{
	struct neighbor says = {};
	struct arp arp;

	if (parse_arp(skb, &arp, &says))
		return drop(skb, here.slot, REASON_UNHANDLED);
	if (!says.own_mac || !may_claim(says.claimed, here.n))
		return drop(skb, here.slot, REASON_SPOOFED);
	if (!is_answered(says.asked))
		return TC_ACT_OK;
	tally(skb, here.slot, REASON_ANSWERED);
	if (answer_arp(skb, &arp, here.n))
		return drop(skb, here.slot, REASON_TRUNCATED);
	return bpf_redirect(skb->ifindex, 0);
}

static __always_inline int port_nd(struct __sk_buff *skb, struct here here, struct packet *p)
{
	struct neighbor says = {};

	if (p->type == ND_ROUTER_ADVERTISEMENT || p->type == ND_REDIRECT)
		return drop(skb, here.slot, REASON_SPOOFED);
	if (parse_nd(skb, p, &says))
		return drop(skb, here.slot, REASON_TRUNCATED);
	if (!may_claim(p->source, here.n) || !may_claim(says.claimed, here.n))
		return drop(skb, here.slot, REASON_SPOOFED);
	if (!is_answered(says.asked))
		return TC_ACT_OK;
	tally(skb, here.slot, REASON_ANSWERED);
	if (answer_solicitation(skb, p, here.n))
		return drop(skb, here.slot, REASON_TRUNCATED);
	return bpf_redirect(skb->ifindex, 0);
}

/* The same value, of which the verifier knows nothing any more: it does not follow what is in skb->cb.
 * Whatever comes after, it would go through once for each combination of what it knows. In assembler,
 * as the offset has to stay in the instruction.
 */
static __always_inline u8 forget(struct __sk_buff *skb, u64 value)
{
	asm volatile("*(u32 *)(%1 + %2) = %0\n"
		     "%0 = *(u32 *)(%1 + %2)"
		     : "+r"(value)
		     : "r"(skb), "i"(offsetof(struct __sk_buff, cb)));
	return value;
}

static __always_inline struct address forget_address(struct __sk_buff *skb, struct address is)
{
	is.kind = forget(skb, is.kind);
	is.n = forget(skb, is.n);
	return is;
}

static __always_inline void forget_headers(struct __sk_buff *skb, struct packet *p)
{
	p->fragment = forget(skb, p->fragment);
	p->later = forget(skb, p->later);
	p->error = forget(skb, p->error);
	p->fault = forget(skb, p->fault);
	p->protocol = forget(skb, p->protocol);
	p->carried = forget(skb, p->carried);
	p->l4 = forget(skb, p->l4);
}

/* What a guest sends, parsed so that the verifier need not remember how. */
static __always_inline void parse_guests(struct __sk_buff *skb, struct packet *p, u8 slot)
{
	if (parse_headers(skb, p, slot, PORT))
		return;
	forget_headers(skb, p);
	p->source = forget_address(skb, source_of(p));
	p->destination = forget_address(skb, destination_of(p));
}

/* What guest n may send at all. Returns ADMITTED with the packet parsed if its destination is an
 * address that only we use, or a verdict: TC_ACT_OK for whatever is not addressed to us,
 * TC_ACT_REDIRECT for answers to guest n.
 */
static __always_inline int admit(struct __sk_buff *skb, struct here here, struct packet *p)
{
	u8 mac[6] = {0x02, 0x77, 0, 0, 1, here.n};
	struct ethhdr eth;

	if (read(skb, 0, &eth, sizeof(eth)) || !same_mac(eth.h_source, mac))
		return drop(skb, here.slot, REASON_SPOOFED);
	if (skb->vlan_present)
		return drop(skb, here.slot, REASON_UNHANDLED);
	if (skb->protocol == bpf_htons(ETH_P_ARP))
		return port_arp(skb, here);
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return drop(skb, here.slot, REASON_UNHANDLED);

	parse_guests(skb, p, here.slot);
	if (!p->fragment && is_nd(p))
		return port_nd(skb, here, p);
	if (p->source.kind != LINK || p->source.n != here.n) {
		/* Reports of multicast listeners: the link may want them, the pod cannot be hurt. */
		if (p->v6 && p->destination.kind == MULTICAST && p->carried == 0 &&
		    may_claim(p->source, here.n))
			return TC_ACT_OK;
		return drop(skb, here.slot,
			    p->fault == TRUNCATED && p->source.kind == OTHER ? REASON_TRUNCATED
									     : REASON_SPOOFED);
	}
	if (!is_reserved(p->destination))
		return TC_ACT_OK;
	return p->fault == FINE ? ADMITTED : drop_fault(skb, here.slot, p->fault);
}

/* From the client's SYN to a RST, or the server's FIN. */
static __always_inline void follow(const struct packet *p, u8 slot, u8 client, u8 server,
				   bool answers)
{
	struct conversation it = {slot, client, server, p->v6};
	u8 lasts = 1;

	it.client_port = answers ? p->destination_port : p->source_port;
	it.server_port = answers ? p->source_port : p->destination_port;
	if (p->rst || (p->fin && answers))
		conversations.delete(&it);
	else if (p->syn && !answers)
		conversations.update(&it, &lasts);
}

/* From guest n. Towards the alias it dials `localhost`; towards a native source or a guest's view
 * it answers, from a port that it owns. Returns TO_GUEST with the other guest's number, TO_NATIVE, or
 * a verdict.
 */
static __always_inline int leave_port(struct __sk_buff *skb, struct here here, struct packet *p,
				      u8 *to)
{
	struct address source;
	int verdict = admit(skb, here, p), n;

	if (verdict != ADMITTED)
		return verdict;
	switch (p->destination.kind) {
	case ALIAS:
		n = is_icmp(p->protocol) ? -1
					 : serving(here.slot, p->protocol, p->destination_port);
		if (n < 0)
			return TO_NATIVE;
		source = as(GUEST_VIEW, here.n);
		carry(skb, here.slot, here.n, n);
		follow(p, here.slot, here.n, n, false);
		break;
	case NATIVE_SOURCE:
	case NATIVE_SOURCE_ODD:
		if (owner(here.slot, p->protocol, p->source_port) != here.n)
			return drop(skb, here.slot, REASON_SPOOFED);
		return TO_NATIVE;
	case GUEST_VIEW:
		n = p->destination.n;
		if (owner(here.slot, p->protocol, p->source_port) != here.n)
			return drop(skb, here.slot, REASON_SPOOFED);
		if (p->carried == IPPROTO_TCP && !p->syn && !port_of(here.slot, n)) {
			tally(skb, here.slot, REASON_NO_GUEST);
			return TO_NATIVE;
		}
		source = as(ALIAS, 0);
		carry(skb, here.slot, n, here.n);
		follow(p, here.slot, n, here.n, true);
		break;
	default:
		return drop(skb, here.slot, REASON_SPOOFED);
	}
	if (rewrite(skb, p, source, as(LINK, n), n))
		return drop(skb, here.slot, REASON_TRUNCATED);
	*to = n;
	return TO_GUEST;
}

/* Into `lo`, as if it had come from there: what guest n sent to a native. */
static __always_inline int enter_lo(struct __sk_buff *skb, u8 slot, struct packet *p)
{
	struct odd_addresses *addresses;
	struct odd_key flow = {};
	u8 n = p->source.n;
	__be32 to[8] = {};

	switch (p->destination.kind) {
	case ALIAS:
		if (rewrite(skb, p, as(NATIVE_VIEW, n), as(LOOPBACK, 0), TO_LO))
			return drop(skb, slot, REASON_TRUNCATED);
		carry(skb, slot, n, 0);
		break;
	case NATIVE_SOURCE:
		if (rewrite(skb, p, as(LOOPBACK, 0), as(LOOPBACK, 0), TO_LO))
			return drop(skb, slot, REASON_TRUNCATED);
		carry(skb, slot, 0, n);
		break;
	case NATIVE_SOURCE_ODD:
		flow.slot = slot;
		flow.n = n;
		flow.protocol = p->protocol;
		flow.v6 = p->v6;
		flow.native_port = p->destination_port;
		flow.guest_port = p->source_port;
		addresses = odd.lookup(&flow);
		if (!addresses)
			return drop(skb, slot, REASON_FRAGMENT_ORPHAN);
		reverse(p, addresses->words, to);
		if (rewrite_words(skb, p, to, TO_LO))
			return drop(skb, slot, REASON_TRUNCATED);
		carry(skb, slot, 0, n);
		break;
	case GUEST_VIEW: /* of a guest that is down: nobody is there, and the kernel refuses */
		if (rewrite(skb, p, as(NATIVE_VIEW, n), as(NATIVE_VIEW, p->destination.n), TO_LO))
			return drop(skb, slot, REASON_TRUNCATED);
		break;
	default:
		return drop(skb, slot, REASON_SPOOFED);
	}
	return bpf_redirect(LO_IFINDEX, BPF_F_INGRESS);
}
