// SPDX-License-Identifier: Apache-2.0
/*
 * Single socket calls, one per order. The answer is the kernel's, also an error: `errno` by number.
 * Sockets never block. An order that has to wait does so by poll(), up to `timeout_s`.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

#define SHOWN 32 /* received bytes that the answer contains; all of them are compared */

enum option_kind { NUMBER, TEXT, SECONDS, NO_RESETS };

/* A filter on the TCP header that drops segments with RST (offset 13, bit 2). */
static struct sock_filter no_resets[] = {
	BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 13),
	BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, 4, 0, 1),
	BPF_STMT(BPF_RET | BPF_K, 0),
	BPF_STMT(BPF_RET | BPF_K, 0xffffffff),
};

static const struct option {
	const char *name;
	int level, number;
	enum option_kind kind;
} options[] = {
	{"SO_BINDTODEVICE", SOL_SOCKET, SO_BINDTODEVICE, TEXT},
	{"SO_BROADCAST", SOL_SOCKET, SO_BROADCAST, NUMBER},
	{"SO_ERROR", SOL_SOCKET, SO_ERROR, NUMBER},
	{"SO_KEEPALIVE", SOL_SOCKET, SO_KEEPALIVE, NUMBER},
	{"SO_LINGER", SOL_SOCKET, SO_LINGER, SECONDS},
	{"SO_OOBINLINE", SOL_SOCKET, SO_OOBINLINE, NUMBER},
	{"SO_RCVBUF", SOL_SOCKET, SO_RCVBUF, NUMBER},
	{"SO_REUSEADDR", SOL_SOCKET, SO_REUSEADDR, NUMBER},
	{"SO_REUSEPORT", SOL_SOCKET, SO_REUSEPORT, NUMBER},
	{"SO_SNDBUF", SOL_SOCKET, SO_SNDBUF, NUMBER},
	{"SO_ATTACH_FILTER", SOL_SOCKET, SO_ATTACH_FILTER, NO_RESETS},
	{"TCP_KEEPCNT", IPPROTO_TCP, TCP_KEEPCNT, NUMBER},
	{"TCP_KEEPIDLE", IPPROTO_TCP, TCP_KEEPIDLE, NUMBER},
	{"TCP_KEEPINTVL", IPPROTO_TCP, TCP_KEEPINTVL, NUMBER},
	{"TCP_MAXSEG", IPPROTO_TCP, TCP_MAXSEG, NUMBER},
	{"TCP_NODELAY", IPPROTO_TCP, TCP_NODELAY, NUMBER},
	{"IP_MTU_DISCOVER", IPPROTO_IP, IP_MTU_DISCOVER, NUMBER},
	{"IPV6_DONTFRAG", IPPROTO_IPV6, IPV6_DONTFRAG, NUMBER},
	{"IPV6_MTU_DISCOVER", IPPROTO_IPV6, IPV6_MTU_DISCOVER, NUMBER},
	{"IPV6_V6ONLY", IPPROTO_IPV6, IPV6_V6ONLY, NUMBER},
};

static bool answer(struct session *s, int error)
{
	fprintf(s->out, "{\"ok\":true,\"errno\":%d}\n", error);
	return true;
}

static void put_address(struct session *s, const char *who, const union address *a)
{
	char text[INET6_ADDRSTRLEN] = "";

	if (a->any.sa_family == AF_INET || a->any.sa_family == AF_INET6)
		address_text(a, text);
	fprintf(s->out, ",\"%saddress\":\"%s\",\"%sport\":%u", who, text, who,
		*text ? address_port(a) : 0);
}

static bool take_socket(struct session *s, struct held **h)
{
	double id = -1;

	if (!take_number(s, "socket", 0, MAX_SOCKETS - 1, &id))
		return false;
	*h = &s->held[(unsigned)id];
	return (*h)->fd ? true : refuse(s, "socket", "no such socket");
}

static int fd_of(const struct held *h)
{
	return h->fd - 1;
}

