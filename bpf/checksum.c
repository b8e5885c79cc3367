/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * Completes the checksums of IPv6 packets for a guest whose kernel takes partial ones in IPv4 only.
 *
 * The tap of such a guest leaves checksums to the guest in both families: a device cannot be told
 * otherwise. So IPv6 packets go by a veth pair without offloads first. What such a device sends, the
 * kernel cuts into segments and completes (validate_xmit_skb).
 *
 *   namespace of the taps
 *
 *   ... ---- g1 ---- guest 1     IPv6: g1 > c1 > c1-back > g1
 *            detour
 *
 *            c1 ---- c1-back
 *            enter   leave
 *
 * `detour` is the first program at the egress of the tap, so the others there see each packet once,
 * when it is complete. Mark and addresses are as they were. That a packet came by no link, and so is
 * of the namespace's own stack, cannot be seen any more: `enter` drops what such packets may not have.
 */

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/pkt_cls.h>

#include "addresses.h"
#include "common.h"
#include "packet.h"

struct pair {
	u32 tap, out, back; /* ifindex of the guest's tap, and of both ends of its veth pair */
};

BPF_HASH(pairs, u32, struct pair, 4096); /* slot << 8 | n */

static __always_inline struct pair *pair_of(struct __sk_buff *skb)
{
	u32 key = skb->tc_classid & 0xffff;

	return pairs.lookup(&key);
}

/* Egress of the tap: IPv6 goes by the pair, and passes when it comes from there. */
static __always_inline int detour(struct __sk_buff *skb)
{
	struct pair *pair = pair_of(skb);

	if (!pair || !is_ipv6(skb) || skb->ingress_ifindex == pair->back)
		return TC_ACT_OK;
	return bpf_redirect(pair->out, 0);
}

/* Egress of the pair: drops what the namespace's own stack, or a process, sends from an address of a
 * guest.
 */
static __always_inline int enter(struct __sk_buff *skb)
{
	__be32 source[4];

	if (read(skb, ETH_HLEN + offsetof(struct ipv6hdr, saddr), source, sizeof(source)))
		return TC_ACT_SHOT;
	return !skb->ingress_ifindex && is_guests_own(classify6(source)) ? TC_ACT_SHOT : TC_ACT_OK;
}

/* Ingress of the other end: brings packets back. A process may have sent another frame than it told
 * the kernel.
 */
static __always_inline int leave(struct __sk_buff *skb)
{
	struct pair *pair = pair_of(skb);

	if (!pair || !is_ipv6(skb) || skb->vlan_present)
		return TC_ACT_SHOT;
	return bpf_redirect(pair->tap, 0);
}

TC_PROGRAM(detour)
TC_PROGRAM(enter)
TC_PROGRAM(leave)
