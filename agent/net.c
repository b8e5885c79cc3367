// SPDX-License-Identifier: Apache-2.0
/* Sockets, time, and the pattern of the payload. */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <string.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * SECOND_NS + t.tv_nsec;
}

void pause_ns(uint64_t ns)
{
	struct timespec t = {ns / SECOND_NS, ns % SECOND_NS};

	nanosleep(&t, NULL);
}

void spin_ns(uint64_t ns)
{
	for (uint64_t begin = now_ns(); now_ns() < begin + ns;)
		;
}

/*
 * Byte n of a stream is pattern[n % PERIOD]. The period is a prime that is not close to a multiple
 * of a segment's size, so bytes at a wrong place do not match. The table is longer by the largest
 * message, so that each piece of a stream is contiguous in it.
 */
#define PERIOD 4093

static unsigned char pattern[PERIOD + MAX_MESSAGE];

void pattern_init(void)
{
	uint32_t state = MAGIC;

	for (size_t i = 0; i < PERIOD; i++) {
		state = state * 1664525 + 1013904223;
		pattern[i] = state >> 24;
	}
	for (size_t i = PERIOD; i < sizeof(pattern); i++)
		pattern[i] = pattern[i - PERIOD];
}

const unsigned char *pattern_at(uint64_t offset)
{
	return pattern + offset % PERIOD;
}

bool intact(const void *payload, size_t length, uint64_t offset, bool fully, uint64_t nth)
{
	if (!fully && nth % SAMPLE_EVERY)
		return true;
	return !memcmp(payload, pattern_at(offset), fully ? length : MIN(length, SAMPLE_BYTES));
}

void order_swap(struct order *o)
{
	o->magic = htonl(o->magic);
	o->mode = htonl(o->mode);
	o->size = htonl(o->size);
	o->phase = htonl(o->phase);
	o->warmup_ns = htobe64(o->warmup_ns);
	o->bytes = htobe64(o->bytes);
	o->rate_bps = htobe64(o->rate_bps);
}

void report_swap(struct report *r)
{
	r->bytes = htobe64(r->bytes);
	r->elapsed_ns = htobe64(r->elapsed_ns);
	r->datagrams = htobe64(r->datagrams);
	r->lost = htobe64(r->lost);
	r->reordered = htobe64(r->reordered);
	r->corrupt = htobe64(r->corrupt);
}

socklen_t address_size(const union address *a)
{
	return a->any.sa_family == AF_INET6 ? sizeof(a->v6) : sizeof(a->v4);
}

void address_text(const union address *a, char text[static INET6_ADDRSTRLEN])
{
	const void *bytes =
		a->any.sa_family == AF_INET6 ? (const void *)&a->v6.sin6_addr : &a->v4.sin_addr;

	if (!inet_ntop(a->any.sa_family, bytes, text, INET6_ADDRSTRLEN))
		*text = 0;
}

/* Parses an address of the family that is set in `a`. */
bool address_parse(const char *text, union address *a)
{
	void *bytes = a->any.sa_family == AF_INET6 ? (void *)&a->v6.sin6_addr : &a->v4.sin_addr;

	return inet_pton(a->any.sa_family, text, bytes) == 1;
}

unsigned address_port(const union address *a)
{
	return ntohs(a->any.sa_family == AF_INET6 ? a->v6.sin6_port : a->v4.sin_port);
}

void address_set_port(union address *a, unsigned port)
{
	if (a->any.sa_family == AF_INET6)
		a->v6.sin6_port = htons(port);
	else
		a->v4.sin_port = htons(port);
}

/* For options that a stack may lack without harm: errors are ignored. */
void set_option(int fd, int level, int name, int value)
{
	(void)!setsockopt(fd, level, name, &value, sizeof(value));
}

void set_timeouts(int fd)
{
	struct timeval tick = {0, TICK_NS / 1000};

	(void)!setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tick, sizeof(tick));
	(void)!setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tick, sizeof(tick));
}

void wait_untimed(int fd)
{
	struct timeval forever = {0};

	(void)!setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof(forever));
	set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
	set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 5);
	set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 1);
	set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 5);
#ifdef TCP_USER_TIMEOUT /* there are no probes while data is not acknowledged */
	set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 10000);
#endif
}

void close_by_reset(int fd)
{
	struct linger l = {.l_onoff = 1};

	(void)!setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof(l));
	close(fd);
}

static int close_failed(int fd)
{
	int error = errno;

	close(fd);
	errno = error;
	return -1;
}

static int open_socket(struct endpoint e)
{
	int fd = socket(e.family, e.udp ? SOCK_DGRAM : SOCK_STREAM, 0);

	if (fd < 0)
		return -1;
	if (e.udp) {
		/* BSD stacks refuse to send a datagram that is larger than the send buffer. */
		set_option(fd, SOL_SOCKET, SO_SNDBUF, 256 << 10);
		set_option(fd, SOL_SOCKET, SO_RCVBUF, 1 << 20);
#ifdef SO_RCVBUFFORCE /* beyond the system's limit, if we are privileged */
		set_option(fd, SOL_SOCKET, SO_RCVBUFFORCE, 1 << 20);
#endif
	}
	return fd;
}

int listen_at(struct endpoint e, union address *at)
{
	socklen_t size = address_size(at);
	int fd = open_socket(e);

	if (fd < 0)
		return -1;
	if (e.family == AF_INET6)
		set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
	if (!e.udp)
		set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
	if (bind(fd, &at->any, size) || (!e.udp && listen(fd, 1024)) ||
	    getsockname(fd, &at->any, &size))
		return close_failed(fd);
	return fd;
}

