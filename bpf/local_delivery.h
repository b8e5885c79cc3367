/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * Delivers a guest's packets to sockets of natives without passing `lo` and without rewriting.
 * Connected sockets receive them from the namespace's own stack, listeners and UDP sockets by
 * bpf_sk_assign.
 */

#ifndef TESTBED_LOCAL_DELIVERY_H
#define TESTBED_LOCAL_DELIVERY_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/if_packet.h>
#include <uapi/linux/in.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/pkt_cls.h>
#include <uapi/linux/tcp.h>

#include "addresses.h"
#include "common.h"
#include "maps.h"
#include "neighbor.h"
#include "packet.h"
#include "pod.h"
#include "sockets.h"

/* Makes the tuple of a packet's flow between these addresses. Returns its size. */
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

/* Makes the tuple that a guest's flow to the alias has on `lo`. Returns its size. */
static __always_inline u32 tuple_on_lo(const struct packet *p, struct bpf_sock_tuple *on_lo)
{
	__be32 from[8] = {};

	if (p->v6) {
		render6(address_of(NATIVE_VIEW, p->source.n), from);
		render6(address_of(LOOPBACK, 0), from + 4);
	} else {
		from[0] = render4(address_of(NATIVE_VIEW, p->source.n));
		from[1] = render4(address_of(LOOPBACK, 0));
	}
	return tuple(p, from, on_lo);
}

/* State of the TCP connection with these addresses; 0 if there is none. */
static __always_inline u32 tcp_state(struct __sk_buff *skb, struct bpf_sock_tuple *tuple, u32 size)
{
	struct bpf_sock *sk = bpf_skc_lookup_tcp(skb, tuple, size, BPF_F_CURRENT_NETNS, 0);
	u32 state;

	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state == BPF_TCP_LISTEN ? 0 : state;
}

/* Guests' TCP connections with the alias that the namespace's own stack has, each at an index made
 * from its hash. Packets of such a connection need no look-up of the socket, which takes as long as
 * everything else. The next SYN removes the entry, as the same addresses may be on `lo` after it.
 */
#define ESTABLISHED_BITS 12

BPF_ARRAY(established, u64, 1 << ESTABLISHED_BITS);

struct established_entry {
	u64 connection;
	u64 *stored; /* at the index of the connection */
};

static __always_inline struct established_entry find_established(struct port port, u8 v6,
								 u16 client, u16 server)
{
	u64 connection = (u64)client << 48 | (u64)server << 32 | v6 << 16 | port.slot << 8 | port.n;
	u32 key = connection * GOLDEN_RATIO_64 >> (64 - ESTABLISHED_BITS);
	struct established_entry entry = {connection, established.lookup(&key)};

	return entry;
}

static __always_inline void forget_established(struct port port, const struct packet *p)
{
	struct established_entry entry =
		find_established(port, p->v6, p->source_port, p->destination_port);

	if (entry.stored && *entry.stored == entry.connection)
		*entry.stored = 0;
}

/* Assigns a guest's packet to the socket that `lo` would find for it. Returns nonzero for a socket
 * that is not of the pod's cgroup or needs `lo`, and for a connection, which is then one on `lo`.
 */
static __always_inline int assign(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple on_lo = {};
	struct bpf_sock *sk;
	bool is_server = true;
	int failed = -1;
	u32 size;

	size = tuple_on_lo(p, &on_lo);
	if (p->l4_protocol == IPPROTO_TCP) {
		sk = bpf_skc_lookup_tcp(skb, &on_lo, size, BPF_F_CURRENT_NETNS, 0);
		if (!sk)
			return -1;
		is_server = sk->state == BPF_TCP_LISTEN;
	} else {
		sk = bpf_sk_lookup_udp(skb, &on_lo, size, BPF_F_CURRENT_NETNS, 0);
		if (!sk)
			return -1;
	}
	if (is_server) {
		struct socket_state *state = sockets.sk_storage_get(sk, 0, 0);

		if (state && !state->reads_pktinfo)
			failed = bpf_sk_assign(skb, sk, 0);
	}
	bpf_sk_release(sk);
	return failed;
}

/* Passes a packet to the namespace's own stack, also if the frame was for the alias's MAC. */
static __always_inline int pass_to_stack(struct __sk_buff *skb, struct port port, enum role role)
{
	count_native(skb, port.slot, port.n, GUEST_SENDS, role);
	if (skb->pkt_type)
		bpf_skb_change_type(skb, PACKET_HOST);
	return TC_ACT_OK;
}

