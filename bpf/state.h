/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The state of a pod: what the programs count in it, and what they remember of its traffic.
 *
 * Each pod has its own, so nothing that one pod sends can push out what another needs. It is one
 * value, which user space maps into its memory (testbed/datapaths/ebpf/state.py has the same
 * layout). Its size does not depend on the number of CPUs.
 *
 * What is remembered is in tables of 64-bit rows. A row is read and written as a whole, without a
 * lock. When two programs change the same set of rows at the same moment, a row may be lost, as if
 * it had been pushed out, or be there twice, of which the first counts.
 */

#ifndef TESTBED_STATE_H
#define TESTBED_STATE_H

#include <uapi/linux/bpf.h>

#include "common.h"

#define SLOTS	    256
#define MAX_REASONS 16
#define GUESTS	    256 /* values of n */

struct count {
	u64 packets, bytes; /* bytes of layer 3 */
};

/* Traffic of a guest with natives is counted by direction and by who dialed. As different CPUs
 * handle the two directions, each has cache lines of its own.
 */
enum direction { GUEST_SENDS, GUEST_RECEIVES, DIRECTIONS };
enum role { GUEST_SERVES, GUEST_DIALS, ROLES };

/* A set of rows has the newest first. A new row pushes out the oldest of its set. */
#define TABLE_SET_BITS 7
#define TABLE_SETS     (1 << TABLE_SET_BITS)
#define TABLE_WAYS     8 /* rows of a set: one cache line */

struct table {
	u64 rows[TABLE_SETS][TABLE_WAYS];
};

/* Source and destination of a native's packet to a guest, if not 127.0.0.1 and 127.0.0.1 (::1). */
struct native_addresses {
	u64 number;	 /* 0: not in use */
	__be32 words[8]; /* as in struct packet */
};

#define MAX_NATIVE_ADDRESSES 128 /* number modulo this is the index */

#define FIRST_GUESTS	     16

/* The owner of a port, at the index made of the port's low bits: port << 16 | as in `owners`.
 * Of several ports with the same low bits one is here, others are in `owners` alone. 0: no guest owns
 * any port with these bits.
 */
#define OWNED_PORTS	     512

struct pod_state {
	u32 owned[2][OWNED_PORTS]; /* of TCP, of UDP */
	struct count counters[MAX_REASONS];
	struct count with_natives[DIRECTIONS][GUESTS][ROLES];
	struct count between_guests[FIRST_GUESTS][FIRST_GUESTS]; /* client, server */
	struct table fragments, nonstandard_flows, guest_connections;
	struct native_addresses native_addresses[MAX_NATIVE_ADDRESSES];
	u64 last_number; /* of native_addresses */
	u64 secret;	 /* random and odd: nobody can find what has the same hash */
};

/* User space makes one like `pod_state` for each pod. */
BPF_F_TABLE("array", u32, struct pod_state, pod_state, 1, BPF_F_MMAPABLE);
BPF_ARRAY_OF_MAPS(pod_states, "pod_state", SLOTS); /* slot */

static __always_inline struct pod_state *state_of(u8 slot)
{
	u32 key = slot, zero = 0;
	void *state = pod_states.lookup(&key);

	return state ? bpf_map_lookup_elem(state, &zero) : 0;
}

static __always_inline void add_count(struct count *count, u64 packets, u64 bytes)
{
	__sync_fetch_and_add(&count->packets, packets);
	__sync_fetch_and_add(&count->bytes, bytes);
}

/* --- tables ---------------------------------------------------------------------------------- */

#define GOLDEN_RATIO_64 0x9E3779B97F4A7C15 /* of multiplicative hashing */

static __always_inline u64 *set_of(struct table *table, u64 key)
{
	u64 set = key * GOLDEN_RATIO_64 >> (64 - TABLE_SET_BITS);

	barrier_var(set);
	return table->rows[set & (TABLE_SETS - 1)];
}

/* All bits are set if the value is 0, none otherwise. It has no branch, as the verifier would follow
 * both its ways; and the barrier keeps the compiler from making one.
 */
static __always_inline u64 mask_if_zero(u64 value)
{
	u64 negative = -value;

	barrier_var(negative);
	return ((value | negative) >> 63) - 1;
}

/* Finds the first row whose bits from `bits` up are the key. Returns it, or 0 if there is none. */
static __always_inline u64 find_row(struct table *table, u64 key, u32 bits)
{
	u64 *rows = set_of(table, key), found = 0;

#pragma unroll
	for (u32 i = TABLE_WAYS; i-- > 0;) {
		u64 row = rows[i];

		found ^= (found ^ row) & mask_if_zero(row >> bits ^ key);
	}
	return found;
}

/* Puts the row key << bits | value first. It replaces the row with the same key, or else the
 * oldest. The key is not 0.
 */
static __always_inline void put_row(struct table *table, u64 key, u32 bits, u64 value)
{
	u64 *rows = set_of(table, key), row = key << bits | value;

#pragma unroll
	for (u32 i = 0; i < TABLE_WAYS; i++) {
		u64 older = rows[i];

		rows[i] = row;
		if (!older || older >> bits == key)
			return;
		row = older;
	}
}

static __always_inline void remove_row(struct table *table, u64 key, u32 bits)
{
	u64 *rows = set_of(table, key);

#pragma unroll
	for (u32 i = 0; i < TABLE_WAYS; i++)
		if (rows[i] >> bits == key)
			rows[i] = 0;
}

/* A hash of addresses (words as in struct packet) that differs from pod to pod. */
static __always_inline u64 hash_addresses(const __be32 *addresses, u64 secret, u64 more)
{
	u64 hash = more * secret;

#pragma unroll
	for (u32 i = 0; i < 8; i++) {
		hash = (hash ^ addresses[i]) * secret;
		hash ^= hash >> 32;
	}
	return hash * secret;
}

#endif
