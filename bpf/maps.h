/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The maps that the tc datapaths share, and their accessors: whose a port is, where a guest is,
 * counters. docs/architecture.md has a table of all maps.
 *
 * A set of programs is loaded once for all pods. Each pod has a slot, a number from 1 that is a
 * part of the keys. Slot 0 is for BPF_PROG_TEST_RUN.
 *
 * The file that includes this defines `enum reason` first, with REASONS as its last member.
 */

#ifndef TESTBED_MAPS_H
#define TESTBED_MAPS_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/pkt_cls.h>

#include "common.h"
#include "packet.h"

#define SLOTS 256

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

/* A guest that sends is up. User space clears its row when it ends. */
static __always_inline void mark_guest_up(struct __sk_buff *skb, struct port port)
{
	u32 key = port.slot << 8 | port.n, *ifindex = guests.lookup(&key);

	if (ifindex && !*ifindex)
		*ifindex = skb->ifindex;
}

/* --- owners of ports ------------------------------------------------------------------------- */

/* slot << 24 | protocol << 16 | port: n of the guest that owns the port, | IPV4_ONLY. No entry:
 * native.
 */
BPF_HASH(owners, u32, u32, 16384);

#define IPV4_ONLY 0x100 /* the guest has no IPv6 */

/* The value in `owners`, or -1 for a native. */
static __always_inline int lookup_owner(u8 slot, u8 protocol, u16 port)
{
	u32 key = slot << 24 | protocol << 16 | port;
	u32 *n = owners.lookup(&key);

	return n ? (int)*n : -1;
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

struct count {
	u64 packets, bytes; /* bytes of layer 3 */
};

static __always_inline void add_count(struct __sk_buff *skb, struct count *count, u64 times)
{
	if (count) {
		count->packets += times;
		count->bytes += times * (skb->len - ETH_HLEN);
	}
}

/* slot * REASONS + reason */
BPF_PERCPU_ARRAY(counters, struct count, SLOTS *REASONS);

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

static __always_inline void count_reason_times(struct __sk_buff *skb, u8 slot, u32 reason,
					       u64 times)
{
	u32 key = slot * REASONS + reason;

#ifdef TRACED
	set_last_reason(reason + 1);
#endif
	add_count(skb, counters.lookup(&key), times);
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

/* Packets between two workloads are counted by client and server; 0 is the natives. For guests
 * below NATIVE_FLOW_GUESTS, those between the guest and natives are in an array: a lookup in the
 * hash table takes half as long as all the rest that most packets of `steer` meet.
 */
#define NATIVE_FLOW_GUESTS 64

struct native_flow_counts {
	struct count of[NATIVE_FLOW_GUESTS * 2]; /* n << 1, | 1 if guest n is the server */
};

struct flow_key {
	u8 slot, client, server, padding;
};

BPF_PERCPU_ARRAY(native_flow_counts, struct native_flow_counts, SLOTS);
BPF_TABLE("percpu_hash", struct flow_key, struct count, flow_counts, 16384);

/* User space makes the entries of `flow_counts` when it makes the pod. */
static __always_inline void count_flow(struct __sk_buff *skb, u8 slot, u8 client, u8 server)
{
	struct flow_key flow = {.slot = slot, .client = client, .server = server};
	u32 key = slot, n = client | server;
	u64 i = n << 1 | !client;
	struct native_flow_counts *counts;

	if ((client && server) || n >= NATIVE_FLOW_GUESTS) {
		add_count(skb, flow_counts.lookup(&flow), 1);
		return;
	}
	counts = native_flow_counts.lookup(&key);
	barrier_var(i);
	if (counts)
		add_count(skb, &counts->of[i & (NATIVE_FLOW_GUESTS * 2 - 1)], 1);
}

/* --- flows that need state ------------------------------------------------------------------- */

/* A flow between a native and a guest that is not from 127.0.0.1 to 127.0.0.1 (::1). The guest sees
 * NATIVE_SOURCE_ODD, so the way back needs the native's addresses.
 */
struct nonstandard_flow {
	u8 slot, n, protocol, v6;
	u16 native_port, guest_port;
};

struct flow_addresses {
	__be32 words[8]; /* as in struct packet, from the native to the guest */
};

/* Two flows with the same ports but different addresses would be taken for one. */
BPF_TABLE("lru_hash", struct nonstandard_flow, struct flow_addresses, nonstandard_flows, 16384);

/* Stores the addresses of a native's packet to guest n. An ICMP error has others than its flow. */
static __always_inline void store_nonstandard_flow(struct packet *p, u8 slot, u8 n)
{
	struct nonstandard_flow flow = {
		slot, n, p->protocol, p->v6, p->source_port, p->destination_port};

	if (!p->is_icmp_error)
		nonstandard_flows.update(&flow, (struct flow_addresses *)p->addresses);
}

/* A TCP connection between guests whose other end may wait for an answer. User space reads them
 * when a guest ends, to tell the other end.
 */
struct guest_connection {
	u8 slot, client, server, v6;
	u16 client_port, server_port;
};

BPF_TABLE("lru_hash", struct guest_connection, u8, guest_connections, 16384);

/* Adds a connection at the client's SYN; removes it at a RST, or at the server's FIN. */
static __always_inline void track_connection(const struct packet *p, u8 slot, u8 client, u8 server,
					     bool from_server)
{
	struct guest_connection connection = {
		.slot = slot, .client = client, .server = server, .v6 = p->v6};
	u8 exists = 1;

	connection.client_port = from_server ? p->destination_port : p->source_port;
	connection.server_port = from_server ? p->source_port : p->destination_port;
	if (p->rst || (p->fin && from_server))
		guest_connections.delete(&connection);
	else if (p->syn && !from_server)
		guest_connections.update(&connection, &exists);
}

#endif
