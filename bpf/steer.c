/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The datapath `steer`: guests' ports are in the pod's namespace, so packets need not be moved.
 *
 *   pod's namespace
 *
 *   natives ---- lo ---- g1 ------ guest 1
 *                |       port_ingress
 *                |
 *                +------ g2 ------ guest 2
 *        lo_egress       port_ingress
 *                        port_egress
 *
 * Always there is translation between `lo` and the ports, as in `capture`: it serves every process
 * of the namespace, whatever its socket is bound to.
 *
 *   native to guest:   lo_egress > g1       back: port_ingress > lo
 *   guest to native:   port_ingress > lo    back: lo_egress > g1
 *   guest to guest:    port_ingress > g2    back: port_ingress > g1
 *
 * Over it, for sockets of the pod's cgroup, packets are left as they are: those that dial a guest's
 * port are given the guest's address (sockets.h), and those that a guest dials are handed its packets
 * in port_ingress. Their packets have the pod's address on the link, or the alias, at this end.
 * Whatever port_ingress does not know for one of these, a fragment for instance, goes by `lo`.
 */

/* clang-format off */
#define BPF_LICENSE Dual BSD/GPL
/* clang-format on */

/* Why a packet was counted: a row of `counters`. Same order as REASONS in steer.py. */
enum reason {
	REASON_TOO_BIG,	  /* dropped: a datagram from a native, larger than the guests' link */
	REASON_SPOOFED,	  /* dropped: a guest claims what is not its own */
	REASON_TRUNCATED, /* dropped: too short for its headers */
	REASON_UNHANDLED, /* dropped: a protocol that has no ports, an extension header */
	REASON_FRAGMENT_ORPHAN, /* dropped: a fragment whose first was not seen */
	REASON_NO_GUEST,	/* passed on, to be refused: the guest is down, or has no IPv6 */
	REASON_ODD_SOURCE, /* passed on: a native flow with other addresses than 127.0.0.1, ::1 */
	REASON_ANSWERED,   /* ARP request or neighbor solicitation */
	REASON_STEERED,	   /* calls: a native dialed a guest, or sent it a datagram, past `lo` */
	REASON_ASSIGNED,   /* passed on: a guest's SYN or datagram, to a native's socket */
	REASON_FALLBACK,   /* what could be neither, and goes by `lo`; calls and packets */
	REASONS,
};

#include "pod.h"
#include "sockets.h"

/* On what our programs redirect: port_egress has no need to count that again. */
#define MARK 0x77000001

static __always_inline int redirect_marked(struct __sk_buff *skb, u8 slot, u8 n)
{
	skb->mark = MARK;
	return redirect_to_guest(skb, slot, n);
}

/* Out of `lo`, to a guest's port. */
int lo_egress(struct __sk_buff *skb)
{
	struct here here = where(skb);
	u8 to = 0;
	int verdict = leave_lo(skb, here, &to);

	return verdict == TO_GUEST ? redirect_marked(skb, here.slot, to) : verdict;
}

/* The tuple of a packet's flow between these addresses; returns its size. */
static __always_inline u32 tuple(const struct packet *p, const __be32 *addresses,
				 struct bpf_sock_tuple *tuple)
{
	if (p->v6) {
		__builtin_memcpy(tuple->ipv6.saddr, addresses, 32);
		tuple->ipv6.sport = bpf_htons(p->source_port);
		tuple->ipv6.dport = bpf_htons(p->destination_port);
		return sizeof(tuple->ipv6);
	}
	tuple->ipv4.saddr = addresses[0];
	tuple->ipv4.daddr = addresses[1];
	tuple->ipv4.sport = bpf_htons(p->source_port);
	tuple->ipv4.dport = bpf_htons(p->destination_port);
	return sizeof(tuple->ipv4);
}

/* The tuple of a guest's flow to the alias as it is on `lo`; returns its size. */
static __always_inline u32 tuple_on_lo(const struct packet *p, struct bpf_sock_tuple *on_lo)
{
	__be32 from[8] = {};

	if (p->v6) {
		render6(as(NATIVE_VIEW, p->source.n), from);
		render6(as(LOOPBACK, 0), from + 4);
	} else {
		from[0] = render4(as(NATIVE_VIEW, p->source.n));
		from[1] = render4(as(LOOPBACK, 0));
	}
	return tuple(p, from, on_lo);
}

