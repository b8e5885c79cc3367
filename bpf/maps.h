/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The maps that the tc datapaths share, and their accessors: whose a port is, where a guest is,
 * counters. docs/architecture.md has a table of all maps.
 *
 * Up to 255 pods share a loaded set of programs. Each has a slot, a number from 1 that is a part of
 * the keys. Slot 0 is for BPF_PROG_TEST_RUN.
 *
 * The file that includes this defines `enum reason` first, with REASONS as its last member.
 */

#ifndef TESTBED_MAPS_H
#define TESTBED_MAPS_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/if_packet.h>
#include <uapi/linux/in.h>
#include <uapi/linux/pkt_cls.h>

#include "common.h"
#include "packet.h"
#include "state.h"

/* --- where a program runs -------------------------------------------------------------------- */

/* The link that a program is attached to: the pod's slot, and n of the guest whose port it is, or
 * 0.
 */
struct port {
	u8 slot, n;
};

/* The class of the tc filter says it: cls_bpf copies its 16 bits to tc_classid. */
static __always_inline struct port port_of(struct __sk_buff *skb)
{
	u32 classid = skb->tc_classid;
	struct port port = {.slot = classid >> 8, .n = classid};

	return port;
}

/* --- guests ---------------------------------------------------------------------------------- */

/* slot << 8 | n: ifindex of the guest's port; 0: the guest is down */
BPF_ARRAY(guests, u32, SLOTS * 256);

static __always_inline u32 guest_ifindex(u8 slot, u8 n)
{
	u32 key = slot << 8 | n, *ifindex = guests.lookup(&key);

	return ifindex ? *ifindex : 0;
}

/* A guest that sends is up. User space clears its row when it ends. Multicast of the namespace
 * itself comes back at the link that it left by.
 */
static __always_inline void mark_guest_up(struct __sk_buff *skb, struct port port)
{
	u32 key = port.slot << 8 | port.n, *ifindex = guests.lookup(&key);

	if (ifindex && !*ifindex && skb->pkt_type != PACKET_LOOPBACK)
		*ifindex = skb->ifindex;
}

/* --- owners of ports ------------------------------------------------------------------------- */

/* slot << 24 | protocol << 16 | port: n of the guest that owns the port, | IPV4_ONLY. No entry:
 * native.
 */
BPF_HASH(owners, u32, u32, 16384);

#define IPV4_ONLY 0x100 /* the guest has no IPv6 */

/* The value in `owners`, or -1 for a native. Most ports need no look-up there. */
static __always_inline int lookup_owner(u8 slot, u8 protocol, u16 port)
{
	u32 key = slot << 24 | protocol << 16 | port, *n;
	struct pod_state *state = state_of(slot);
	u64 low = port, row;

	barrier_var(low);
	if (!state)
		return -1;
	row = state->owned[protocol == IPPROTO_UDP][low & (OWNED_PORTS - 1)];
	if (!row)
		return -1;
	if (row >> 16 != port) {
		n = owners.lookup(&key);
		if (!n)
			return -1;
		row = *n;
	}
	return row & (IPV4_ONLY | 0xff);
}

/* The guest that owns a port, or -1 for a native. */
static __always_inline int owner_of(u8 slot, u8 protocol, u16 port)
{
	int n = lookup_owner(slot, protocol, port);

	return n < 0 ? n : (u8)n;
}

/* The guest that owns a port, or -1 for a native, and also if the guest is down. Then no socket on
 * `lo` listens on the port, and the kernel refuses at once.
 */
static __always_inline int owner_if_up(u8 slot, u8 protocol, u16 port)
{
	int n = owner_of(slot, protocol, port);

	return n < 0 || guest_ifindex(slot, n) ? n : -1;
}

/* --- counters -------------------------------------------------------------------------------- */

#ifdef TRACED
/* The reason that the current packet was counted under last, plus one; 0: none */
BPF_PERCPU_ARRAY(last_reason, u32, 1);

static __always_inline void set_last_reason(u32 reason)
{
	u32 zero = 0, *last = last_reason.lookup(&zero);

	if (last)
		*last = reason;
}
#endif

_Static_assert(REASONS <= MAX_REASONS, "struct pod_state has no room for all reasons");

