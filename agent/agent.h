/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The traffic agent: one program that serves and makes TCP and UDP traffic and scores it at the
 * receiver, the same in a process, a network namespace, a Linux guest and an OSv unikernel.
 *
 *   main.c       control connections: orders in JSON, one a line (the protocol is in README.md)
 *   order.c      reads the keys of an order, or refuses it
 *   server.c     the serving end            client.c     the dialing end, which is given a run
 *   stream.c     sending and receiving a stream, the same for either end
 *   net.c        sockets, time, the payload's pattern
 *   sockets.c    single socket calls, ordered one by one
 *   histogram.c  latencies                  json.c       flat JSON
 *
 * Only libc, and of it only plain sockets, poll, pthreads and clock_gettime: what OSv has too; but
 * where there is unshare(), threads have descriptors of their own (`own_files`).
 * _GNU_SOURCE stays undefined, as newer glibc would then bind strtod's kin to names OSv lacks.
 */
#ifndef AGENT_H
#define AGENT_H

#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/types.h>

#define AGENT_VERSION "1"
#define CONTROL_PORT  4700

#define SECOND_NS     1000000000ull
#define LIMIT_NS      (5 * SECOND_NS) /* without progress for so long, a run is over */
#define TICK_NS	      (SECOND_NS / 4) /* how often a thread that waits for datagrams looks up */
#define LATE_NS	      4000000ull      /* a paced sender makes up for no more than this */
#define SPIN_NS	      100000ull	      /* how long before its time a thread that sleeps wakes up */
#define MAX_MESSAGE   (1u << 20)      /* bytes of one write, request or response over TCP */
#define MAX_DATAGRAM  65507u
#define MAX_STREAMS   64
#define CHUNK	      (128u << 10) /* bytes of one read from a TCP stream */
#define SAMPLE_EVERY  16	   /* one buffer in so many is looked at outside warm-up */
#define SAMPLE_BYTES  64

#define MIN(a, b)     ((a) < (b) ? (a) : (b))

/* --- what goes over data connections; integers are big endian --- */

enum mode { STREAM_UP = 1, STREAM_DOWN, REQUEST_RESPONSE };

#define MAGIC 0x74626137u /* "tba7" */

/* First bytes of a TCP connection, and the body of a datagram of type OPEN. */
struct order {
	uint32_t magic;
	uint32_t mode;
	uint32_t size;	    /* bytes per write, datagram, request and response */
	uint32_t phase;	    /* where in the pattern the stream's payload begins */
	uint64_t warmup_ns; /* the receiver scores from this long after its start */
	uint64_t bytes;	    /* of a stream: exactly so many; 0: until the client ends it */
	uint64_t rate_bps;  /* UDP streams: payload bits per second; 0: as fast as it goes */
};

/* The receiver's score: the answer to a stream up, over TCP or as the body of a REPORT. */
struct report {
	uint64_t bytes;
	uint64_t elapsed_ns;
	uint64_t datagrams;
	uint64_t lost;
	uint64_t reordered;
	uint64_t corrupt;
};

enum datagram_type { OPEN = 1, READY, DATA, END, REPORT, ALIVE, DONE, REQUEST, RESPONSE };

/* Head of every datagram; size_bytes counts it in. */
struct datagram {
	uint32_t type;	   /* MAGIC ^ enum datagram_type */
	uint32_t flow;	   /* drawn by the client, one per stream */
	uint64_t sequence; /* of DATA, from 0; END: how many DATA there were */
};

void order_swap(struct order *o); /* host to network order, or back */
void report_swap(struct report *r);

/* --- net.c --- */

struct endpoint {
	bool udp;
	int family; /* AF_INET, AF_INET6 */
};

