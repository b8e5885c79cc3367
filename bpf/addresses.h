/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The address plan of a pod, as in testbed/model/addresses.py (a test compares the two).
 *
 * An address of either family is classified into a kind and a guest's number, and rendered from
 * them. Decisions in between do not depend on the family.
 */

#ifndef TESTBED_ADDRESSES_H
#define TESTBED_ADDRESSES_H

#include <uapi/linux/types.h>

enum kind {
	OTHER,
	LOOPBACK,	   /* 127.0.0.1, ::1 */
	ALIAS,		   /* what a guest dials as localhost */
	NATIVE_SOURCE,	   /* native clients, as a guest sees them */
	NATIVE_SOURCE_ODD, /* the same, of flows that are not from 127.0.0.1 to 127.0.0.1 */
	POD_LINK,	   /* the pod's own address on the guest link */
	LINK,		   /* guest n's own address on the guest link */
	GUEST_VIEW,	   /* guest n, as guests see it */
	NATIVE_VIEW,	   /* guest n, as native servers see it */
	LOOPBACK_NET,	   /* the rest of 127.0.0.0/8 */
	LINK_LOCAL,	   /* guest n's in fe80::/64, from its MAC (RFC 4291, appendix A) */
	LINK_LOCAL_OTHER,  /* the rest of fe80::/10 */
	MULTICAST,	   /* and broadcast */
	UNSPECIFIED,
};

struct address {
	u8 kind;
	u8 n; /* of LINK, LINK_LOCAL, GUEST_VIEW, NATIVE_VIEW; else 0 */
};

#define LINK_MTU	  1500

#define LOOPBACK4	  0x7f000001 /* 127.0.0.1 */
#define LOOPBACK_PREFIX4  0x7f	     /* 127.0.0.0/8 */
#define MULTICAST_NET4	  0xe0000000 /* 224.0.0.0/4 */
#define RESERVED_NET4	  0xf0000000 /* 240.0.0.0/4 */
#define BROADCAST4	  0xffffffff

/* All of 169.254.64.0/20 is the guest link's. */
#define SINGLE_NET4	  0xa9fe4d00 /* 169.254.77.0/24, hosts as in `enum single` */
#define GUEST_LINK_NET4	  0xa9fe4e00 /* 169.254.78.0/24 */
#define GUEST_VIEW_NET4	  0xa9fe4f00 /* 169.254.79.0/24 */
#define NATIVE_VIEW_NET4  0x7f4d0000 /* 127.77.0.0/24 */

#define LOOPBACK_HOST6	  1	      /* last word of ::1 */
#define POD_NET6	  0xfd770000  /* first word of all our IPv6 addresses */
#define NATIVE_VIEW_NET6  0x0127      /* second word of fd77:0:0:127::/64 */
#define GUEST_LINK_HOST6  0x00780000  /* last word of fd77::78:n */
#define GUEST_VIEW_HOST6  0x00790000  /* last word of fd77::79:n */
#define V4_MAPPED6	  0x0000ffff  /* third word of ::ffff:a.b.c.d */
#define LINK_LOCAL_NET6	  0xfe80U     /* fe80::/10 */
#define LINK_LOCAL_THIRD6 0x007700ff  /* third word of fe80::77:ff:fe00:1nn */
#define LINK_LOCAL_HOST6  0xfe000100U /* last word of it */
#define MULTICAST_PREFIX6 0xff	      /* ff00::/8 */

/* Hosts of 169.254.77.0/24 and of fd77::/112. */
enum single {
	SINGLE_ALIAS = 1,
	SINGLE_NATIVE_SOURCE = 2,
	SINGLE_POD_LINK = 3,
	SINGLE_NATIVE_SOURCE_ODD = 4,
};

/* MACs are 02:77:00:00:xx:xx. The last two bytes: */
#define MAC_PREFIX	  0x0277
#define MAC_SUFFIX_ALIAS  0x0001
#define MAC_SUFFIX_GUEST  0x0100 /* | n */
#define MAC_BYTES(suffix) {MAC_PREFIX >> 8, MAC_PREFIX & 0xff, 0, 0, (suffix) >> 8, (suffix) & 0xff}
#define ALIAS_MAC	  MAC_BYTES(MAC_SUFFIX_ALIAS)
#define GUEST_MAC(n)	  MAC_BYTES(MAC_SUFFIX_GUEST | (n))

static __always_inline struct address address_of(u8 kind, u8 n)
{
	struct address address = {kind, n};

	return address;
}

static __always_inline u8 kind_of_single(u32 host)
{
	switch (host) {
	case SINGLE_ALIAS:
		return ALIAS;
	case SINGLE_NATIVE_SOURCE:
		return NATIVE_SOURCE;
	case SINGLE_POD_LINK:
		return POD_LINK;
	case SINGLE_NATIVE_SOURCE_ODD:
		return NATIVE_SOURCE_ODD;
	}
	return OTHER;
}

