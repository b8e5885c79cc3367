/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * Sockets of the pod's cgroup, steered past `lo`: what dials a guest's port at `localhost` is given
 * the guest's own address before a packet is made, and is told afterwards what it dialed.
 *
 * A socket that has an entry in `sockets` was made in the cgroup, so its names are shown right: only
 * to such may a guest's packets be handed without passing `lo`. To make one takes longer than all else
 * that a connection meets here, so what most connections dial, 127.0.0.1 or ::1 by TCP, needs none: it
 * shows in the connection's addresses (`dialed_localhost`).
 *
 * What shows: connections of MPTCP have the guest's own address; a datagram that a guest sends to the
 * pod's address on the link, not to the alias, is answered from the alias; a connection that a guest
 * makes to that address, from a port that it owns, looks like one to `localhost`.
 */

enum dialed {
	NOTHING,
	LOCALHOST, /* a guest's port, at a loopback address */
	DIRECT,	   /* a guest by its own address: it is shown as it is */
};

struct socket {
	__be32 address[4]; /* that was dialed last, as an IPv6 or v4-mapped address */
	u32 dialed;
	u32 by_lo; /* its program asks to where, by which link, datagrams came */
};

BPF_SK_STORAGE(sockets, struct socket);
BPF_HASH(namespaces, u64, u32, SLOTS); /* a network namespace's cookie: slot of the pod */

static __always_inline void tally_call(u8 slot, u32 reason)
{
	u32 key = slot * REASONS + reason;
	struct count *count = counters.lookup(&key);

	if (count)
		count->packets++;
}

/* Pods may share a cgroup: whose socket is it? 0: no pod's. */
static __always_inline u8 slot_of(struct bpf_sock_addr *ctx)
{
	u64 cookie = bpf_get_netns_cookie(ctx);
	u32 *slot = namespaces.lookup(&cookie);

	return slot ? *slot : 0;
}

static __always_inline bool is_mapped(const __be32 *a)
{
	return !a[0] && !a[1] && a[2] == bpf_htonl(0xffff);
}

static __always_inline struct address classify(const __be32 *a)
{
	return is_mapped(a) ? classify4(a[3]) : classify6(a);
}

static __always_inline void render(struct address is, bool mapped, __be32 *a)
{
	if (mapped) {
		a[0] = 0;
		a[1] = 0;
		a[2] = bpf_htonl(0xffff);
		a[3] = render4(is);
	} else {
		render6(is, a);
	}
}

static __always_inline void remember(struct bpf_sock *sk, u32 dialed, const __be32 *address,
				     u64 flags)
{
	struct socket new = {}, *socket = sockets.sk_storage_get(sk, &new, flags);

	if (!socket)
		return;
	socket->dialed = dialed;
	__builtin_memcpy(socket->address, address, sizeof(socket->address));
}

static __always_inline bool stays_on_lo(struct bpf_sock *sk)
{
	struct socket *socket = sockets.sk_storage_get(sk, 0, 0);

	return sk->bound_dev_if || (socket && socket->by_lo);
}

static __always_inline void forget_dialed(struct bpf_sock *sk)
{
	struct socket *socket = sockets.sk_storage_get(sk, 0, 0);

	if (socket)
		socket->dialed = NOTHING;
}

/* Calls to a loopback address mean this host; so does the unspecified one. */
static __always_inline bool is_localhost(struct address a)
{
	return a.kind == LOOPBACK || a.kind == LOOPBACK_NET || a.kind == UNSPECIFIED;
}

/* A socket is about to dial, or to send to, an address: of the guest that owns the port, if that is
 * its `localhost`. Returns true if `a` is now another one. What is bound to an address or device can
 * only go by `lo`; so has what is for a guest that is down, to be refused. A guest without IPv6 is
 * reached from ::1 by a v4-mapped address, where the call may give one: connect may, unless the
 * socket is IPv6-only (ENETUNREACH); sendmsg may not.
 */
static __always_inline bool dial(struct bpf_sock_addr *ctx, struct bpf_sock *sk, bool bound,
				 bool connects, __be32 *a)
{
	u16 port = bpf_ntohs(ctx->user_port);
	struct address to = classify(a);
	u8 slot = slot_of(ctx);
	bool plain;
	int n = -1;

	if (!slot || (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP))
		return false;
	if (is_localhost(to))
		n = ownership(slot, ctx->protocol, port);
	if (n >= 0 && (bound || stays_on_lo(sk) || !port_of(slot, n) ||
		       (n & IPV4_ONLY && !is_mapped(a) && !connects))) {
		tally_call(slot, REASON_FALLBACK);
		n = -1;
	}
	/* A connected IPv6 socket sends to its v4-mapped peer as if it were unconnected. */
	if (to.kind == LINK && (connects || sk->state != BPF_TCP_ESTABLISHED))
		remember(sk, DIRECT, a, BPF_SK_STORAGE_GET_F_CREATE);
	if (n < 0)
		return false;
	if (to.kind == UNSPECIFIED)
		render(as(LOOPBACK, 0), is_mapped(a), a);
	plain = ctx->protocol == IPPROTO_TCP && classify(a).kind == LOOPBACK &&
		(is_mapped(a) || !(n & IPV4_ONLY));
	remember(sk, LOCALHOST, a, plain ? 0 : BPF_SK_STORAGE_GET_F_CREATE);
	render(as(LINK, n), is_mapped(a) || n & IPV4_ONLY, a);
	tally_call(slot, REASON_STEERED);
	return true;
}

