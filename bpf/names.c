/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * Names that native programs see: the peer of a TCP connection from a guest is 127.0.0.1 or ::1,
 * as of any client at `localhost` (getpeername, accept). UDP keeps the guest's own view, for a
 * server answers to the address that it was given. All pods may share these programs.
 */

#include <uapi/linux/bpf.h>
#include <uapi/linux/in.h>

/* clang-format off */
#define BPF_LICENSE Dual BSD/GPL
/* clang-format on */

#include "addresses.h"

int getpeername4(struct bpf_sock_addr *ctx)
{
	if (ctx->protocol == IPPROTO_TCP && classify4(ctx->user_ip4).kind == NATIVE_VIEW)
		ctx->user_ip4 = render4((struct address){LOOPBACK});
	return 1;
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	__be32 peer[4] = {ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]};

	if (ctx->protocol != IPPROTO_TCP)
		return 1;
	if (classify6(peer).kind == NATIVE_VIEW) {
		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[3] = bpf_htonl(1);
	} else if (!peer[0] && !peer[1] && peer[2] == bpf_htonl(0xffff) &&
		   classify4(peer[3]).kind == NATIVE_VIEW) {
		ctx->user_ip6[3] = render4((struct address){LOOPBACK});
	}
	return 1;
}
