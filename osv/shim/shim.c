// SPDX-License-Identifier: Apache-2.0
/*
 * Shim for programs in OSv guests of a pod: 127.0.0.1 and ::1 mean the pod's localhost. It is a
 * library between an unmodified program and OSv's libc, whose `lo` never leaves the guest.
 *
 * Addresses that the program passes to calls are changed, and so are those that calls return:
 *
 *   dialed    127.0.0.0/8, ::1, 0.0.0.0, ::   the alias of that family
 *   bound     127.0.0.0/8, ::1, the alias     the guest's own address on its link, where the pod's
 *                                             traffic arrives; others' connections are reset
 *   returned  any address within the pod      127.0.0.1 or ::1
 *
 * A server answers a datagram to the address that it was given, so datagrams' addresses stay
 * distinct: 169.254.77.2 is returned as 127.254.77.2, and translated back when it is dialed. IPv6
 * has only one loopback address, so fd77::2 is returned.
 *
 * Not covered:
 * - Ports that the pod's manifest gives to nobody are not the guest's own. A program that dials a
 *   port of its own choosing is refused.
 * - 127.0.0.1:P and 127.0.0.2:P are the same.
 * - 127.0.0.1:P and *:P can coexist with SO_REUSEADDR, which BSD's stack allows.
 * - Datagrams from outside the pod reach a socket that is bound to localhost.
 * - gethostbyname and IP_PKTINFO return the kernel's addresses.
 * - After a connection from outside was reset, a blocking accept goes on waiting, even if poll
 *   reported the listener as readable.
 *
 * Addresses are handled as IPv6 (IPv4-mapped), so that there is one code for both families. The
 * constants are arrays, IPv4 first, which the compiler's command line defines from
 * testbed/model/addresses.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernel.h"

static const struct in6_addr loopback[] = LOOPBACK, alias[] = ALIAS,
			     native_source[] = NATIVE_SOURCE,
			     native_source_odd[] = NATIVE_SOURCE_ODD, pod_link[] = POD_LINK;
/* The last byte of these is the guest's number. */
static const struct in6_addr guest_link[] = GUEST_LINK, guest_view[] = GUEST_VIEW;

/* --- addresses -------------------------------------------------------------------------------- */

/* Whether it is IPv6: also the index in the arrays of constants. */
static bool v6(const struct in6_addr *a)
{
	return !IN6_IS_ADDR_V4MAPPED(a);
}

static bool equal(const struct in6_addr *a, const struct in6_addr *b)
{
	return !memcmp(a, b, sizeof(*a));
}

static bool is_one_of(const struct in6_addr *a, const struct in6_addr *guests)
{
	return !memcmp(a, &guests[v6(a)], sizeof(*a) - 1);
}

static bool is_loopback(const struct in6_addr *a)
{
	return v6(a) ? IN6_IS_ADDR_LOOPBACK(a) : a->s6_addr[12] == 127;
}

static bool is_unspecified(const struct in6_addr *a)
{
	return v6(a) ? IN6_IS_ADDR_UNSPECIFIED(a) : !a->s6_addr32[3];
}

/* Whether an address is that of a peer at localhost, as the guest's kernel sees it. Nobody outside
 * of the pod has such an address.
 */
static bool is_localhost(const struct in6_addr *a)
{
	return equal(a, &alias[v6(a)]) || equal(a, &native_source[v6(a)]) ||
	       equal(a, &native_source_odd[v6(a)]) || equal(a, &pod_link[v6(a)]) ||
	       is_one_of(a, guest_view);
}

/* Reads an address of either family. False if it is another kind of address, or cut off. */
static bool load(const void *name, socklen_t length, struct in6_addr *a)
{
	const struct sockaddr *any = name;

	if (!name || length < sizeof(any->sa_family))
		return false;
	if (any->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
		*a = (struct in6_addr){.s6_addr = {[10] = 0xff, [11] = 0xff}};
		a->s6_addr32[3] = ((const struct sockaddr_in *)name)->sin_addr.s_addr;
		return true;
	}
	if (any->sa_family == AF_INET6 && length >= sizeof(struct sockaddr_in6)) {
		*a = ((const struct sockaddr_in6 *)name)->sin6_addr;
		return true;
	}
	return false;
}

