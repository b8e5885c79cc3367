// SPDX-License-Identifier: Apache-2.0
/*
 * An HTTP/1.1 client (RFC 9112): GET requests over connections that stay open, at a rate, or each
 * when the last one is answered.
 *
 * At a rate, requests are due at equal intervals, whatever the server does. Each takes a connection
 * that is free, or waits for one, and is timed from when it was due. Timing from when it was sent
 * would leave out the time for which requests wait behind a slow response ("coordinated omission",
 * G. Tene; the method is that of his wrk2). Nothing is sent ahead of its time, and the thread sleeps
 * until then: the CPU time of a run is that of its requests.
 */
#include <ctype.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "agent.h"

#define HEAD_BYTES 8192

struct connection {
	int fd;
	bool busy;
	uint64_t due_ns; /* of the request that is not answered yet */
	char head[HEAD_BYTES + 1];
	size_t length;	     /* bytes of the head so far */
	bool in_body;	     /* the head is complete */
	uint64_t body_bytes; /* of the body that have not arrived yet */
	bool last;	     /* the server closes the connection after this response */
};

struct client {
	const struct web *order;
	union address to;
	char request[1024];
	size_t request_bytes;
	struct connection *all;
	struct pollfd polled[MAX_STREAMS];
	uint64_t begin_ns, until_ns, last_ns, progress_ns;
	uint64_t sent, answered, errors, busy;
	struct histogram times;
	char fault[256];
	char body[CHUNK]; /* is thrown away */
};

static bool give_up(struct client *c, const char *what, const char *why)
{
	snprintf(c->fault, sizeof(c->fault), "%s %.100s:%u: %s", what, c->order->run.host,
		 c->order->run.port, why);
	return false;
}

static bool open_connection(struct client *c, struct connection *k)
{
	k->fd = dial(c->order->run.endpoint, &c->to);
	if (k->fd < 0)
		return give_up(c, "connect", reason(errno));
	set_option(k->fd, IPPROTO_TCP, TCP_NODELAY, 1);
	return true;
}

/* When the next request is due. In a closed loop that is at once. */
static uint64_t next_due(const struct client *c, uint64_t now)
{
	double per_s = c->order->rate_per_s;

	return per_s ? c->begin_ns + (uint64_t)(c->sent * (SECOND_NS / per_s)) : now;
}

/* Sends the requests that are due, as far as connections are free. */
static bool send_due(struct client *c, uint64_t now)
{
	for (unsigned i = 0; i < c->order->run.streams; i++) {
		struct connection *k = &c->all[i];
		uint64_t due = next_due(c, now);

		if (k->busy)
			continue;
		if (due > now || due >= c->until_ns)
			break;
		if (k->fd < 0 && !open_connection(c, k))
			return false;
		k->due_ns = due;
		k->busy = true;
		k->length = 0;
		k->in_body = k->last = false;
		c->busy++;
		c->sent++;
		if (send_all(k->fd, c->request, c->request_bytes, NULL))
			return give_up(c, "send to", reason(errno));
	}
	return true;
}

/* Value of a field of the head, or NULL. */
static const char *field(const char *head, const char *name)
{
	size_t length = strlen(name);

	for (const char *line = head; (line = strstr(line, "\r\n"));) {
		line += 2;
		if (!strncasecmp(line, name, length) && line[length] == ':')
			return line + length + 1 + strspn(line + length + 1, " \t");
	}
	return NULL;
}

/* Reads a complete head, whose first `head_bytes` bytes of `length` are it. */
static bool read_head(struct client *c, struct connection *k, size_t head_bytes)
{
	const char *size, *connection;
	unsigned status = 0;

	k->head[head_bytes - 2] = 0;
	size = field(k->head, "Content-Length");
	connection = field(k->head, "Connection");
	if (sscanf(k->head, "HTTP/1.%*c %u", &status) != 1 || !size || !isdigit(*size))
		return give_up(c, "response of", "no status or no Content-Length");
	c->errors += status < 200 || status > 299;
	k->last = connection && !strncasecmp(connection, "close", 5);
	k->in_body = true;
	k->body_bytes = strtoull(size, NULL, 10);
	return true;
}

static void answered(struct client *c, struct connection *k)
{
	c->last_ns = now_ns();
	histogram_add(&c->times, c->last_ns - k->due_ns);
	c->answered++;
	c->busy--;
	k->busy = false;
	if (k->last) {
		close(k->fd);
		k->fd = -1;
	}
}