/* Reads an address of either family and its port. `*given`: whether the order has one. */
static bool take_address(struct session *s, union address *a, bool *given)
{
	const char *text = json_text(&s->order, "address");
	double port = 0;

	memset(a, 0, sizeof(*a));
	*given = text;
	if (!take_number(s, "port", 0, 65535, &port))
		return false;
	if (!text)
		return true;
	a->any.sa_family = strchr(text, ':') ? AF_INET6 : AF_INET;
	if (!address_parse(text, a))
		return refuse(s, "address", "not an IPv4 or IPv6 address");
	address_set_port(a, port);
	return true;
}

static bool take_deadline(struct session *s, uint64_t *deadline)
{
	double timeout = 2;

	if (!take_number(s, "timeout_s", 0, 3600, &timeout))
		return false;
	*deadline = now_ns() + (uint64_t)(timeout * SECOND_NS);
	return true;
}

/* Waits for events. Returns 0, ETIMEDOUT or another error. */
static int await(int fd, int events, uint64_t deadline)
{
	for (;;) {
		struct pollfd p = {.fd = fd, .events = events};
		uint64_t now = now_ns();
		int left = deadline > now ? (deadline - now + 999999) / 1000000 : 0;
		int ready = poll(&p, 1, left);

		if (ready > 0)
			return 0;
		if (!ready || errno != EINTR)
			return ready ? errno : ETIMEDOUT;
	}
}

static int hold(struct session *s, int fd, bool udp)
{
	for (unsigned i = 0; i < MAX_SOCKETS; i++)
		if (!s->held[i].fd) {
			s->held[i] = (struct held){.fd = fd + 1, .udp = udp};
			fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
			return i;
		}
	close(fd);
	errno = EMFILE;
	return -1;
}

static bool order_socket(struct session *s)
{
	struct endpoint e;
	int fd, id = -1;

	if (!take_endpoint(s, &e) || !taken_all(s))
		return false;
	fd = socket(e.family, e.udp ? SOCK_DGRAM : SOCK_STREAM, 0);
	if (fd >= 0 && e.udp) /* BSD stacks refuse a datagram larger than the send buffer */
		set_option(fd, SOL_SOCKET, SO_SNDBUF, 256 << 10);
	if (fd >= 0)
		id = hold(s, fd, e.udp);
	fprintf(s->out, "{\"ok\":true,\"errno\":%d,\"socket\":%d}\n", id < 0 ? errno : 0, id);
	return true;
}

static bool take_option(struct session *s, const struct option **o)
{
	const char *name = json_text(&s->order, "option");

	for (unsigned i = 0; name && i < sizeof(options) / sizeof(*options); i++)
		if (!strcmp(name, options[i].name)) {
			*o = &options[i];
			return true;
		}
	return refuse(s, "option", "unknown");
}

static bool order_set(struct session *s)
{
	const struct option *o;
	const char *text = json_text(&s->order, "text");
	struct sock_fprog filter = {sizeof(no_resets) / sizeof(*no_resets), no_resets};
	struct linger linger = {.l_onoff = 1};
	const void *value = NULL;
	socklen_t size = 0;
	double number = 0;
	struct held *h;
	int whole;

	if (!take_socket(s, &h) || !take_option(s, &o) ||
	    !take_number(s, "value", -1, 1 << 30, &number) || !taken_all(s))
		return false;
	whole = number;
	switch (o->kind) {
	case NUMBER:
		value = &whole;
		size = sizeof(whole);
		break;
	case SECONDS:
		linger.l_linger = whole;
		value = &linger;
		size = sizeof(linger);
		break;
	case NO_RESETS:
		value = &filter;
		size = sizeof(filter);
		break;
	case TEXT:
		if (!text)
			return refuse(s, "text", "missing");
		value = text;
		size = strlen(text) + 1;
		break;
	}
	return answer(s, setsockopt(fd_of(h), o->level, o->number, value, size) ? errno : 0);
}