static void store(struct sockaddr_storage *name, const struct in6_addr *a)
{
	if (name->ss_family == AF_INET)
		((struct sockaddr_in *)name)->sin_addr.s_addr = a->s6_addr32[3];
	else
		((struct sockaddr_in6 *)name)->sin6_addr = *a;
}

/* Copies an address to the program's buffer: truncated, with its true length (accept(2)). */
static void give(const struct sockaddr_storage *name, socklen_t length, void *to, socklen_t *size)
{
	memcpy(to, name, length < *size ? length : *size);
	*size = length;
}

/* Translates an address that a call returns. */
static void show(struct sockaddr_storage *name, socklen_t length, bool stream)
{
	struct in6_addr a;

	if (!load(name, length, &a) || !is_localhost(&a))
		return;
	if (stream || equal(&a, &alias[v6(&a)]))
		a = loopback[v6(&a)];
	else if (!v6(&a))
		a.s6_addr[12] = loopback[0].s6_addr[12];
	store(name, &a);
}

/* --- this guest ------------------------------------------------------------------------------- */

/*
 * Finds the guest's own address on its link: the source address for the alias. OSv's IPv6 has it a
 * second after boot, after duplicate address detection. Until then connections would have a source
 * in fe80::/10, which the pod does not accept.
 */
static bool find_link(bool of_v6, struct in6_addr *link)
{
	static struct in6_addr found[2];
	static bool known[2], given_up[2];
	struct sockaddr_storage name = {.ss_family = of_v6 ? AF_INET6 : AF_INET};
	socklen_t size = of_v6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);

	store(&name, &alias[of_v6]);
	((struct sockaddr_in *)&name)->sin_port = htons(9); /* any port: nothing is sent */
	for (int wait_ms = of_v6 ? 3000 : 0; !known[of_v6] && !given_up[of_v6]; wait_ms -= 10) {
		struct sockaddr_storage own;
		socklen_t length = sizeof(own);
		int fd = socket(name.ss_family, SOCK_DGRAM, 0);

		if (fd < 0)
			return false;
		known[of_v6] = !KERNEL(connect)(fd, (struct sockaddr *)&name, size) &&
			       !KERNEL(getsockname)(fd, (struct sockaddr *)&own, &length) &&
			       load(&own, length, &found[of_v6]) &&
			       is_one_of(&found[of_v6], guest_link);
		close(fd);
		if (known[of_v6])
			break;
		if (wait_ms <= 0)
			given_up[of_v6] = true;
		else
			usleep(10 * 1000);
	}
	*link = found[of_v6];
	return known[of_v6];
}

/* Translates the destination of a datagram or connection. Returns the address to use. */
static const void *dial(const void *name, socklen_t length, struct sockaddr_storage *changed)
{
	struct in6_addr a, shown, link;

	if (!load(name, length, &a))
		return name;
	shown = a;
	if (!v6(&a) && is_loopback(&a))
		shown.s6_addr[12] = alias[0].s6_addr[12];
	if (!is_localhost(&shown)) {
		if (!is_loopback(&a) && !is_unspecified(&a))
			return name;
		shown = alias[v6(&a)];
	}
	find_link(v6(&a), &link);
	memcpy(changed, name, length < sizeof(*changed) ? length : sizeof(*changed));
	store(changed, &shown);
	return changed;
}

static bool is_stream(int fd)
{
	int type = 0;
	socklen_t size = sizeof(type);

	return !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) && type == SOCK_STREAM;
}