#define MAPPED(word) {0, 0, bpf_htonl(0xffff), word}
#define WORDS(a)     {(a)[0], (a)[1], (a)[2], (a)[3]}

static __always_inline void show6(struct bpf_sock_addr *ctx, const __be32 *a)
{
	ctx->user_ip6[0] = a[0];
	ctx->user_ip6[1] = a[1];
	ctx->user_ip6[2] = a[2];
	ctx->user_ip6[3] = a[3];
}

/* --- made in the cgroup ---------------------------------------------------------------------- */

static __always_inline int mark(struct bpf_sock_addr *ctx)
{
	struct socket new = {};

	if (ctx->sk && slot_of(ctx))
		sockets.sk_storage_get(ctx->sk, &new, BPF_SK_STORAGE_GET_F_CREATE);
	return 1;
}

int bind4(struct bpf_sock_addr *ctx)
{
	return mark(ctx);
}

int bind6(struct bpf_sock_addr *ctx)
{
	return mark(ctx);
}

/* Programs that are told the destination and link of a datagram (DNS servers) act upon it: those
 * must be what they are on `lo`.
 */
int setsockopt(struct bpf_sockopt *ctx)
{
	struct socket new = {}, *socket;

	/* Let the kernel take what the program gave, not a copy of what it shows: that is a page at most. */
	ctx->optlen = 0;
	if (!ctx->sk)
		return 1;
	switch (ctx->level << 16 | ctx->optname) {
	case IPPROTO_IP << 16 | 8:    /* IP_PKTINFO */
	case IPPROTO_IP << 16 | 20:   /* IP_RECVORIGDSTADDR */
	case IPPROTO_IPV6 << 16 | 2:  /* IPV6_2292PKTINFO */
	case IPPROTO_IPV6 << 16 | 49: /* IPV6_RECVPKTINFO */
	case IPPROTO_IPV6 << 16 | 74: /* IPV6_RECVORIGDSTADDR */
		socket = sockets.sk_storage_get(ctx->sk, &new, BPF_SK_STORAGE_GET_F_CREATE);
		if (socket)
			socket->by_lo = true;
	}
	return 1;
}

/* --- native to guest ------------------------------------------------------------------------- */

int connect4(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = MAPPED(ctx->user_ip4);
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return 1;
	forget_dialed(sk);
	if (dial(ctx, sk, sk->src_ip4, true, a))
		ctx->user_ip4 = a[3];
	return 1;
}

int connect6(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = WORDS(ctx->user_ip6);
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return 1;
	forget_dialed(sk);
	if (dial(ctx, sk, sk->src_ip6[0] | sk->src_ip6[1] | sk->src_ip6[2] | sk->src_ip6[3], true,
		 a))
		show6(ctx, a);
	return 1;
}

/* A datagram without a connection. An answer to a guest's leaves from the alias. */

int sendmsg4(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = MAPPED(ctx->user_ip4);
	struct bpf_sock *sk = ctx->sk;
	struct address to = classify4(a[3]);

	if (!sk)
		return 1;
	if (to.kind == NATIVE_VIEW) {
		if (!stays_on_lo(sk) && port_of(slot_of(ctx), to.n)) {
			ctx->user_ip4 = render4(as(LINK, to.n));
			ctx->msg_src_ip4 = render4(as(ALIAS, 0));
		}
	} else if (dial(ctx, sk, ctx->msg_src_ip4, false, a)) {
		ctx->user_ip4 = a[3];
	}
	return 1;
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = WORDS(ctx->user_ip6), source[4] = WORDS(ctx->msg_src_ip6);
	struct bpf_sock *sk = ctx->sk;
	struct address to = classify6(a);

	if (!sk)
		return 1;
	if (to.kind == NATIVE_VIEW) {
		if (!stays_on_lo(sk) && port_of(slot_of(ctx), to.n)) {
			render6(as(LINK, to.n), a);
			render6(as(ALIAS, 0), source);
			show6(ctx, a);
			ctx->msg_src_ip6[0] = source[0];
			ctx->msg_src_ip6[1] = source[1];
			ctx->msg_src_ip6[2] = source[2];
			ctx->msg_src_ip6[3] = source[3];
		}
	} else if (dial(ctx, sk, source[0] | source[1] | source[2] | source[3], false, a)) {
		show6(ctx, a);
	}
	return 1;
}

