// SPDX-License-Identifier: Apache-2.0
/* Command line and control connections: accepts orders, one JSON object per line (README.md). */
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

#define MAX_LINE 4096

static void address_any(int family, union address *a)
{
	memset(a, 0, sizeof(*a));
	a->any.sa_family = family;
}

static bool family_works(int family)
{
	union address at;
	int fd;

	address_any(family, &at);
	fd = listen_at((struct endpoint){.family = family}, &at);
	if (fd >= 0)
		close(fd);
	return fd >= 0;
}

static bool hello(struct session *s)
{
	struct timespec t;

	if (!taken_all(s))
		return false;
	clock_gettime(CLOCK_REALTIME, &t);
	fprintf(s->out,
		"{\"ok\":true,\"version\":\"%s\",\"ipv4\":%s,\"ipv6\":%s,\"monotonic_ns\":%llu,"
		"\"realtime_ns\":%llu}\n",
		AGENT_VERSION, family_works(AF_INET) ? "true" : "false",
		family_works(AF_INET6) ? "true" : "false", (unsigned long long)now_ns(),
		(unsigned long long)(t.tv_sec * SECOND_NS + t.tv_nsec));
	return true;
}

static bool parse_bind(const char *text, int family, union address *at)
{
	address_any(family, at);
	if (!strcmp(text, "any"))
		return true;
	if (!strcmp(text, "localhost"))
		text = family == AF_INET6 ? "::1" : "127.0.0.1";
	return address_parse(text, at);
}

static bool serve(struct session *s)
{
	const char *where = json_text(&s->order, "bind");
	char what[128];
	struct endpoint e;
	union address at;
	double port = 0, delay = 0;
	unsigned slot;

	if (!take_endpoint(s, &e) || !take_number(s, "port", 0, 65535, &port) ||
	    !take_number(s, "delay_us", 0, 1e6, &delay) || !taken_all(s))
		return false;
	if (!where)
		where = "any";
	if (!parse_bind(where, e.family, &at))
		return refuse(s, "bind", "must be any, localhost or an address of the family");
	address_set_port(&at, port);
	for (slot = 0; slot < MAX_SERVERS && s->server[slot];)
		slot++;
	if (slot == MAX_SERVERS)
		return refuse(s, "serve", "too many servers; stop one");
	s->server[slot] = server_start(e, &at, delay * 1e3);
	if (!s->server[slot]) {
		snprintf(what, sizeof(what), "bind %.60s:%u", where, (unsigned)port);
		return refuse(s, what, strerror(errno));
	}
	fprintf(s->out, "{\"ok\":true,\"server\":%u,\"port\":%u}\n", slot, address_port(&at));
	return true;
}

static bool stop(struct session *s)
{
	double slot = -1;

	if (!take_number(s, "server", 0, MAX_SERVERS - 1, &slot) || !taken_all(s))
		return false;
	if (!s->server[(unsigned)slot])
		return refuse(s, "server", "no such server");
	server_stop(s->server[(unsigned)slot]);
	s->server[(unsigned)slot] = NULL;
	fprintf(s->out, "{\"ok\":true}\n");
	return true;
}