/* Whether the socket was bound to localhost: then only localhost may connect to it. */
static bool is_private(int fd)
{
	struct sockaddr_storage own;
	socklen_t length = sizeof(own);
	struct in6_addr a;

	return !KERNEL(getsockname)(fd, (struct sockaddr *)&own, &length) &&
	       load(&own, length, &a) && is_one_of(&a, guest_link);
}

/* --- socket functions ------------------------------------------------------------------------- */

int connect(int fd, const struct sockaddr *name, socklen_t length)
{
	struct sockaddr_storage changed;

	return KERNEL(connect)(fd, dial(name, length, &changed), length);
}

int bind(int fd, const struct sockaddr *name, socklen_t length)
{
	struct sockaddr_storage changed;
	struct in6_addr a, link;

	if (load(name, length, &a) && (is_loopback(&a) || equal(&a, &alias[v6(&a)])) &&
	    find_link(v6(&a), &link)) {
		memcpy(&changed, name, length < sizeof(changed) ? length : sizeof(changed));
		store(&changed, &link);
		name = (const struct sockaddr *)&changed;
	}
	return KERNEL(bind)(fd, name, length);
}

int accept4(int fd, struct sockaddr *name, socklen_t *size, int flags)
{
	const struct linger reset = {.l_onoff = 1};
	struct sockaddr_storage peer;
	struct in6_addr a;

	for (;;) {
		socklen_t length = sizeof(peer);
		int new = KERNEL(accept4)(fd, (struct sockaddr *)&peer, &length, flags);

		if (new < 0)
			return new;
		if (load(&peer, length, &a) && !is_localhost(&a) && is_private(fd)) {
			setsockopt(new, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
			close(new);
			continue;
		}
		show(&peer, length, true);
		if (name)
			give(&peer, length, name, size);
		return new;
	}
}

int accept(int fd, struct sockaddr *name, socklen_t *size)
{
	return accept4(fd, name, size, 0);
}

int getpeername(int fd, struct sockaddr *name, socklen_t *size)
{
	struct sockaddr_storage peer;
	socklen_t length = sizeof(peer);

	if (KERNEL(getpeername)(fd, (struct sockaddr *)&peer, &length))
		return -1;
	show(&peer, length, is_stream(fd));
	give(&peer, length, name, size);
	return 0;
}

/* It is localhost if the peer is; without a peer, if the socket was bound to localhost. */
int getsockname(int fd, struct sockaddr *name, socklen_t *size)
{
	struct sockaddr_storage own, peer;
	socklen_t length = sizeof(own), peer_length = sizeof(peer);
	struct in6_addr a, of_peer;

	if (KERNEL(getsockname)(fd, (struct sockaddr *)&own, &length))
		return -1;
	if (load(&own, length, &a)) {
		bool connected = !KERNEL(getpeername)(fd, (struct sockaddr *)&peer, &peer_length) &&
				 load(&peer, peer_length, &of_peer);

		if (connected ? is_localhost(&of_peer) : is_one_of(&a, guest_link))
			store(&own, &loopback[v6(&a)]);
	}
	give(&own, length, name, size);
	return 0;
}

ssize_t sendto(int fd, const void *data, size_t bytes, int flags, const struct sockaddr *name,
	       socklen_t length)
{
	struct sockaddr_storage changed;

	return KERNEL(sendto)(fd, data, bytes, flags, dial(name, length, &changed), length);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	struct sockaddr_storage changed;
	struct msghdr own = *message;

	own.msg_name = (void *)dial(message->msg_name, message->msg_namelen, &changed);
	return KERNEL(sendmsg)(fd, &own, flags);
}

ssize_t recvfrom(int fd, void *data, size_t bytes, int flags, struct sockaddr *name,
		 socklen_t *size)
{
	struct sockaddr_storage peer;
	socklen_t length = sizeof(peer);
	ssize_t got;

	if (!name)
		return KERNEL(recvfrom)(fd, data, bytes, flags, NULL, NULL);
	got = KERNEL(recvfrom)(fd, data, bytes, flags, (struct sockaddr *)&peer, &length);
	if (got >= 0) {
		show(&peer, length, false);
		give(&peer, length, name, size);
	}
	return got;
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
	struct sockaddr_storage peer;
	socklen_t size = message->msg_namelen;
	void *name = message->msg_name;
	ssize_t got;

	if (name) {
		message->msg_name = &peer;
		message->msg_namelen = sizeof(peer);
	}
	got = KERNEL(recvmsg)(fd, message, flags);
	if (name) {
		socklen_t length = message->msg_namelen;

		message->msg_name = name;
		message->msg_namelen = size;
		if (got >= 0) {
			show(&peer, length, false);
			give(&peer, length, name, &message->msg_namelen);
		}
	}
	return got;
}

/* OSv lacks the next three. Programs that are built with _FORTIFY_SOURCE need the first. */

ssize_t __recvfrom_chk(int fd, void *data, size_t bytes, size_t room, int flags,
		       struct sockaddr *name, socklen_t *size)
{
	if (bytes > room)
		abort();
	return recvfrom(fd, data, bytes, flags, name, size);
}

int sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags)
{
	for (unsigned i = 0; i < count; i++) {
		ssize_t sent = sendmsg(fd, &messages[i].msg_hdr, flags);

		if (sent < 0)
			return i ? (int)i : -1;
		messages[i].msg_len = sent;
	}
	return count;
}