static __always_inline int pass_assigned(struct __sk_buff *skb, struct port port)
{
	count_reason(skb, port.slot, REASON_ASSIGNED);
	return pass_to_stack(skb, port, GUEST_DIALS);
}

/* Whether a packet that meets a connection in TIME_WAIT belongs to a new connection, on `lo`. The
 * client reuses its port with a SYN for the listener, but the kernel would not find the listener at
 * the alias. So the SYN goes by `lo`, and with it the rest of that connection. (If the SYN were
 * assigned to the listener, the packets after it would still meet TIME_WAIT.)
 */
static __always_inline bool is_reuse_on_lo(struct __sk_buff *skb, const struct packet *p)
{
	struct bpf_sock_tuple on_lo = {};
	u32 size = tuple_on_lo(p, &on_lo);

	return p->syn || tcp_state(skb, &on_lo, size);
}

/* Delivers a guest's packet for the alias to a native past `lo`. Returns NOT_PAST_LO if it cannot. */
#define NOT_PAST_LO -1

static __always_inline int past_lo(struct __sk_buff *skb, struct port port, struct packet *p)
{
	struct bpf_sock_tuple real = {};
	u32 size, state = 0;

	if (p->is_fragment)
		return NOT_PAST_LO;
	if (is_icmp(p->protocol)) /* echo */
		return pass_to_stack(skb, port, GUEST_DIALS);
	if (p->protocol == IPPROTO_TCP) {
		size = tuple(p, p->addresses, &real);
		state = tcp_state(skb, &real, size);
		if (state && !(state == BPF_TCP_TIME_WAIT && is_reuse_on_lo(skb, p)))
			return pass_to_stack(skb, port, GUEST_DIALS);
	}
	if (state || p->is_icmp_error || assign(skb, p))
		return NOT_PAST_LO;
	return pass_assigned(skb, port);
}

/* Delivers a guest's packet to a native, past `lo` if possible. */
static __always_inline int to_native(struct __sk_buff *skb, struct port port, struct packet *p)
{
	int verdict;

	if (p->destination.kind == ALIAS) {
		verdict = past_lo(skb, port, p);
		if (verdict != NOT_PAST_LO)
			return verdict;
		count_reason(skb, port.slot, REASON_FALLBACK);
	}
	p->destination = hide_address(skb, p->destination); /* past_lo has learned about it */
	return enter_lo(skb, port.slot, p);
}

/* port_ingress() for plain packets (pod.h). Most are of connections that bypass `lo`: from the guest's
 * own address to the pod's own, or to the alias.
 */
static __always_inline int port_ingress_fast(struct __sk_buff *skb, struct port port, const bool v6)
{
	struct established_entry entry;
	struct bpf_sock_tuple *real;
	struct packet p = {};
	u32 state, size = v6 ? sizeof(real->ipv6) : sizeof(real->ipv4);
	u8 to = 0;

	if (!parse_plain_of_guest(skb, port, &p, v6))
		return NOT_ON_FAST_PATH;
	if (p.destination.kind == POD_LINK)
		return pass_to_stack(skb, port, GUEST_SERVES);
	switch (leave_port_fast(skb, port, &p, &to)) {
	case TO_GUEST:
		return redirect_marked(skb, port.slot, to);
	case TO_NATIVE:
		break;
	case TC_ACT_SHOT:
		return TC_ACT_SHOT;
	default:
		return NOT_ON_FAST_PATH;
	}
	if (p.destination.kind == NATIVE_SOURCE)
		return enter_lo(skb, port.slot, &p);
	if (p.syn)
		return NOT_ON_FAST_PATH;
	if (p.protocol == IPPROTO_UDP)
		return assign(skb, &p) ? NOT_ON_FAST_PATH : pass_assigned(skb, port);
	entry = find_established(port, v6, p.source_port, p.destination_port);
	if (!entry.stored || *entry.stored != entry.connection) {
		/* In a plain packet the ports follow the addresses. */
		real = data_of(skb) + p.l4 - (v6 ? 32 : 8);
		if ((void *)real + size > data_end_of(skb))
			return NOT_ON_FAST_PATH;
		state = tcp_state(skb, real, size);
		if (!state || state == BPF_TCP_TIME_WAIT)
			return NOT_ON_FAST_PATH;
		if (entry.stored && state == BPF_TCP_ESTABLISHED)
			*entry.stored = entry.connection;
	}
	return pass_to_stack(skb, port, GUEST_DIALS);
}

#endif