static bool order_run(struct session *s)
{
	static const char *const kinds[] = {"stream", "rr", "crr", NULL};
	static const char *const directions[] = {"up", "down", NULL};
	double port = 0, size = 0, streams = 1, duration = 0, bytes = 0, warmup = 0, rate = 0;
	double per_s = 0;
	struct run r = {.host = json_text(&s->order, "host")};
	unsigned kind, down = 0;

	if (!r.host || !*r.host)
		return refuse(s, "host", "must be a name or an address");
	if (!take_endpoint(s, &r.endpoint) || !take_word(s, "mode", kinds, &kind))
		return false;
	r.kind = kind;
	if (r.kind == STREAM && !take_word(s, "direction", directions, &down))
		return false;
	if (!take_number(s, "port", 1, 65535, &port) ||
	    !take_number(s, "size_bytes", r.endpoint.udp ? sizeof(struct datagram) : 1,
			 r.endpoint.udp ? MAX_DATAGRAM : MAX_MESSAGE, &size) ||
	    !take_number(s, "streams", 1, MAX_STREAMS, &streams) ||
	    !take_number(s, "duration_s", 0, 3600, &duration) ||
	    !take_number(s, "bytes", 0, 1e15, &bytes) ||
	    !take_number(s, "warmup_s", 0, 3600, &warmup))
		return false;
	if (r.kind == STREAM && r.endpoint.udp && !take_number(s, "rate_bps", 0, 1e12, &rate))
		return false;
	if (r.kind == RR && !take_number(s, "rate_per_s", 0, 1e6, &per_s))
		return false;
	if (!taken_all(s))
		return false;
	if (!duration == !bytes)
		return refuse(s, "run", "needs either duration_s or bytes");
	if (bytes && warmup)
		return refuse(s, "warmup_s", "not with bytes, as all of them are scored");
	r.port = port;
	r.streams = streams;
	r.duration_ns = duration * SECOND_NS;
	r.gap_ns = per_s ? streams / per_s * SECOND_NS : 0;
	r.order = (struct order){.magic = MAGIC, .size = size, .bytes = bytes};
	r.order.mode = r.kind != STREAM ? REQUEST_RESPONSE : down ? STREAM_DOWN : STREAM_UP;
	r.order.warmup_ns = warmup * SECOND_NS;
	r.order.rate_bps = rate / streams;
	run(&r, s->out);
	return true;
}

static bool order_http(struct session *s)
{
	double port = 0, connections = 1, duration = 0, rate = 0;
	struct web w = {.run.host = json_text(&s->order, "host")};

	w.path = json_text(&s->order, "path");
	if (!w.run.host || !*w.run.host)
		return refuse(s, "host", "must be a name or an address");
	if (!w.path || *w.path != '/')
		return refuse(s, "path", "must begin with /");
	if (!take_endpoint(s, &w.run.endpoint) || !take_number(s, "port", 1, 65535, &port) ||
	    !take_number(s, "connections", 1, MAX_STREAMS, &connections) ||
	    !take_number(s, "duration_s", 0.001, 3600, &duration) ||
	    !take_number(s, "rate_per_s", 0, 1e6, &rate) || !taken_all(s))
		return false;
	if (w.run.endpoint.udp)
		return refuse(s, "transport", "must be tcp");
	w.run.port = port;
	w.run.streams = connections;
	w.run.duration_ns = duration * SECOND_NS;
	w.rate_per_s = rate;
	ask_web(&w, s->out);
	return true;
}

static bool obey(struct session *s, char *line)
{
	static const struct {
		const char *name;
		bool (*carry_out)(struct session *);
	} orders[] = {
		{"hello", hello},   {"serve", serve},	  {"stop", stop},
		{"run", order_run}, {"http", order_http},
	};
	const char *op;

	if (!json_parse(&s->order, line))
		return refuse(s, "order", s->order.fault);
	op = json_text(&s->order, "op");
	if (!op)
		return refuse(s, "op", "no such order");
	for (unsigned i = 0; i < sizeof(orders) / sizeof(*orders); i++)
		if (!strcmp(op, orders[i].name))
			return orders[i].carry_out(s);
	return socket_order(s, op);
}

static void write_answer(struct session *s, char *line)
{
	if (!obey(s, line))
		print_fault(s->out, s->fault);
}

/* Sends the answer in one piece, so nothing is on the wire while the order is carried out. */
static bool answer(struct session *s, char *line)
{
	char *text = NULL;
	size_t length = 0;
	int error;

	s->out = open_memstream(&text, &length);
	if (!s->out)
		return false;
	write_answer(s, line);
	error = fclose(s->out) || send_all(s->fd, text, length, NULL);
	free(text);
	return !error;
}

