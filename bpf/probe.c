/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * What `testbed doctor` loads and attaches: the youngest of the kernel's features that the
 * datapaths need. No traffic ever meets these programs.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

/* The kernel takes this spelling alone for GPL compatible. */
/* clang-format off */
#define BPF_LICENSE Dual BSD/GPL
/* clang-format on */

/* Across a veth in one step: Linux 5.10. */
int redirect_peer(struct __sk_buff *skb)
{
	return bpf_redirect_peer(skb->ifindex, 0);
}

/* Which peer a socket shows: Linux 5.8. */
int getpeername4(struct bpf_sock_addr *ctx)
{
	return 1;
}