static bool order_get(struct session *s)
{
	const struct option *o;
	socklen_t size = sizeof(int);
	int value = 0, error;
	struct held *h;

	if (!take_socket(s, &h) || !take_option(s, &o) || !taken_all(s))
		return false;
	if (o->kind != NUMBER)
		return refuse(s, "option", "not a number");
	error = getsockopt(fd_of(h), o->level, o->number, &value, &size) ? errno : 0;
	fprintf(s->out, "{\"ok\":true,\"errno\":%d,\"value\":%d}\n", error, value);
	return true;
}

static bool order_bind(struct session *s)
{
	union address at;
	struct held *h;
	bool given;

	if (!take_socket(s, &h) || !take_address(s, &at, &given) || !taken_all(s))
		return false;
	if (!given)
		return refuse(s, "address", "missing");
	return answer(s, bind(fd_of(h), &at.any, address_size(&at)) ? errno : 0);
}

static bool order_listen(struct session *s)
{
	double backlog = 128;
	struct held *h;

	if (!take_socket(s, &h) || !take_number(s, "backlog", 0, 65535, &backlog) || !taken_all(s))
		return false;
	return answer(s, listen(fd_of(h), backlog) ? errno : 0);
}

static int finish_connect(int fd, uint64_t deadline)
{
	socklen_t size = sizeof(int);
	int error = await(fd, POLLOUT, deadline);

	if (!error && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size))
		error = errno;
	return error;
}

/* With `timeout_s` 0 it does not wait: EINPROGRESS. A later connect without address waits. */
static bool order_connect(struct session *s)
{
	union address to;
	uint64_t deadline;
	struct held *h;
	int error = EINPROGRESS;
	bool given;

	if (!take_socket(s, &h) || !take_address(s, &to, &given) || !take_deadline(s, &deadline) ||
	    !taken_all(s))
		return false;
	if (given)
		error = connect(fd_of(h), &to.any, address_size(&to)) ? errno : 0;
	if (error == EINPROGRESS && now_ns() < deadline)
		error = finish_connect(fd_of(h), deadline);
	return answer(s, error);
}

static bool order_accept(struct session *s)
{
	union address from = {0};
	socklen_t size = sizeof(from);
	uint64_t deadline;
	struct held *h;
	int fd = -1, id = -1, error;

	if (!take_socket(s, &h) || !take_deadline(s, &deadline) || !taken_all(s))
		return false;
	error = await(fd_of(h), POLLIN, deadline);
	if (!error) {
		fd = accept(fd_of(h), &from.any, &size);
		if (fd >= 0)
			id = hold(s, fd, false);
		error = id < 0 ? errno : 0;
	}
	fprintf(s->out, "{\"ok\":true,\"errno\":%d,\"socket\":%d", error, id);
	put_address(s, "", &from);
	fprintf(s->out, "}\n");
	return true;
}

static bool order_names(struct session *s)
{
	union address own = {0}, peer = {0};
	socklen_t own_size = sizeof(own), peer_size = sizeof(peer);
	struct held *h;
	int error;

	if (!take_socket(s, &h) || !taken_all(s))
		return false;
	error = getsockname(fd_of(h), &own.any, &own_size) ? errno : 0;
	if (error)
		return answer(s, error);
	if (getpeername(fd_of(h), &peer.any, &peer_size))
		peer.any.sa_family = AF_UNSPEC; /* not connected: no name */
	fprintf(s->out, "{\"ok\":true,\"errno\":0");
	put_address(s, "own_", &own);
	put_address(s, "peer_", &peer);
	fprintf(s->out, "}\n");
	return true;
}

static bool take_flags(struct session *s, int *flags)
{
	const char *text = json_text(&s->order, "flag");

	*flags = 0;
	if (text && !strcmp(text, "oob"))
		*flags = MSG_OOB;
	else if (text && !strcmp(text, "peek"))
		*flags = MSG_PEEK;
	else if (text && *text)
		return refuse(s, "flag", "must be oob or peek");
	return true;
}

