/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The datapath `steer`: guests' ports are in the pod's namespace, so packets need not leave it.
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
 * Translation between `lo` and the ports, as in `capture`, is always there. It serves every process
 * of the namespace, whatever its socket is bound to.
 *
 *   native to guest:   lo_egress > g1       back: port_ingress > lo
 *   guest to native:   port_ingress > lo    back: lo_egress > g1
 *   guest to guest:    port_ingress > g2    back: port_ingress > g1
 *
 * Sockets of the pod's cgroup bypass `lo`, and their packets are not changed. Where a native dials
 * a guest's port, the cgroup programs give the socket the guest's address (sockets.h). Where a
 * guest dials a native, port_ingress assigns the packets to the native's socket (local_delivery.h).
 * At the native's end these packets have the pod's address on the link, or the alias. Where
 * port_ingress finds no socket, for a fragment for instance, the packet goes by `lo`.
 */

/* Why a packet was counted: an index of `counters` in struct pod_state. Python reads names and order
 * from here; pod.h needs them.
 */
enum reason {
	REASON_TOO_BIG,	  /* dropped: a datagram from a native, larger than the guests' link */
	REASON_SPOOFED,	  /* dropped: the sender claims an address or port that is not its own */
	REASON_TRUNCATED, /* dropped: too short for its headers */
	REASON_UNHANDLED, /* dropped: no ports, an extension header, an ICMP error for nobody */
	REASON_FRAGMENT_ORPHAN, /* dropped: a fragment whose first was not seen */
	REASON_NO_GUEST,	/* passed on, to be refused: the guest is down, or has no IPv6 */
	REASON_ODD_SOURCE, /* passed on: a native flow with other addresses than 127.0.0.1, ::1 */
	REASON_ANSWERED,   /* ARP request or neighbor solicitation */
	REASON_STEERED,	   /* calls: a native dialed a guest, or sent it a datagram, past `lo` */
	REASON_ASSIGNED,   /* passed on: a guest's SYN or datagram, to a native's socket */
	REASON_FALLBACK,   /* calls and packets that could be neither, and go by `lo` */
	REASONS,
};

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/in6.h>
#include <uapi/linux/pkt_cls.h>

#include "addresses.h"
#include "common.h"
#include "local_delivery.h"
#include "maps.h"
#include "packet.h"
#include "pod.h"
#include "sockets.h"

/* --- links ----------------------------------------------------------------------------------- */

/* `lo` egress: redirects packets for guests to their ports. */
static __always_inline int lo_egress(struct __sk_buff *skb)
{
	struct port port = port_of(skb);
	u8 to = 0;
	int verdict = leave_lo(skb, port, &to);

	return verdict == TO_GUEST ? redirect_marked(skb, port.slot, to) : verdict;
}

/* Ingress of guest n's port: brings packets to the owner of the port. The namespace's own stack
 * takes those that are not for `localhost`.
 */
static __always_inline int port_ingress(struct __sk_buff *skb)
{
	struct port port = port_of(skb);
	struct packet p = {};
	u8 to = 0;
	int verdict;

	mark_guest_up(skb, port);
	verdict = is_ipv6(skb) ? port_ingress_fast(skb, port, true)
			       : port_ingress_fast(skb, port, false);
	if (verdict != NOT_ON_FAST_PATH)
		return verdict;
	port = hide_port(skb, port);
	verdict = leave_port(skb, port, &p, &to);
	if (p.syn)
		forget_established(port, &p);
	switch (verdict) {
	case TO_GUEST:
		return redirect_marked(skb, port.slot, to);
	case TO_NATIVE:
		return to_native(skb, port, &p);
	case TC_ACT_OK:
		if (p.destination.kind == POD_LINK)
			count_native(skb, port.slot, port.n, GUEST_SENDS, GUEST_SERVES);
	}
	return verdict;
}

/* Egress of guest n's port: checks and counts what the namespace's own stack sends. */
static __always_inline int port_egress(struct __sk_buff *skb)
{
	struct port port = port_of(skb);
	struct address source = {};

	if (skb->mark == MARK_REDIRECTED)
		return TC_ACT_OK;
	if (has_forged_source(skb, &source))
		return drop(skb, port.slot, REASON_SPOOFED);
	if (source.kind == POD_LINK)
		count_native(skb, port.slot, port.n, GUEST_RECEIVES, GUEST_SERVES);
	else if (source.kind == ALIAS)
		count_native(skb, port.slot, port.n, GUEST_RECEIVES, GUEST_DIALS);
	return TC_ACT_OK;
}

/* --- sockets of the cgroup ------------------------------------------------------------------- */

static __always_inline int bind4(struct bpf_sock_addr *ctx)
{
	return init_socket(ctx);
}

static __always_inline int bind6(struct bpf_sock_addr *ctx)
{
	return init_socket(ctx);
}

/* A program that reads the destination and link of datagrams (a DNS server) acts on them, so they
 * must be those of `lo`.
 */
static __always_inline int setsockopt(struct bpf_sockopt *ctx)
{
	struct socket_state new = {}, *socket;

	/* The copy in ctx is of a page at most. With a longer value the kernel wants to be told to
	 * take it as given. Otherwise what another program made of the copy holds.
	 */
	if ((long)ctx->optval_end - (long)ctx->optval < ctx->optlen)
		ctx->optlen = 0;
	if (!ctx->sk)
		return SYS_PROCEED;
	switch (ctx->level << 16 | ctx->optname) {
	case IPPROTO_IP << 16 | IP_PKTINFO:
	case IPPROTO_IP << 16 | IP_RECVORIGDSTADDR:
	case IPPROTO_IPV6 << 16 | IPV6_2292PKTINFO:
	case IPPROTO_IPV6 << 16 | IPV6_RECVPKTINFO:
	case IPPROTO_IPV6 << 16 | IPV6_RECVORIGDSTADDR:
		socket = sockets.sk_storage_get(ctx->sk, &new, BPF_SK_STORAGE_GET_F_CREATE);
		if (socket)
			socket->reads_pktinfo = true;
	}
	return SYS_PROCEED;
}