static void *control(void *argument)
{
	struct session *s = argument;
	char line[MAX_LINE];
	size_t length = 0;
	ssize_t got;

	set_option(s->fd, IPPROTO_TCP, TCP_NODELAY, 1);
	set_option(s->fd, SOL_SOCKET, SO_KEEPALIVE, 1);
	while (length < sizeof(line) &&
	       (got = receive_some(s->fd, line + length, sizeof(line) - length, NULL)) > 0) {
		char *end;

		length += got;
		while ((end = memchr(line, '\n', length))) {
			*end++ = 0;
			if (!answer(s, line))
				goto out;
			length -= end - line;
			memmove(line, end, length);
		}
	}
out:
	for (unsigned i = 0; i < MAX_SERVERS; i++)
		if (s->server[i])
			server_stop(s->server[i]);
	close_sockets(s);
	close(s->fd);
	free(s);
	return NULL;
}

static void *control_listener(void *argument)
{
	int listener = *(int *)argument;

	for (;;) {
		int fd = accept(listener, NULL, NULL);
		struct session *s = fd < 0 ? NULL : calloc(1, sizeof(*s));
		pthread_t thread;

		if (s) {
			s->fd = fd;
			if (!start_thread(&thread, control, s)) {
				pthread_detach(thread);
				continue;
			}
			free(s);
		}
		if (fd >= 0)
			close(fd);
		pause_ns(SECOND_NS / 100); /* out of memory or descriptors: try again later */
	}
	return NULL;
}

/* Listens on the same port in each family that the stack has. */
static int listen_for_control(unsigned port)
{
	static const int families[] = {AF_INET, AF_INET6};
	static int listener[2];
	pthread_t thread[2];
	unsigned n = 0;

	for (unsigned i = 0; i < 2; i++) {
		union address at;

		address_any(families[i], &at);
		address_set_port(&at, port);
		listener[n] = listen_at((struct endpoint){.family = families[i]}, &at);
		if (listener[n] < 0 && errno == EADDRINUSE)
			break; /* the port is in use by another program, or by our IPv4 socket */
		if (listener[n] < 0)
			continue;
		port = address_port(&at);
		if (!start_thread(&thread[n], control_listener, &listener[n]))
			n++;
	}
	if (!n) {
		fprintf(stderr, "agent: control port %u: %s\n", port, strerror(errno));
		return 1;
	}
	printf("agent: control port %u\n", port);
	fflush(stdout);
	while (n)
		pthread_join(thread[--n], NULL);
	return 1;
}

static void end(int signal)
{
	(void)signal;
	_exit(0);
}

/* Raises the limit of file descriptors to its maximum. A system without a limit ignores it. */
static void allow_sockets(void)
{
	struct rlimit limit;

	if (!getrlimit(RLIMIT_NOFILE, &limit)) {
		limit.rlim_cur = limit.rlim_max;
		(void)!setrlimit(RLIMIT_NOFILE, &limit);
	}
}

static int usage(FILE *out, int status)
{
	fprintf(out,
		"usage: agent [--control-port PORT]   (default %d; 0: any free one)\n"
		"       agent --order ORDER\n"
		"       agent --version | --help\n"
		"Takes orders over TCP, one JSON object a line; see README.md.\n",
		CONTROL_PORT);
	return status;
}

int main(int argc, char **argv)
{
	static struct session alone = {.fd = -1};
	long port = CONTROL_PORT;
	char *rest, *order = NULL;

	if (argc == 2 && !strcmp(argv[1], "--version")) {
		printf("agent %s\n", AGENT_VERSION);
		return 0;
	}
	if (argc == 2 && !strcmp(argv[1], "--help"))
		return usage(stdout, 0);
	if (argc == 3 && !strcmp(argv[1], "--order")) {
		order = argv[2];
	} else if (argc == 3 && !strcmp(argv[1], "--control-port")) {
		port = strtol(argv[2], &rest, 10);
		if (*rest || rest == argv[2] || port < 0 || port > 65535)
			return usage(stderr, 2);
	} else if (argc != 1) {
		return usage(stderr, 2);
	}
	allow_sockets();
	signal(SIGPIPE, SIG_IGN);
	signal(SIGTERM, end);
	signal(SIGINT, end);
	be_woken();
	pattern_init();
	if (!order)
		return listen_for_control(port);
	alone.out = stdout;
	write_answer(&alone, order);
	return 0;
}