/* Sends `text`, or `size` bytes of the pattern from `phase` on: a datagram, or all of a stream. */
static bool order_send(struct session *s)
{
	const char *text = json_text(&s->order, "text");
	double size = text ? strlen(text) : 0, phase = 0;
	union address to;
	uint64_t deadline, sent = 0;
	int flags, error = 0;
	struct held *h;
	bool given;

	if (!take_socket(s, &h) || !take_address(s, &to, &given) || !take_deadline(s, &deadline) ||
	    !take_flags(s, &flags) || !take_number(s, "size", 0, 1e12, &size) ||
	    !take_number(s, "phase", 0, 1e12, &phase) || !taken_all(s))
		return false;
	if (h->udp && size > MAX_MESSAGE)
		return refuse(s, "size", "more than a datagram can be");
	do {
		const void *from = text ? (const void *)(text + sent) : pattern_at(phase + sent);
		ssize_t moved =
			sendto(fd_of(h), from, MIN(size - sent, MAX_MESSAGE), flags | MSG_NOSIGNAL,
			       given ? &to.any : NULL, given ? address_size(&to) : 0);

		if (moved >= 0)
			sent += moved;
		else if (would_block(errno))
			error = await(fd_of(h), POLLOUT, deadline);
		else if (errno != EINTR)
			error = errno;
	} while (!error && sent < size);
	fprintf(s->out, "{\"ok\":true,\"errno\":%d,\"bytes\":%llu}\n", error,
		(unsigned long long)sent);
	return true;
}

static bool order_receive(struct session *s)
{
	union address from = {0};
	unsigned char shown[SHOWN];
	uint64_t deadline, total = 0;
	double size = MAX_MESSAGE, phase = 0, some = 0;
	bool intact_so_far = true, ended = false;
	int flags, error = 0;
	struct held *h;

	if (!take_socket(s, &h) || !take_deadline(s, &deadline) || !take_flags(s, &flags) ||
	    !take_number(s, "size", 0, 1e12, &size) || !take_number(s, "phase", 0, 1e12, &phase) ||
	    !take_number(s, "some", 0, 1, &some) || !taken_all(s))
		return false;
	if (!s->buffer && !(s->buffer = malloc(MAX_MESSAGE)))
		return refuse(s, "receive", "no memory");
	do {
		struct iovec part = {s->buffer, MIN(size - total, MAX_MESSAGE)};
		struct msghdr m = {.msg_iov = &part,
				   .msg_iovlen = 1,
				   .msg_name = &from,
				   .msg_namelen = sizeof(from)};
		/* OSv's recvmsg() ignores flags. */
		ssize_t got = flags ? recv(fd_of(h), s->buffer, part.iov_len, flags)
				    : recvmsg(fd_of(h), &m, 0);

		if (got < 0) {
			if (would_block(errno))
				error = await(fd_of(h), flags & MSG_OOB ? POLLPRI : POLLIN,
					      deadline);
			else if (errno != EINTR)
				error = errno;
			continue;
		}
		if (total < SHOWN)
			memcpy(shown + total, s->buffer, MIN(got, (ssize_t)(SHOWN - total)));
		intact_so_far &= intact(s->buffer, got, phase + total, true, 0);
		total += got;
		ended = !got && !h->udp && part.iov_len;
		if (h->udp || some || ended || flags)
			break;
	} while (!error && total < size);
	fprintf(s->out, "{\"ok\":true,\"errno\":%d,\"bytes\":%llu,\"intact\":%d,\"ended\":%d",
		error, (unsigned long long)total, intact_so_far, ended);
	put_address(s, "", &from);
	fprintf(s->out, ",\"hex\":\"");
	for (unsigned i = 0; i < MIN(total, SHOWN); i++)
		fprintf(s->out, "%02x", shown[i]);
	fprintf(s->out, "\"}\n");
	return true;
}