/* Takes what has arrived on a connection. */
static bool receive(struct client *c, struct connection *k)
{
	size_t before = k->length, head_bytes, room = HEAD_BYTES - k->length;
	ssize_t got = k->in_body ? receive_some(k->fd, c->body, sizeof(c->body), NULL)
				 : receive_some(k->fd, k->head + before, room, NULL);
	const char *end;

	if (got <= 0)
		return give_up(c, "receive from", got ? reason(errno) : "closed in a response");
	c->progress_ns = now_ns();
	if (!k->in_body) {
		k->length += got;
		k->head[k->length] = 0;
		end = strstr(k->head, "\r\n\r\n");
		if (!end && k->length == HEAD_BYTES)
			return give_up(c, "response of", "its head is too long");
		if (!end)
			return true;
		head_bytes = end + 4 - k->head;
		got = k->length - head_bytes;
		if (!read_head(c, k, head_bytes))
			return false;
	}
	if ((uint64_t)got > k->body_bytes)
		return give_up(c, "response of", "longer than its Content-Length");
	k->body_bytes -= got;
	if (!k->body_bytes)
		answered(c, k);
	return true;
}

/* Waits for a response, or until the next request is due that a connection is free for. */
static bool wait_and_receive(struct client *c)
{
	uint64_t now = now_ns(), due = next_due(c, now), wait_ns = TICK_NS;
	unsigned streams = c->order->run.streams;

	for (unsigned i = 0; i < streams; i++)
		c->polled[i] = (struct pollfd){c->all[i].busy ? c->all[i].fd : -1, POLLIN, 0};
	if (c->busy < streams && due < c->until_ns)
		wait_ns = due > now ? MIN(wait_ns, due - now) : 0;
	if (ppoll(c->polled, streams, &(struct timespec){0, wait_ns}, NULL) < 0)
		return errno == EINTR || give_up(c, "wait for", reason(errno));
	for (unsigned i = 0; i < streams; i++)
		if (c->polled[i].revents && !receive(c, &c->all[i]))
			return false;
	return true;
}

static bool drive(struct client *c)
{
	for (;;) {
		uint64_t now = now_ns();

		if (!send_due(c, now))
			return false;
		if (!c->busy && (now >= c->until_ns || next_due(c, now) >= c->until_ns))
			return c->answered || give_up(c, "request to", "no time for one");
		if (c->busy && now > c->progress_ns + LIMIT_NS)
			return give_up(c, "request to", reason(EAGAIN));
		if (now > c->until_ns + LIMIT_NS)
			return give_up(c, "request to", "it answers slower than the rate");
		if (!wait_and_receive(c))
			return false;
		if (!c->busy)
			c->progress_ns = now_ns();
	}
}

static void print_result(const struct client *c, FILE *out)
{
	double took_s = (c->last_ns - c->begin_ns) / (double)SECOND_NS;

	fprintf(out,
		"{\"ok\":true,\"requests\":%llu,\"errors\":%llu,\"per_s\":%.3f,"
		"\"duration_s\":%.9f,\"histogram_us\":[",
		(unsigned long long)c->answered, (unsigned long long)c->errors,
		c->answered / took_s, took_s);
	histogram_print(&c->times, out);
	fprintf(out, "]}\n");
}

void ask_web(const struct web *order, FILE *out)
{
	struct client *c = calloc(1, sizeof(*c));
	const char *why = strerror(ENOMEM);
	unsigned opened = 0, streams = order->run.streams;
	bool done = false, literal = strchr(order->run.host, ':');

	if (c) {
		c->order = order;
		c->all = calloc(streams, sizeof(*c->all));
	}
	if (c && c->all && !resolve(&order->run, &c->to, &why)) {
		c->request_bytes =
			snprintf(c->request, sizeof(c->request),
				 "GET %.500s HTTP/1.1\r\nHost: %s%.250s%s\r\n\r\n", order->path,
				 literal ? "[" : "", order->run.host, literal ? "]" : "");
		/* Else ppoll() may be late by 50 us. */
		prctl(PR_SET_TIMERSLACK, 1ul, 0ul, 0ul, 0ul);
		while (opened < streams && open_connection(c, &c->all[opened]))
			opened++;
		c->begin_ns = c->progress_ns = now_ns();
		c->until_ns = c->begin_ns + order->run.duration_ns;
		done = opened == streams && drive(c);
		why = c->fault;
	}
	if (done)
		print_result(c, out);
	else
		print_fault(out, why);
	for (unsigned i = 0; i < opened; i++)
		if (c->all[i].fd >= 0)
			close(c->all[i].fd);
	if (c)
		free(c->all);
	free(c);
}
