/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * What native programs see as the peer of a TCP connection from a guest: 127.0.0.1 or ::1, as of
 * any client at `localhost` (getpeername, accept). UDP keeps the guest's own view, as a server
 * answers to the address that it was given. The programs have no state, so all pods share them.
 */

#include <uapi/linux/bpf.h>
#include <uapi/linux/in.h>

#include "common.h"
#include "addresses.h"

static __always_inline int getpeername4(struct bpf_sock_addr *ctx)
{
	if (ctx->protocol == IPPROTO_TCP && classify4(ctx->user_ip4).kind == NATIVE_VIEW)
		ctx->user_ip4 = render4(address_of(LOOPBACK, 0));
	return SYS_PROCEED;
}

static __always_inline int getpeername6(struct bpf_sock_addr *ctx)
{
	__be32 peer[4] = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]};

	if (ctx->protocol != IPPROTO_TCP)
		return SYS_PROCEED;
	if (classify6(peer).kind == NATIVE_VIEW) {
		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[3] = bpf_htonl(LOOPBACK_HOST6);
	} else if (is_v4_mapped(peer) && classify4(peer[3]).kind == NATIVE_VIEW) {
		ctx->user_ip6[3] = render4(address_of(LOOPBACK, 0));
	}
	return SYS_PROCEED;
}

SOCK_ADDR_PROGRAM(getpeername4)
SOCK_ADDR_PROGRAM(getpeername6)
