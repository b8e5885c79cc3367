/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * Programs that `testbed doctor` loads and attaches, to find out whether the kernel has the newest
 * of the features that the datapaths need. They never see traffic.
 */

#include <uapi/linux/bpf.h>

#include "common.h"

/* bpf_redirect_peer crosses a veth in one step: Linux 5.10. */
static __always_inline int redirect_peer(struct __sk_buff *skb)
{
	return bpf_redirect_peer(skb->ifindex, 0);
}

/* The attach type BPF_CGROUP_INET4_GETPEERNAME: Linux 5.8. */
static __always_inline int getpeername4(struct bpf_sock_addr *ctx __attribute__((unused)))
{
	return SYS_PROCEED;
}

TC_PROGRAM(redirect_peer)
SOCK_ADDR_PROGRAM(getpeername4)