static __always_inline void count_reason_times(struct __sk_buff *skb, u8 slot, u64 reason,
					       u64 times)
{
	struct pod_state *state = state_of(slot);

#ifdef TRACED
	set_last_reason(reason + 1);
#endif
	barrier_var(reason);
	if (state)
		add_count(&state->counters[reason & (MAX_REASONS - 1)], times,
			  times * (skb->len - ETH_HLEN));
}

static __always_inline void count_reason(struct __sk_buff *skb, u8 slot, u32 reason)
{
	count_reason_times(skb, slot, reason, 1);
}

static __always_inline int drop(struct __sk_buff *skb, u8 slot, u32 reason)
{
	count_reason(skb, slot, reason);
	return TC_ACT_SHOT;
}

_Static_assert(REASON_UNHANDLED - REASON_TRUNCATED == FAULT_UNHANDLED - FAULT_TRUNCATED &&
		       REASON_FRAGMENT_ORPHAN - REASON_TRUNCATED == FAULT_ORPHAN - FAULT_TRUNCATED,
	       "drop_fault() needs the reasons for faults in the order of the faults");

static __always_inline int drop_fault(struct __sk_buff *skb, u8 slot, u8 fault)
{
	return drop(skb, slot, REASON_TRUNCATED + fault - FAULT_TRUNCATED);
}

/* Traffic between guests of which one is not below FIRST_GUESTS. An entry is made when they first
 * talk.
 */
struct guests_key {
	u8 slot, client, server, padding;
};

BPF_F_TABLE("hash", struct guests_key, struct count, guest_counts, 65536, BPF_F_NO_PREALLOC);

/* Counts a packet between two guests. */
static __always_inline void count_guests(struct __sk_buff *skb, u8 slot, u8 client, u8 server)
{
	struct guests_key key = {.slot = slot, .client = client, .server = server};
	struct count none = {}, *count = 0;
	u64 row = client * FIRST_GUESTS + server;
	struct pod_state *state;

	if (client < FIRST_GUESTS && server < FIRST_GUESTS) {
		state = state_of(slot);
		barrier_var(row);
		if (state)
			count = state->between_guests[0] +
				(row & (FIRST_GUESTS * FIRST_GUESTS - 1));
	} else {
		count = guest_counts.lookup(&key);
		if (!count && guest_ifindex(slot, client) && guest_ifindex(slot, server)) {
			guest_counts.insert(&key, &none);
			count = guest_counts.lookup(&key);
		}
	}
	if (count)
		add_count(count, 1, skb->len - ETH_HLEN);
}

/* Counts a packet between guest n and a native. */
static __always_inline void count_native(struct __sk_buff *skb, u8 slot, u64 n,
					 enum direction direction, enum role role)
{
	struct pod_state *state = state_of(slot);

	barrier_var(n);
	if (state)
		add_count(&state->with_natives[direction][n & (GUESTS - 1)][role], 1,
			  skb->len - ETH_HLEN);
}

/* --- flows that need state ------------------------------------------------------------------- */

#define NUMBER_BITS	 20
#define NUMBER_MASK	 ((1ULL << NUMBER_BITS) - 1)

/* Kinds of rows in `nonstandard_flows`: the highest bit of a key. */
#define KEY_OF_FLOW	 (1ULL << 42)
#define KEY_OF_ADDRESSES (1ULL << 43)

/* Key of a flow between a native and guest n that is not from 127.0.0.1 to 127.0.0.1 (::1). The
 * guest sees NATIVE_SOURCE_ODD, so the way back needs the native's addresses. Two flows with the
 * same ports but different addresses would be taken for one.
 */
static __always_inline u64 nonstandard_key(u8 n, u8 protocol, u8 v6, u16 native_port,
					   u16 guest_port)
{
	return KEY_OF_FLOW | (u64)(protocol == IPPROTO_TCP) << 41 | (u64) !!v6 << 40 |
	       (u64)n << 32 | (u32)native_port << 16 | guest_port;
}

/* Zero if the addresses are the same. */
static __always_inline u64 differences(const __be32 *one, const __be32 *other)
{
	const u64 *a = (void *)one, *b = (void *)other;

	return (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]);
}