static __always_inline u32 single_of_kind(u8 kind)
{
	switch (kind) {
	case ALIAS:
		return SINGLE_ALIAS;
	case NATIVE_SOURCE:
		return SINGLE_NATIVE_SOURCE;
	case POD_LINK:
		return SINGLE_POD_LINK;
	}
	return SINGLE_NATIVE_SOURCE_ODD;
}

static __always_inline struct address classify4(__be32 word)
{
	u32 a = bpf_ntohl(word);
	struct address is = {OTHER, 0};

	switch (a >> 8) {
	case SINGLE_NET4 >> 8:
		is.kind = kind_of_single(a & 0xff);
		return is;
	case GUEST_LINK_NET4 >> 8:
		is.kind = LINK;
		is.n = a;
		return is;
	case GUEST_VIEW_NET4 >> 8:
		is.kind = GUEST_VIEW;
		is.n = a;
		return is;
	case NATIVE_VIEW_NET4 >> 8:
		is.kind = NATIVE_VIEW;
		is.n = a;
		return is;
	}
	if (a >> 24 == LOOPBACK_PREFIX4)
		is.kind = a == LOOPBACK4 ? LOOPBACK : LOOPBACK_NET;
	else if (a >= MULTICAST_NET4 && (a < RESERVED_NET4 || a == BROADCAST4))
		is.kind = MULTICAST;
	else if (!a)
		is.kind = UNSPECIFIED;
	return is;
}

static __always_inline __be32 render4(struct address is)
{
	switch (is.kind) {
	case LOOPBACK:
		return bpf_htonl(LOOPBACK4);
	case LINK:
		return bpf_htonl(GUEST_LINK_NET4 | is.n);
	case GUEST_VIEW:
		return bpf_htonl(GUEST_VIEW_NET4 | is.n);
	case NATIVE_VIEW:
		return bpf_htonl(NATIVE_VIEW_NET4 | is.n);
	}
	return bpf_htonl(SINGLE_NET4 | single_of_kind(is.kind));
}

static __always_inline struct address classify6(const __be32 *a)
{
	struct address is = {OTHER, 0};
	u32 first = bpf_ntohl(a[0]), last = bpf_ntohl(a[3]);

	if (first == POD_NET6 && !a[2]) {
		if (a[1] == bpf_htonl(NATIVE_VIEW_NET6)) {
			if (last < 256) {
				is.kind = NATIVE_VIEW;
				is.n = last;
			}
		} else if (!a[1]) {
			switch (last >> 8) {
			case 0:
				is.kind = kind_of_single(last);
				break;
			case GUEST_LINK_HOST6 >> 8:
				is.kind = LINK;
				is.n = last;
				break;
			case GUEST_VIEW_HOST6 >> 8:
				is.kind = GUEST_VIEW;
				is.n = last;
				break;
			}
		}
	} else if (!(a[0] | a[1] | a[2])) {
		if (last == LOOPBACK_HOST6)
			is.kind = LOOPBACK;
		else if (!last)
			is.kind = UNSPECIFIED;
	} else if (first >> 24 == MULTICAST_PREFIX6) {
		is.kind = MULTICAST;
	} else if (first >> 22 == LINK_LOCAL_NET6 >> 6) {
		is.kind = LINK_LOCAL_OTHER;
		if (a[0] == bpf_htonl(LINK_LOCAL_NET6 << 16) && !a[1] &&
		    a[2] == bpf_htonl(LINK_LOCAL_THIRD6) && last >> 8 == LINK_LOCAL_HOST6 >> 8) {
			is.kind = LINK_LOCAL;
			is.n = last;
		}
	}
	return is;
}

static __always_inline void render6(struct address is, __be32 *a)
{
	u32 last = is.n;

	a[0] = bpf_htonl(POD_NET6);
	a[1] = 0;
	a[2] = 0;
	switch (is.kind) {
	case LOOPBACK:
		a[0] = 0;
		last = LOOPBACK_HOST6;
		break;
	case LINK:
		last |= GUEST_LINK_HOST6;
		break;
	case GUEST_VIEW:
		last |= GUEST_VIEW_HOST6;
		break;
	case NATIVE_VIEW:
		a[1] = bpf_htonl(NATIVE_VIEW_NET6);
		break;
	default:
		last = single_of_kind(is.kind);
	}
	a[3] = bpf_htonl(last);
}

/* Sockets of IPv6 use IPv4 by addresses of this form (RFC 4291, 2.5.5.2). */
static __always_inline bool is_v4_mapped(const __be32 *a)
{
	return !a[0] && !a[1] && a[2] == bpf_htonl(V4_MAPPED6);
}

/* Addresses that a guest has on its link. */
static __always_inline bool is_guests_own(struct address is)
{
	return is.kind == LINK || is.kind == LINK_LOCAL;
}

/* Addresses that outside `lo` only packets may have that the programs translated. */
static __always_inline bool is_reserved(struct address is)
{
	switch (is.kind) {
	case LOOPBACK:
	case LOOPBACK_NET:
	case ALIAS:
	case NATIVE_SOURCE:
	case NATIVE_SOURCE_ODD:
	case GUEST_VIEW:
	case NATIVE_VIEW:
		return true;
	}
	return false;
}

#endif
