/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * Sockets of the pod's cgroup that bypass `lo`: translates the address that a program dials to the
 * guest's own before the kernel makes a packet, and the addresses that the program is told back
 * again.
 *
 * A socket with an entry in `sockets` was made in the cgroup, so the programs are told its
 * addresses right. Only such sockets may receive a guest's packets past `lo`. To make an entry
 * takes longer than everything else that happens here to a connection. So there is none for what
 * most connections dial, 127.0.0.1 or ::1 by TCP: the addresses of the connection tell it
 * (dialed_localhost()).
 *
 * Limits: connections of MPTCP show the guest's own address. If a guest sends a datagram to the
 * pod's address on the link instead of the alias, the answer comes from the alias. If it connects
 * to that address from a port that it owns, the connection looks like one to `localhost`.
 */

#ifndef TESTBED_SOCKETS_H
#define TESTBED_SOCKETS_H

#include <uapi/linux/bpf.h>
#include <uapi/linux/in.h>

#include "addresses.h"
#include "common.h"
#include "maps.h"

/* What a socket dialed last. */
enum dialed {
	DIALED_NOTHING,
	DIALED_LOCALHOST, /* a guest's port at a loopback address */
	DIALED_LINK,	  /* a guest's own address, which the program is told as it is */
};

struct socket_state {
	__be32 address[4]; /* that was dialed last: IPv6 or v4-mapped */
	u32 dialed;	   /* enum dialed */
	u32 reads_pktinfo; /* the program reads to which address and by which link datagrams came */
};

BPF_SK_STORAGE(sockets, struct socket_state);
BPF_HASH(namespaces, u64, u32, SLOTS); /* cookie of a network namespace: slot of the pod */

/* Counts a system call, which has no packet. */
static __always_inline void count_call(u8 slot, u32 reason)
{
	struct pod_state *state = state_of(slot);

	if (state)
		__sync_fetch_and_add(&state->counters[reason].packets, 1);
}

/* Slot of the pod whose socket this is; 0: no pod's. Pods may share a cgroup. */
static __always_inline u8 slot_of(struct bpf_sock_addr *ctx)
{
	u64 cookie = bpf_get_netns_cookie(ctx);
	u32 *slot = namespaces.lookup(&cookie);

	return slot ? *slot : 0;
}

static __always_inline struct address classify(const __be32 *a)
{
	return is_v4_mapped(a) ? classify4(a[3]) : classify6(a);
}

static __always_inline void render(struct address is, bool mapped, __be32 *a)
{
	if (mapped) {
		a[0] = 0;
		a[1] = 0;
		a[2] = bpf_htonl(V4_MAPPED6);
		a[3] = render4(is);
	} else {
		render6(is, a);
	}
}

static __always_inline void store_dialed(struct bpf_sock *sk, u32 dialed, const __be32 *address,
					 u64 flags)
{
	struct socket_state new = {}, *socket = sockets.sk_storage_get(sk, &new, flags);

	if (!socket)
		return;
	socket->dialed = dialed;
	__builtin_memcpy(socket->address, address, sizeof(socket->address));
}

/* Whether the socket's packets have to pass `lo`. */
static __always_inline bool needs_lo(struct bpf_sock *sk)
{
	struct socket_state *socket = sockets.sk_storage_get(sk, 0, 0);

	return sk->bound_dev_if || (socket && socket->reads_pktinfo);
}

static __always_inline void clear_dialed(struct bpf_sock *sk)
{
	struct socket_state *socket = sockets.sk_storage_get(sk, 0, 0);

	if (socket)
		socket->dialed = DIALED_NOTHING;
}

/* A program that dials the unspecified address gets the loopback address (connect(2)). */
static __always_inline bool is_localhost(struct address a)
{
	return a.kind == LOOPBACK || a.kind == LOOPBACK_NET || a.kind == UNSPECIFIED;
}

/* connect or sendmsg to `a`: translates `localhost` to the address of the guest that owns the port.
 * Returns true if it changed `a`.
 *
 * A socket that is bound to an address or device needs `lo`. So does one that dials a guest that is
 * down, to be refused. From ::1, a guest without IPv6 is reached by a v4-mapped address. Only
 * connect may give one, and not if the socket is IPv6-only (ENETUNREACH).
 */
static __always_inline bool translate_destination(struct bpf_sock_addr *ctx, struct bpf_sock *sk,
						  bool bound, bool connects, __be32 *a)
{
	u16 port = bpf_ntohs(ctx->user_port);
	struct address to = classify(a);
	u8 slot = slot_of(ctx);
	bool shows_in_addresses;
	int n = -1;

	if (!slot || (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP))
		return false;
	if (is_localhost(to))
		n = lookup_owner(slot, ctx->protocol, port);
	if (n >= 0 && (bound || needs_lo(sk) || !guest_ifindex(slot, n) ||
		       (n & IPV4_ONLY && !is_v4_mapped(a) && !connects))) {
		count_call(slot, REASON_FALLBACK);
		n = -1;
	}
	/* sendmsg also runs for a connected IPv6 socket with a v4-mapped peer. */
	if (to.kind == LINK && (connects || sk->state != BPF_TCP_ESTABLISHED))
		store_dialed(sk, DIALED_LINK, a, BPF_SK_STORAGE_GET_F_CREATE);
	if (n < 0)
		return false;
	if (to.kind == UNSPECIFIED)
		render(address_of(LOOPBACK, 0), is_v4_mapped(a), a);
	shows_in_addresses = ctx->protocol == IPPROTO_TCP && classify(a).kind == LOOPBACK &&
			     (is_v4_mapped(a) || !(n & IPV4_ONLY));
	store_dialed(sk, DIALED_LOCALHOST, a, shows_in_addresses ? 0 : BPF_SK_STORAGE_GET_F_CREATE);
	render(address_of(LINK, n), is_v4_mapped(a) || n & IPV4_ONLY, a);
	count_call(slot, REASON_STEERED);
	return true;
}