/* The number of these addresses. If they have none, or one that is among the older half, they get
 * the next, and take the place of the oldest.
 */
static __always_inline u64 number_of_addresses(struct pod_state *state, const __be32 *addresses)
{
	u64 hash = hash_addresses(addresses, state->secret, 0);
	u64 key = KEY_OF_ADDRESSES | hash >> 22;
	u64 number = find_row(&state->nonstandard_flows, key, NUMBER_BITS) & NUMBER_MASK;
	struct native_addresses *entry =
		&state->native_addresses[number & (MAX_NATIVE_ADDRESSES - 1)];

	if (number && entry->number == number && !differences(entry->words, addresses) &&
	    ((state->last_number - number) & NUMBER_MASK) < MAX_NATIVE_ADDRESSES / 2)
		return number;
	number = state->last_number = (state->last_number + 1) & NUMBER_MASK;
	entry = &state->native_addresses[number & (MAX_NATIVE_ADDRESSES - 1)];
	entry->number = 0;
	barrier_memory();
	__builtin_memcpy(entry->words, addresses, sizeof(entry->words));
	barrier_memory();
	entry->number = number;
	put_row(&state->nonstandard_flows, key, NUMBER_BITS, number);
	return number;
}

/* Stores the addresses of a native's packet to guest n. An ICMP error has others than its flow. */
static __always_inline void store_nonstandard_flow(struct packet *p, u8 slot, u8 n)
{
	struct pod_state *state = state_of(slot);
	u64 key = nonstandard_key(n, p->protocol, p->v6, p->source_port, p->destination_port);

	if (state && !p->is_icmp_error)
		put_row(&state->nonstandard_flows, key, NUMBER_BITS,
			number_of_addresses(state, p->addresses));
}

/* Finds the addresses of the native's packets in a flow. Returns nonzero if there are none. */
static __always_inline int find_nonstandard_flow(const struct packet *p, u8 slot, u8 n, __be32 *to)
{
	struct pod_state *state = state_of(slot);
	u64 key = nonstandard_key(n, p->protocol, p->v6, p->destination_port, p->source_port);
	struct native_addresses *entry;
	u64 number;

	if (!state)
		return -1;
	number = find_row(&state->nonstandard_flows, key, NUMBER_BITS) & NUMBER_MASK;
	entry = &state->native_addresses[number & (MAX_NATIVE_ADDRESSES - 1)];
	__builtin_memcpy(to, entry->words, sizeof(entry->words));
	barrier_memory();
	return !number || entry->number != number;
}

/* A row of a TCP connection between guests whose other end may wait for an answer. User space reads
 * the rows when a guest ends, to tell the other end.
 */
#define CLIENT_FIN 1
#define SERVER_FIN 2
#define FIN_BITS   2

/* Adds a connection at the client's SYN; removes it at a RST, or when both ends sent a FIN. */
static __always_inline void track_connection(struct __sk_buff *skb, const struct packet *p, u8 slot,
					     u8 client, u8 server, bool from_server)
{
	u32 ports = (u32)p->source_port << 16 | p->destination_port;
	struct pod_state *state;
	u64 key, row, ended = 0;

	if (!p->syn && !p->fin && !p->rst)
		return;
	state = state_of(slot);
	if (!state)
		return;
	ports = hide(skb, from_server ? ports << 16 | ports >> 16 : ports);
	key = 1ULL << 49 | (u64)hide(skb, !!p->v6) << 48 | (u64)client << 40 | (u64)server << 32 |
	      ports;
	row = find_row(&state->guest_connections, key, FIN_BITS);
	if (p->fin)
		ended = (row | (from_server ? SERVER_FIN : CLIENT_FIN)) & (CLIENT_FIN | SERVER_FIN);
	ended = hide(skb, ended | (p->rst ? CLIENT_FIN | SERVER_FIN : 0));
	if (ended == (CLIENT_FIN | SERVER_FIN))
		remove_row(&state->guest_connections, key, FIN_BITS);
	else if (p->fin ? row : !from_server)
		put_row(&state->guest_connections, key, FIN_BITS, ended);
}

#endif