/* State of the connection that has these very addresses, or 0. */
static __always_inline u32 connection(struct __sk_buff *skb, struct bpf_sock_tuple *tuple, u32 size)
{
	struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, tuple, size, BPF_F_CURRENT_NETNS, 0);
	u32 state;

	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state == BPF_TCP_LISTEN ? 0 : state;
}

/* Guests' connections with the alias that were found to be the kernel's own, each in the place that
 * its hash says: what follows in one is spared the look-up of its socket, which takes as long as
 * all else. Forgotten at the next SYN, after which the same addresses may be on `lo`.
 */
#define HANDED_BITS 12
BPF_ARRAY(handed, u64, 1 << HANDED_BITS);

struct handed {
	u64 connection;
	u64 *place;
};

static __always_inline struct handed handed_over(struct here here, u8 v6, u16 client, u16 server)
{
	u64 connection = (u64)client << 48 | (u64)server << 32 | v6 << 16 | here.slot << 8 | here.n;
	u32 key = connection * 0x9E3779B97F4A7C15 >> (64 - HANDED_BITS);
	struct handed found = {connection, handed.lookup(&key)};

	return found;
}

static __always_inline void forget_handed(struct here here, const struct packet *p)
{
	struct handed handed = handed_over(here, p->v6, p->source_port, p->destination_port);

	if (handed.place && *handed.place == handed.connection)
		*handed.place = 0;
}

/* Hand a guest's packet to the socket that `lo` would find for it. Fails for sockets that are not of
 * the pod's cgroup or have to stay on `lo`, and for connections, which then are such on `lo`.
 */
static __always_inline int assign(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple on_lo = {};
	struct bpf_sock *sk;
	bool serves = true;
	int failed = -1;
	u32 size;

	size = tuple_on_lo(p, &on_lo);
	if (p->carried == IPPROTO_TCP) {
		sk = bpf_skc_lookup_tcp(skb, &on_lo, size, BPF_F_CURRENT_NETNS, 0);
		if (!sk)
			return -1;
		serves = sk->state == BPF_TCP_LISTEN;
	} else {
		sk = bpf_sk_lookup_udp(skb, &on_lo, size, BPF_F_CURRENT_NETNS, 0);
		if (!sk)
			return -1;
	}
	if (serves) {
		struct socket *socket = sockets.sk_storage_get(sk, 0, 0);

		if (socket && !socket->by_lo)
			failed = bpf_sk_assign(skb, sk, 0);
	}
	bpf_sk_release(sk);
	return failed;
}

/* Up the namespace's own stack; the frame may have been addressed to the alias's MAC. */
static __always_inline int pass(struct __sk_buff *skb, u8 slot, u8 client, u8 server)
{
	carry(skb, slot, client, server);
	if (skb->pkt_type)
		bpf_skb_change_type(skb, 0 /* PACKET_HOST */);
	return TC_ACT_OK;
}

/* Whether it goes by `lo`: a connection in TIME_WAIT has the client's port until a SYN uses that
 * again, which is for the listener, that the kernel would not find at the alias. So the SYN, and all
 * that follows it. (Handed to the listener, what follows would still meet TIME_WAIT.)
 */
static __always_inline bool is_over(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple on_lo = {};
	u32 size = tuple_on_lo(p, &on_lo);

	return p->syn || connection(skb, &on_lo, size);
}

/* To the alias, where no guest owns the port. */
static __always_inline int to_native(struct __sk_buff *skb, struct here here, struct packet *p)
{
	struct bpf_sock_tuple real = {};
	u32 size, state = 0;

	if (p->destination.kind != ALIAS)
		return enter_lo(skb, here.slot, p);
	if (!p->fragment) {
		if (is_icmp(p->protocol)) /* echo */
			return pass(skb, here.slot, here.n, 0);
		if (p->protocol == IPPROTO_TCP) {
			size = tuple(p, p->from, &real);
			if (p->syn)
				forget_handed(here, p);
			state = connection(skb, &real, size);
			if (state && !(state == BPF_TCP_TIME_WAIT && is_over(skb, p)))
				return pass(skb, here.slot, here.n, 0);
		}
		if (!state && !p->error && !assign(skb, p)) {
			tally(skb, here.slot, REASON_ASSIGNED);
			return pass(skb, here.slot, here.n, 0);
		}
	}
	tally(skb, here.slot, REASON_FALLBACK);
	return enter_lo(skb, here.slot, p);
}