union address {
	struct sockaddr any;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

uint64_t now_ns(void);
void pause_ns(uint64_t ns);
void spin_ns(uint64_t ns);
void pattern_init(void);
const unsigned char *pattern_at(uint64_t offset);
bool intact(const void *payload, size_t length, uint64_t offset, bool fully, uint64_t nth);

socklen_t address_size(const union address *a);
void address_text(const union address *a, char text[static INET6_ADDRSTRLEN]);
bool address_parse(const char *text, union address *a);
unsigned address_port(const union address *a);
void address_set_port(union address *a, unsigned port);

/* These give a socket, or -1 with errno. */
int listen_at(struct endpoint e, union address *at);
int dial(struct endpoint e, const union address *to);
void set_timeouts(int fd); /* a tick, both ways; what is accepted has them too */
void wait_untimed(int fd); /* to receive: its timer takes a percent of a transaction */
void set_option(int fd, int level, int name, int value);
void close_by_reset(int fd);

bool would_block(int error);

/*
 * Bytes moved; 0 is the end (receive only); -1 with errno: EAGAIN after 5 s without progress,
 * ECANCELED when `*stop` (where it is not NULL) is seen, after a tick or being woken.
 */
ssize_t receive_some(int fd, void *buffer, size_t length, const atomic_bool *stop);
ssize_t send_some(int fd, const void *buffer, size_t length, const atomic_bool *stop);
/* 0, or -1 with errno (ECONNRESET too when the peer ended before all was there). */
int receive_all(int fd, void *buffer, size_t length, const atomic_bool *stop);
int send_all(int fd, const void *buffer, size_t length, const atomic_bool *stop);
int send_both(int fd, const void *head, size_t head_length, const void *body, size_t length,
	      const union address *to);
const char *reason(int error);
int start_thread(pthread_t *thread, void *(*run)(void *), void *argument);
void wait_a_tick(pthread_cond_t *for_this, pthread_mutex_t *lock); /* at most */

/*
 * Gives the calling thread a table of descriptors of its own with `fd` (-1: none) alone in it, if the
 * system can: true, and the thread has to close its copy too. In a table that threads share, each
 * call on a socket counts a reference to it up and down, which takes percents of a transaction.
 */
bool own_files(int fd);

/*
 * Ends the call that a thread waits in, if it has descriptors of its own: its sockets are nobody
 * else's to shut down. It may be just about to wait: to be repeated until it has ended.
 */
void be_woken(void); /* before any thread is */
void wake(pthread_t thread);

/* --- stream.c --- */

struct score {
	bool measuring;
	uint64_t begin_ns, first_ns, last_ns; /* start; start and end of what is scored */
	uint64_t total;			      /* bytes (TCP), datagrams (UDP), warm-up too */
	uint64_t next, first_sequence;	      /* UDP: highest sequence + 1; first scored one */
	struct report is;
};

void score_start(struct score *s, const struct order *o);
void score_datagram(struct score *s, const struct order *o, const struct datagram *head,
		    size_t length);
void score_finish(struct score *s, uint64_t sent);

/* A sender of datagrams. It stops when the other end has been silent for too long. */
struct sender {
	int fd;
	const union address *to; /* NULL: connected */
	struct order order;
	uint32_t flow;
	_Atomic uint64_t heard_ns; /* 0: it wants no more */
	uint64_t sent;		   /* datagrams */
};

int tcp_send(int fd, const struct order *o, uint64_t until_ns, const atomic_bool *stop);
int tcp_receive(int fd, const struct order *o, uint64_t until_ns, struct score *s, void *buffer,
		const atomic_bool *stop);
int udp_send(struct sender *s, uint64_t until_ns);
int datagram_send(int fd, const union address *to, enum datagram_type type, uint32_t flow,
		  uint64_t sequence, const void *body, size_t length);
enum datagram_type datagram_type(const struct datagram *head, ssize_t length);

/* --- histogram.c --- */

/* Bucket widths are at most 1/128 of their value; the last holds 68 s and more too. */
#define HISTOGRAM_BUCKETS ((29 << 7) + 128)

struct histogram {
	uint64_t count[HISTOGRAM_BUCKETS];
};

void histogram_add(struct histogram *h, uint64_t ns);
uint64_t histogram_upper_ns(unsigned bucket); /* the highest value that the bucket holds */
void histogram_merge(struct histogram *into, const struct histogram *from);

/* --- json.c --- */

struct json {
	unsigned count;
	const char *fault; /* why the line was refused */
	struct member {
		const char *key;
		const char *text; /* NULL: a number */
		double number;
		bool used;
	} member[24];
};

bool json_parse(struct json *j, char *line);
const char *json_text(struct json *j, const char *key);
const struct member *json_number(struct json *j, const char *key);
const char *json_unused(const struct json *j);
void json_quote(FILE *out, const char *text);

/* --- order.c --- */

#define MAX_SERVERS 64
#define MAX_SOCKETS 4096

struct server;

/* One controller. Its servers and sockets end with its connection. */
struct session {
	int fd;
	FILE *out;
	struct json order;
	struct server *server[MAX_SERVERS];
	struct held {
		int fd; /* plus one: 0 is a free place */
		bool udp;
	} held[MAX_SOCKETS];
	unsigned char *buffer; /* MAX_MESSAGE bytes, made when first needed */
	char fault[256];
};

/* These take a key from the order, and refuse it (false, with the fault) if it is not as it must be. */
bool refuse(struct session *s, const char *what, const char *why);
bool take_word(struct session *s, const char *key, const char *const *words, unsigned *which);
bool take_number(struct session *s, const char *key, double low, double high, double *value);
bool take_endpoint(struct session *s, struct endpoint *e);
bool taken_all(struct session *s); /* nothing is left in the order */

/* --- sockets.c --- */

bool socket_order(struct session *s, const char *op);
void close_sockets(struct session *s);

/* --- server.c --- */

/* NULL with errno. It waits for `delay_ns` before each response. */
struct server *server_start(struct endpoint e, union address *at, uint64_t delay_ns);
void server_stop(struct server *s); /* returns when its threads are gone and the port is free */

/* --- client.c --- */

enum kind { STREAM, RR, CRR };

struct run {
	struct endpoint endpoint;
	enum kind kind;
	const char *host;
	unsigned port;
	unsigned streams;
	uint64_t duration_ns; /* 0: until `order.bytes` are moved */
	uint64_t gap_ns;      /* between requests of a stream; 0: each when the last is answered */
	struct order order;
};

/* Writes one line of JSON: the result, or what failed. */
void run(const struct run *r, FILE *out);

#endif
