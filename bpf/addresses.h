/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0-only
 *
 * The address plan of a pod, as in testbed/model/addresses.py (a test holds the two together).
 *
 * Addresses of both families are told apart into a kind and a guest's number, and made from them
 * again; whatever is decided in between knows no family.
 */

enum kind {
	OTHER,
	LOOPBACK,	   /* 127.0.0.1, ::1 */
	ALIAS,		   /* what a guest dials as localhost */
	NATIVE_SOURCE,	   /* native clients, as a guest sees them */
	NATIVE_SOURCE_ODD, /* native clients whose packets were not from 127.0.0.1 to 127.0.0.1 */
	POD_LINK,	   /* the pod's own address on the guest link */
	LINK,		   /* guest n's own address on the guest link */
	GUEST_VIEW,	   /* guest n, as guests see it */
	NATIVE_VIEW,	   /* guest n, as native servers see it */
	LOOPBACK_NET,	   /* the rest of 127.0.0.0/8 */
	LINK_LOCAL,	   /* fe80::/10 */
	MULTICAST,	   /* and broadcast */
	UNSPECIFIED,
};

struct address {
	u8 kind;
	u8 n; /* of LINK, GUEST_VIEW, NATIVE_VIEW; else 0 */
};

#define LINK_MTU  1500
#define LINK_NET4 0xa9fe4000 /* 169.254.64.0/20: 77.x singles, 78.n links, 79.n views of guests */
#define NATIVE_VIEW_NET4    0x7f4d0000 /* 127.77.0.0/24 */
#define LINK_NET6	    0xfd770000 /* first word of all our IPv6 addresses */
#define NATIVE_VIEW_SUBNET6 0x0127     /* second word of fd77:0:0:127::/64 */
#define LINK_HOST6	    0x00780000 /* fd77::78:n */
#define GUEST_VIEW_HOST6    0x00790000 /* fd77::79:n */

/* The last byte of 169.254.77.x and the last word of fd77::x. */
static __always_inline u8 kind_of_single(u32 host)
{
	switch (host) {
	case 1:
		return ALIAS;
	case 2:
		return NATIVE_SOURCE;
	case 3:
		return POD_LINK;
	case 4:
		return NATIVE_SOURCE_ODD;
	}
	return OTHER;
}

static __always_inline u32 single_of_kind(u8 kind)
{
	switch (kind) {
	case ALIAS:
		return 1;
	case NATIVE_SOURCE:
		return 2;
	case POD_LINK:
		return 3;
	}
	return 4; /* NATIVE_SOURCE_ODD */
}

static __always_inline struct address classify4(__be32 word)
{
	u32 a = bpf_ntohl(word);
	struct address is = {OTHER, 0};

	switch (a >> 8) {
	case LINK_NET4 >> 8 | 13:
		is.kind = kind_of_single(a & 0xff);
		return is;
	case LINK_NET4 >> 8 | 14:
		is.kind = LINK;
		is.n = a;
		return is;
	case LINK_NET4 >> 8 | 15:
		is.kind = GUEST_VIEW;
		is.n = a;
		return is;
	case NATIVE_VIEW_NET4 >> 8:
		is.kind = NATIVE_VIEW;
		is.n = a;
		return is;
	}
	if (a >> 24 == 127)
		is.kind = a == 0x7f000001 ? LOOPBACK : LOOPBACK_NET;
	else if (a >= 0xe0000000 && (a < 0xf0000000 || a == 0xffffffff))
		is.kind = MULTICAST;
	else if (!a)
		is.kind = UNSPECIFIED;
	return is;
}

static __always_inline __be32 render4(struct address is)
{
	switch (is.kind) {
	case LOOPBACK:
		return bpf_htonl(0x7f000001);
	case LINK:
		return bpf_htonl(LINK_NET4 | 14 << 8 | is.n);
	case GUEST_VIEW:
		return bpf_htonl(LINK_NET4 | 15 << 8 | is.n);
	case NATIVE_VIEW:
		return bpf_htonl(NATIVE_VIEW_NET4 | is.n);
	}
	return bpf_htonl(LINK_NET4 | 13 << 8 | single_of_kind(is.kind));
}

static __always_inline struct address classify6(const __be32 *a)
{
	struct address is = {OTHER, 0};
	u32 first = bpf_ntohl(a[0]), last = bpf_ntohl(a[3]);

	if (first == LINK_NET6 && !a[2]) {
		if (a[1] == bpf_htonl(NATIVE_VIEW_SUBNET6)) {
			if (last < 256) {
				is.kind = NATIVE_VIEW;
				is.n = last;
			}
		} else if (!a[1]) {
			switch (last >> 8) {
			case 0:
				is.kind = kind_of_single(last);
				break;
			case LINK_HOST6 >> 8:
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
		if (last == 1)
			is.kind = LOOPBACK;
		else if (!last)
			is.kind = UNSPECIFIED;
	} else if (first >> 24 == 0xff) {
		is.kind = MULTICAST;
	} else if (first >> 22 == 0xfe80 >> 6) {
		is.kind = LINK_LOCAL;
	}
	return is;
}

static __always_inline void render6(struct address is, __be32 *a)
{
	u32 last = is.n;

	a[0] = bpf_htonl(LINK_NET6);
	a[1] = 0;
	a[2] = 0;
	switch (is.kind) {
	case LOOPBACK:
		a[0] = 0;
		last = 1;
		break;
	case LINK:
		last |= LINK_HOST6;
		break;
	case GUEST_VIEW:
		last |= GUEST_VIEW_HOST6;
		break;
	case NATIVE_VIEW:
		a[1] = bpf_htonl(NATIVE_VIEW_SUBNET6);
		break;
	default:
		last = single_of_kind(is.kind);
	}
	a[3] = bpf_htonl(last);
}

/* Addresses that only translated packets carry, or none at all outside `lo`. */
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