/* --- names ----------------------------------------------------------------------------------- */

/* Who sent a datagram: the address that was dialed, of a guest that serves; else the guest's view,
 * to which the answer is sent. Returns true if `a` is now another address.
 */
static __always_inline bool show_sender(struct bpf_sock_addr *ctx, __be32 *a)
{
	struct address from = classify(a);
	struct socket *socket;
	u8 slot;

	if (from.kind != LINK || !ctx->sk)
		return false;
	socket = sockets.sk_storage_get(ctx->sk, 0, 0);
	if (!socket || socket->dialed == DIRECT)
		return false;
	slot = slot_of(ctx);
	if (socket->dialed == LOCALHOST &&
	    owner(slot, IPPROTO_UDP, bpf_ntohs(ctx->user_port)) == from.n)
		__builtin_memcpy(a, socket->address, sizeof(socket->address));
	else
		render(as(NATIVE_VIEW, from.n), is_mapped(a), a);
	return true;
}

int recvmsg4(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = MAPPED(ctx->user_ip4);

	if (show_sender(ctx, a))
		ctx->user_ip4 = a[3];
	return 1;
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = WORDS(ctx->user_ip6);

	if (show_sender(ctx, a))
		show6(ctx, a);
	return 1;
}

/* Whether a socket with this peer dialed `localhost`, and then by which address. A connection without
 * an entry, to a port that its peer owns, did by 127.0.0.1 or ::1: all others have an entry.
 */
static __always_inline bool dialed_localhost(struct bpf_sock_addr *ctx, struct address peer,
					     u16 port, bool mapped, __be32 *dialed)
{
	struct socket *socket = sockets.sk_storage_get(ctx->sk, 0, 0);

	if (socket) {
		__builtin_memcpy(dialed, socket->address, sizeof(socket->address));
		return socket->dialed == LOCALHOST;
	}
	render(as(LOOPBACK, 0), mapped, dialed);
	return ctx->protocol == IPPROTO_TCP && peer.kind == LINK &&
	       owner(slot_of(ctx), IPPROTO_TCP, port) == peer.n;
}

/* The other end of a connection: of one that was dialed, what was dialed; of an accepted one, the
 * loopback address, as of any client at `localhost`. UDP keeps the guest's view, for a server answers
 * to the address that it was given.
 */
static __always_inline bool show_peer(struct bpf_sock_addr *ctx, struct address local, __be32 *a)
{
	struct address peer = classify(a);
	__be32 dialed[4];

	if (peer.kind == NATIVE_VIEW || (peer.kind == LINK && local.kind == ALIAS)) {
		if (ctx->protocol != IPPROTO_TCP)
			return false;
		render(as(LOOPBACK, 0), is_mapped(a), a);
		return true;
	}
	if (peer.kind != LINK || !ctx->sk ||
	    !dialed_localhost(ctx, peer, bpf_ntohs(ctx->user_port), is_mapped(a), dialed))
		return false;
	__builtin_memcpy(a, dialed, sizeof(dialed));
	return true;
}

int getpeername4(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = MAPPED(ctx->user_ip4);
	struct bpf_sock *sk = ctx->sk;

	if (sk && show_peer(ctx, classify4(sk->src_ip4), a))
		ctx->user_ip4 = a[3];
	return 1;
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = WORDS(ctx->user_ip6);
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return 1;

	__be32 local[4] = WORDS(sk->src_ip6);

	if (show_peer(ctx, classify(local), a))
		show6(ctx, a);
	return 1;
}

/* This end: the loopback address, of whatever was dialed at `localhost`, by us or by a guest. */
static __always_inline bool show_local(struct bpf_sock_addr *ctx, struct address peer, __be32 *a)
{
	struct address local = classify(a);
	__be32 dialed[4];

	if (local.kind == ALIAS && ctx->protocol == IPPROTO_TCP) {
		render(as(LOOPBACK, 0), is_mapped(a), a);
		return true;
	}
	if (local.kind != POD_LINK || !ctx->sk ||
	    !dialed_localhost(ctx, peer, bpf_ntohs(ctx->sk->dst_port), is_mapped(a), dialed))
		return false;
	render(as(LOOPBACK, 0), is_mapped(dialed), a);
	return true;
}

int getsockname4(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = MAPPED(ctx->user_ip4);
	struct bpf_sock *sk = ctx->sk;

	if (sk && show_local(ctx, classify4(sk->dst_ip4), a))
		ctx->user_ip4 = a[3];
	return 1;
}

int getsockname6(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = WORDS(ctx->user_ip6);
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return 1;

	__be32 peer[4] = WORDS(sk->dst_ip6);

	if (show_local(ctx, classify(peer), a))
		show6(ctx, a);
	return 1;
}