/* What most packets are, those of connections that go past `lo`, settled with as little work as can
 * be: from guest n's own addresses, to the pod's own or to a connection with the alias. Anything that
 * is not quite that is left to the rest of the program, with NOT_SETTLED.
 */
#define NOT_SETTLED -1

static __always_inline int settle(struct __sk_buff *skb, struct here here)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	u8 mac[6] = {0x02, 0x77, 0, 0, 1, here.n};
	struct bpf_sock_tuple *real;
	struct ethhdr *eth = data;
	struct handed handed;
	u8 protocol, kind;
	struct tcphdr *tcp;
	u32 size, state;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + ETH_HLEN;

		size = sizeof(real->ipv4);
		real = (void *)&ip->saddr; /* without options, the ports are next */
		if ((void *)real + sizeof(real->ipv4) > end || *(u8 *)ip != 0x45 ||
		    ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET) ||
		    ip->saddr != render4(as(LINK, here.n)))
			return NOT_SETTLED;
		tcp = (void *)(ip + 1);
		protocol = ip->protocol;
		kind = classify4(ip->daddr).kind;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETH_HLEN;
		__be32 own[4], *from = (void *)&ip->saddr;

		size = sizeof(real->ipv6);
		real = (void *)&ip->saddr;
		render6(as(LINK, here.n), own);
		if ((void *)real + sizeof(real->ipv6) > end || from[0] != own[0] ||
		    from[1] != own[1] || from[2] != own[2] || from[3] != own[3])
			return NOT_SETTLED;
		tcp = (void *)(ip + 1);
		protocol = ip->nexthdr;
		kind = classify6(from + 4).kind;
	} else {
		return NOT_SETTLED;
	}
	if (!same_mac(eth->h_source, mac) || skb->vlan_present)
		return NOT_SETTLED;
	if (kind == POD_LINK && (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP))
		return pass(skb, here.slot, 0, here.n);
	if (kind != ALIAS || protocol != IPPROTO_TCP)
		return NOT_SETTLED;
	if ((void *)(tcp + 1) > end || tcp->syn)
		return NOT_SETTLED;
	handed = handed_over(here, size == sizeof(real->ipv6), bpf_ntohs(tcp->source),
			     bpf_ntohs(tcp->dest));
	if (!handed.place || *handed.place != handed.connection) {
		state = connection(skb, real, size);
		if (!state || state == BPF_TCP_TIME_WAIT)
			return NOT_SETTLED;
		if (handed.place && state == BPF_TCP_ESTABLISHED)
			*handed.place = handed.connection;
	}
	return pass(skb, here.slot, here.n, 0);
}

/* From guest n, to whoever owns the port; all else is the namespace's. */
int port_ingress(struct __sk_buff *skb)
{
	struct here here = where(skb);
	struct packet p = {};
	u8 to = 0;
	int verdict;

	wake(skb, here);
	verdict = settle(skb, here);
	if (verdict != NOT_SETTLED)
		return verdict;
	verdict = leave_port(skb, here, &p, &to);
	switch (verdict) {
	case TO_GUEST:
		return redirect_marked(skb, here.slot, to);
	case TO_NATIVE:
		return to_native(skb, here, &p);
	case TC_ACT_OK:
		if (p.destination.kind == POD_LINK)
			carry(skb, here.slot, 0, here.n);
	}
	return verdict;
}

/* To guest n, by the namespace's own stack: nothing is to be done but to count. */
int port_egress(struct __sk_buff *skb)
{
	struct here here = where(skb);
	struct address source = {};
	__be32 words[4];

	if (skb->mark == MARK)
		return TC_ACT_OK;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (!read(skb, ETH_HLEN + offsetof(struct iphdr, saddr), words, 4))
			source = classify4(words[0]);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		if (!read(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), words, 16))
			source = classify6(words);
	}
	if (source.kind == POD_LINK)
		carry(skb, here.slot, 0, here.n);
	else if (source.kind == ALIAS)
		carry(skb, here.slot, here.n, 0);
	return TC_ACT_OK;
}