/* The time-out is ignored: no program is known that needs it. */
int recvmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout)
{
	int each = flags & ~MSG_WAITFORONE;

	(void)timeout;
	for (unsigned i = 0; i < count; i++) {
		ssize_t got = recvmsg(fd, &messages[i].msg_hdr, each);

		if (got < 0)
			return i ? (int)i : -1;
		messages[i].msg_len = got;
		if (flags & MSG_WAITFORONE)
			each |= MSG_DONTWAIT;
	}
	return count;
}

/* --- the name localhost ----------------------------------------------------------------------- */

/* Marks our lists by its address: the kernel allocated their entries one by one. */
static char localhost[] = "localhost";

static bool speaks(int family)
{
	int fd = socket(family, SOCK_DGRAM, 0);

	if (fd >= 0)
		close(fd);
	return fd >= 0;
}

/*
 * OSv's own returns the address of the first line of /etc/hosts that has the name, whatever its
 * family. This one returns localhost in all families that are asked for and supported, ::1 first as
 * by RFC 6724 (and glibc).
 */
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
		struct addrinfo **answer)
{
	static const int families[] = {AF_INET6, AF_INET};
	struct addrinfo ask = {}, *first = NULL, **end = &first;
	int error = EAI_NONAME;

	if (hints)
		ask = *hints;
	if (!node || strcasecmp(node, localhost) || ask.ai_flags & AI_NUMERICHOST)
		return KERNEL(getaddrinfo)(node, service, hints, answer);
	int asked = ask.ai_family;

	ask.ai_flags &= ~AI_PASSIVE;
	for (size_t i = 0; i < sizeof(families) / sizeof(*families); i++) {
		if ((asked != AF_UNSPEC && asked != families[i]) || !speaks(families[i]))
			continue;
		ask.ai_family = families[i];
		/* Without a node, the kernel returns loopback of the family. */
		error = KERNEL(getaddrinfo)(NULL, service ? service : "0", &ask, end);
		if (error)
			break;
		(*end)->ai_canonname = localhost;
		end = &(*end)->ai_next;
	}
	if (error)
		freeaddrinfo(first);
	else
		*answer = first;
	return error;
}

void freeaddrinfo(struct addrinfo *list)
{
	while (list && list->ai_canonname == localhost) {
		struct addrinfo *next = list->ai_next;

		KERNEL(freeaddrinfo)(list);
		list = next;
	}
	if (list)
		KERNEL(freeaddrinfo)(list);
}