static __always_inline int connect4(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = V4_MAPPED(ctx->user_ip4);
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return SYS_PROCEED;
	clear_dialed(sk);
	if (translate_destination(ctx, sk, sk->src_ip4, true, a))
		ctx->user_ip4 = a[3];
	return SYS_PROCEED;
}

static __always_inline int connect6(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = IP6_WORDS(ctx->user_ip6);
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return SYS_PROCEED;
	clear_dialed(sk);
	if (translate_destination(ctx, sk,
				  sk->src_ip6[0] | sk->src_ip6[1] | sk->src_ip6[2] | sk->src_ip6[3],
				  true, a))
		set_user_ip6(ctx, a);
	return SYS_PROCEED;
}

/* A datagram of an unconnected socket. An answer to a guest's view leaves from the alias. */

static __always_inline int sendmsg4(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = V4_MAPPED(ctx->user_ip4);
	struct bpf_sock *sk = ctx->sk;
	struct address to = classify4(a[3]);
	u8 slot = slot_of(ctx);

	if (!sk || !slot)
		return SYS_PROCEED;
	if (to.kind == NATIVE_VIEW) {
		if (!needs_lo(sk) && guest_ifindex(slot, to.n)) {
			ctx->user_ip4 = render4(address_of(LINK, to.n));
			ctx->msg_src_ip4 = render4(address_of(ALIAS, 0));
		}
	} else if (translate_destination(ctx, sk, ctx->msg_src_ip4, false, a)) {
		ctx->user_ip4 = a[3];
	}
	return SYS_PROCEED;
}

static __always_inline int sendmsg6(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = IP6_WORDS(ctx->user_ip6), source[4] = IP6_WORDS(ctx->msg_src_ip6);
	struct bpf_sock *sk = ctx->sk;
	struct address to = classify6(a);
	u8 slot = slot_of(ctx);

	if (!sk || !slot)
		return SYS_PROCEED;
	if (to.kind == NATIVE_VIEW) {
		if (!needs_lo(sk) && guest_ifindex(slot, to.n)) {
			render6(address_of(LINK, to.n), a);
			render6(address_of(ALIAS, 0), source);
			set_user_ip6(ctx, a);
			ctx->msg_src_ip6[0] = source[0];
			ctx->msg_src_ip6[1] = source[1];
			ctx->msg_src_ip6[2] = source[2];
			ctx->msg_src_ip6[3] = source[3];
		}
	} else if (translate_destination(ctx, sk, source[0] | source[1] | source[2] | source[3],
					 false, a)) {
		set_user_ip6(ctx, a);
	}
	return SYS_PROCEED;
}

static __always_inline int recvmsg4(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = V4_MAPPED(ctx->user_ip4);

	if (translate_sender(ctx, a))
		ctx->user_ip4 = a[3];
	return SYS_PROCEED;
}

static __always_inline int recvmsg6(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = IP6_WORDS(ctx->user_ip6);

	if (translate_sender(ctx, a))
		set_user_ip6(ctx, a);
	return SYS_PROCEED;
}

static __always_inline int getpeername4(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = V4_MAPPED(ctx->user_ip4);
	struct bpf_sock *sk = ctx->sk;

	if (sk && translate_peer(ctx, classify4(sk->src_ip4), a))
		ctx->user_ip4 = a[3];
	return SYS_PROCEED;
}

static __always_inline int getpeername6(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = IP6_WORDS(ctx->user_ip6);
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return SYS_PROCEED;

	__be32 local[4] = IP6_WORDS(sk->src_ip6);

	if (translate_peer(ctx, classify(local), a))
		set_user_ip6(ctx, a);
	return SYS_PROCEED;
}

static __always_inline int getsockname4(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = V4_MAPPED(ctx->user_ip4);
	struct bpf_sock *sk = ctx->sk;

	if (sk && translate_local(ctx, classify4(sk->dst_ip4), a))
		ctx->user_ip4 = a[3];
	return SYS_PROCEED;
}

static __always_inline int getsockname6(struct bpf_sock_addr *ctx)
{
	__be32 a[4] = IP6_WORDS(ctx->user_ip6);
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return SYS_PROCEED;

	__be32 peer[4] = IP6_WORDS(sk->dst_ip6);

	if (translate_local(ctx, classify(peer), a))
		set_user_ip6(ctx, a);
	return SYS_PROCEED;
}

/* --- entry points ---------------------------------------------------------------------------- */

TC_PROGRAM(lo_egress)
TC_PROGRAM(port_ingress)
TC_PROGRAM(port_egress)

SOCKOPT_PROGRAM(setsockopt)
SOCK_ADDR_PROGRAM(bind4)
SOCK_ADDR_PROGRAM(bind6)
SOCK_ADDR_PROGRAM(connect4)
SOCK_ADDR_PROGRAM(connect6)
SOCK_ADDR_PROGRAM(sendmsg4)
SOCK_ADDR_PROGRAM(sendmsg6)
SOCK_ADDR_PROGRAM(recvmsg4)
SOCK_ADDR_PROGRAM(recvmsg6)
SOCK_ADDR_PROGRAM(getpeername4)
SOCK_ADDR_PROGRAM(getpeername6)
SOCK_ADDR_PROGRAM(getsockname4)
SOCK_ADDR_PROGRAM(getsockname6)