/* Initializers of an address in words, as IPv6 or v4-mapped. The context is read word by word. */
#define V4_MAPPED(word) {0, 0, bpf_htonl(V4_MAPPED6), word}
#define IP6_WORDS(a)	{(a)[0], (a)[1], (a)[2], (a)[3]}

static __always_inline void set_user_ip6(struct bpf_sock_addr *ctx, const __be32 *a)
{
	ctx->user_ip6[0] = a[0];
	ctx->user_ip6[1] = a[1];
	ctx->user_ip6[2] = a[2];
	ctx->user_ip6[3] = a[3];
}

/* Makes the entry of a socket of the cgroup. */
static __always_inline int init_socket(struct bpf_sock_addr *ctx)
{
	struct socket_state new = {};

	if (ctx->sk && slot_of(ctx))
		sockets.sk_storage_get(ctx->sk, &new, BPF_SK_STORAGE_GET_F_CREATE);
	return SYS_PROCEED;
}

/* recvmsg: translates the sender of a datagram to the address that was dialed, if the sender is the
 * guest that serves there; else to the guest's view, which answers are sent to. Returns true if it
 * changed `a`.
 */
static __always_inline bool translate_sender(struct bpf_sock_addr *ctx, __be32 *a)
{
	struct address from = classify(a);
	struct socket_state *socket;
	u8 slot;

	if (from.kind != LINK || !ctx->sk)
		return false;
	socket = sockets.sk_storage_get(ctx->sk, 0, 0);
	if (!socket || socket->dialed == DIALED_LINK)
		return false;
	slot = slot_of(ctx);
	if (socket->dialed == DIALED_LOCALHOST &&
	    owner_of(slot, IPPROTO_UDP, bpf_ntohs(ctx->user_port)) == from.n)
		__builtin_memcpy(a, socket->address, sizeof(socket->address));
	else
		render(address_of(NATIVE_VIEW, from.n), is_v4_mapped(a), a);
	return true;
}

/* Whether a socket with this peer dialed `localhost`, and by which address. A connection without an
 * entry to a port that its peer owns dialed 127.0.0.1 or ::1: all others have an entry.
 */
static __always_inline bool dialed_localhost(struct bpf_sock_addr *ctx, struct address peer,
					     u16 port, bool mapped, __be32 *dialed)
{
	struct socket_state *socket = sockets.sk_storage_get(ctx->sk, 0, 0);

	if (socket) {
		__builtin_memcpy(dialed, socket->address, sizeof(socket->address));
		return socket->dialed == DIALED_LOCALHOST;
	}
	render(address_of(LOOPBACK, 0), mapped, dialed);
	return ctx->protocol == IPPROTO_TCP && peer.kind == LINK &&
	       owner_of(slot_of(ctx), IPPROTO_TCP, port) == peer.n;
}

/* getpeername: translates the peer to the address that was dialed, or for an accepted connection to
 * the loopback address, as of any client at `localhost`. UDP keeps the guest's view, as a server
 * answers to the address that it was given. Returns true if it changed `a`.
 */
static __always_inline bool translate_peer(struct bpf_sock_addr *ctx, struct address local,
					   __be32 *a)
{
	struct address peer = classify(a);
	__be32 dialed[4];

	if (peer.kind == NATIVE_VIEW || (peer.kind == LINK && local.kind == ALIAS)) {
		if (ctx->protocol != IPPROTO_TCP)
			return false;
		render(address_of(LOOPBACK, 0), is_v4_mapped(a), a);
		return true;
	}
	if (peer.kind != LINK || !ctx->sk ||
	    !dialed_localhost(ctx, peer, bpf_ntohs(ctx->user_port), is_v4_mapped(a), dialed))
		return false;
	__builtin_memcpy(a, dialed, sizeof(dialed));
	return true;
}

/* getsockname: translates the own address of a connection that this socket or a guest dialed at
 * `localhost` to the loopback address. Returns true if it changed `a`.
 */
static __always_inline bool translate_local(struct bpf_sock_addr *ctx, struct address peer,
					    __be32 *a)
{
	struct address local = classify(a);
	__be32 dialed[4];

	if (local.kind == ALIAS && ctx->protocol == IPPROTO_TCP) {
		render(address_of(LOOPBACK, 0), is_v4_mapped(a), a);
		return true;
	}
	if (local.kind != POD_LINK || !ctx->sk ||
	    !dialed_localhost(ctx, peer, bpf_ntohs(ctx->sk->dst_port), is_v4_mapped(a), dialed))
		return false;
	render(address_of(LOOPBACK, 0), is_v4_mapped(dialed), a);
	return true;
}

#endif