/* Waits for the event of the order, an error or a hang-up, and reports all events. */
static bool order_poll(struct session *s)
{
	static const char *const wishes[] = {"read", "write", "urgent", "error", NULL};
	static const short events[] = {POLLIN, POLLOUT, POLLPRI, 0};
	unsigned wish;
	uint64_t deadline;
	struct pollfd p = {0};
	struct held *h;
	int error;

	if (!take_socket(s, &h) || !take_word(s, "for", wishes, &wish) ||
	    !take_deadline(s, &deadline) || !taken_all(s))
		return false;
	error = await(fd_of(h), events[wish], deadline);
	p.fd = fd_of(h);
	p.events = POLLIN | POLLOUT | POLLPRI;
	if (!error && poll(&p, 1, 0) < 0)
		error = errno;
	fprintf(s->out,
		"{\"ok\":true,\"errno\":%d,\"readable\":%d,\"writable\":%d,\"urgent\":%d,"
		"\"error\":%d,\"hangup\":%d}\n",
		error, !!(p.revents & POLLIN), !!(p.revents & POLLOUT), !!(p.revents & POLLPRI),
		!!(p.revents & POLLERR), !!(p.revents & POLLHUP));
	return true;
}

static bool order_shutdown(struct session *s)
{
	static const char *const ways[] = {"read", "write", "both", NULL};
	static const int how[] = {SHUT_RD, SHUT_WR, SHUT_RDWR};
	unsigned way;
	struct held *h;

	if (!take_socket(s, &h) || !take_word(s, "how", ways, &way) || !taken_all(s))
		return false;
	return answer(s, shutdown(fd_of(h), how[way]) ? errno : 0);
}

/* Makes the socket blocking first, since SO_LINGER needs that. */
static bool order_close(struct session *s)
{
	struct held *h;
	int fd;

	if (!take_socket(s, &h) || !taken_all(s))
		return false;
	fd = fd_of(h);
	h->fd = 0;
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
	return answer(s, close(fd) ? errno : 0);
}

static bool order_resolve(struct session *s)
{
	static const char *const families[] = {"any", "ipv4", "ipv6", NULL};
	static const int number[] = {AF_UNSPEC, AF_INET, AF_INET6};
	const char *name = json_text(&s->order, "name");
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
	unsigned family;
	int error;

	if (!name || !take_word(s, "family", families, &family) || !taken_all(s))
		return refuse(s, "resolve", "needs a name and a family");
	hints.ai_family = number[family];
	error = getaddrinfo(name, NULL, &hints, &found);
	fprintf(s->out, "{\"ok\":true,\"errno\":0,\"failure\":");
	json_quote(s->out, error ? gai_strerror(error) : "");
	fprintf(s->out, ",\"addresses\":\"");
	for (struct addrinfo *a = error ? NULL : found; a; a = a->ai_next) {
		char text[INET6_ADDRSTRLEN];

		address_text((const union address *)a->ai_addr, text);
		fprintf(s->out, "%s%s", a == found ? "" : " ", text);
	}
	fprintf(s->out, "\"}\n");
	if (!error)
		freeaddrinfo(found);
	return true;
}

bool socket_order(struct session *s, const char *op)
{
	static const struct {
		const char *name;
		bool (*carry_out)(struct session *);
	} orders[] = {
		{"socket", order_socket},     {"set", order_set},
		{"get", order_get},	      {"bind", order_bind},
		{"listen", order_listen},     {"connect", order_connect},
		{"accept", order_accept},     {"names", order_names},
		{"send", order_send},	      {"receive", order_receive},
		{"poll", order_poll},	      {"close", order_close},
		{"shutdown", order_shutdown}, {"resolve", order_resolve},
	};

	for (unsigned i = 0; i < sizeof(orders) / sizeof(*orders); i++)
		if (!strcmp(op, orders[i].name))
			return orders[i].carry_out(s);
	return refuse(s, "op", "no such order");
}

/* OSv's kernel crashes if a listener is closed with a connection that is not accepted (sofree). */
static void accept_all(const struct held *h)
{
	int fd;

	while (!h->udp && (fd = accept(fd_of(h), NULL, NULL)) >= 0)
		close(fd);
}

void close_sockets(struct session *s)
{
	for (unsigned i = 0; i < MAX_SOCKETS; i++)
		if (s->held[i].fd) {
			accept_all(&s->held[i]);
			close(fd_of(&s->held[i]));
		}
	free(s->buffer);
}