/* Waits by poll(), since SO_SNDTIMEO limits connect() on Linux only. */
static int await_connected(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLOUT};
	socklen_t size = sizeof(int);
	int error = ETIMEDOUT;

	if (poll(&p, 1, LIMIT_NS / 1000000) > 0)
		(void)!getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
	errno = error;
	return error ? -1 : 0;
}

int dial(struct endpoint e, const union address *to)
{
	int fd = open_socket(e);
	int flags;

	if (fd < 0)
		return -1;
	if (e.udp) {
		if (connect(fd, &to->any, address_size(to)))
			return close_failed(fd);
		return fd;
	}
	flags = fcntl(fd, F_GETFL);
	fcntl(fd, F_SETFL, flags | O_NONBLOCK);
	if (connect(fd, &to->any, address_size(to)) &&
	    (errno != EINPROGRESS || await_connected(fd)))
		return close_failed(fd);
	fcntl(fd, F_SETFL, flags);
	return fd;
}

bool would_block(int error)
{
	return error == EAGAIN || error == EWOULDBLOCK;
}

/*
 * Whether to repeat a call that moved nothing: after a signal or a time-out, for 5 s. The time-out
 * is only a tick: that of send() goes on while some of the bytes are taken, so only a call that
 * moved nothing shows that there is no progress.
 */
static bool again(uint64_t *begin)
{
	uint64_t now;

	if (!would_block(errno))
		return errno == EINTR;
	now = now_ns();
	if (!*begin)
		*begin = now;
	return now - *begin <= LIMIT_NS;
}

static bool stopped(const atomic_bool *stop)
{
	errno = ECANCELED;
	return stop && *stop;
}

ssize_t receive_some(int fd, void *buffer, size_t length, const atomic_bool *stop)
{
	uint64_t begin = 0;
	ssize_t got;

	while (!stopped(stop)) {
		got = recv(fd, buffer, length, 0);
		if (got >= 0 || !again(&begin))
			return got;
	}
	return -1;
}

int receive_all(int fd, void *buffer, size_t length, const atomic_bool *stop)
{
	for (size_t at = 0; at < length;) {
		ssize_t got = receive_some(fd, (char *)buffer + at, length - at, stop);

		if (!got)
			errno = ECONNRESET;
		if (got <= 0)
			return -1;
		at += got;
	}
	return 0;
}

ssize_t send_some(int fd, const void *buffer, size_t length, const atomic_bool *stop)
{
	uint64_t begin = 0;
	ssize_t sent;

	while (!stopped(stop)) {
		sent = send(fd, buffer, length, MSG_NOSIGNAL);
		if (sent >= 0 || !again(&begin))
			return sent;
	}
	return -1;
}

int send_all(int fd, const void *buffer, size_t length, const atomic_bool *stop)
{
	for (size_t at = 0; at < length;) {
		ssize_t sent = send_some(fd, (const char *)buffer + at, length - at, stop);

		if (sent < 0)
			return -1;
		at += sent;
	}
	return 0;
}

/* Sends two parts as one segment or datagram. The rest after a full TCP buffer follows. */
int send_both(int fd, const void *head, size_t head_length, const void *body, size_t length,
	      const union address *to)
{
	struct iovec part[] = {{(void *)head, head_length}, {(void *)body, length}};
	struct msghdr m = {.msg_iov = part, .msg_iovlen = length ? 2 : 1};
	ssize_t sent;

	if (to) {
		m.msg_name = (void *)to;
		m.msg_namelen = address_size(to);
	}
	do
		sent = sendmsg(fd, &m, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	if (sent < 0)
		return -1;
	if ((size_t)sent < head_length) {
		if (send_all(fd, (const char *)head + sent, head_length - sent, NULL))
			return -1;
		sent = head_length;
	}
	return send_all(fd, (const char *)body + (sent - head_length), head_length + length - sent,
			NULL);
}

const char *reason(int error)
{
	return would_block(error) || error == ECANCELED ? "no progress for 5 s" : strerror(error);
}

/* Stacks are small, since an OSv guest allocates all of a stack at once. */
int start_thread(pthread_t *thread, void *(*run)(void *), void *argument)
{
	pthread_attr_t attributes;
	int error;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 256 << 10);
	error = pthread_create(thread, &attributes, run, argument);
	pthread_attr_destroy(&attributes);
	return error;
}

void wait_a_tick(pthread_cond_t *condition, pthread_mutex_t *lock)
{
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_nsec += TICK_NS;
	until.tv_sec += until.tv_nsec / SECOND_NS;
	until.tv_nsec %= SECOND_NS;
	pthread_cond_timedwait(condition, lock, &until);
}

/*
 * Weak, since OSv has no unshare(). It may have close_range(), but that accepts CLOSE_RANGE_UNSHARE
 * and closes the descriptors of all threads.
 */
#define CLONE_FILES 0x400
extern int unshare(int flags) __attribute__((weak));
extern int close_range(unsigned first, unsigned last, int flags) __attribute__((weak)); /* 5.9 */

static atomic_bool files_are_own;

bool own_files(int fd)
{
	unsigned least = 3; /* standard streams stay open */
	unsigned after = fd < (int)least ? least : fd + 1u;

	if (!unshare || !close_range || close_range(~0u, ~0u, 0) || unshare(CLONE_FILES))
		return false;
	close_range(after, ~0u, 0);
	if (after - 1 > least)
		close_range(least, after - 2, 0);
	files_are_own = true;
	return true;
}

static void nothing(int signal)
{
	(void)signal;
}

void be_woken(void)
{
	struct sigaction action = {.sa_handler = nothing}; /* without SA_RESTART: calls end */

	sigaction(SIGURG, &action, NULL);
}

void wake(pthread_t thread)
{
	if (files_are_own)
		pthread_kill(thread, SIGURG);
}
